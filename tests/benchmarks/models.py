"""Speed and memory of the discovered models beside timm's own of about the same multiply-adds.

    python tests/benchmarks/models.py [--models mixpath_a mixnet_m ...] [--batch-sizes 1 32] [--variants plain folded]
        [--repetitions 10] [--threads N] [--device cuda]

For every model: multiply-adds (convolutions and linear layers, half of what `torch.utils.flop_counter` counts),
parameters, images per second in eval and inference mode at each batch size, and peak memory. The variants:

- plain: as `create_model` gives it.
- channels_last: model and input in the channels-last memory format.
- folded: the same, with the batch norms folded by `timm.utils.reparameterize_model`. Blocks of timm's that do not offer
  it stay as they are.
- compiled: channels_last under `torch.compile`.

All models and variants take turns, call by call, within one process. All variants but the compiled one must agree to
1e-6 of the largest output in float64; in float32, deep networks of random weights blow rounding up. Peak memory is
that of one process per model, largest batch size, plain: on a CPU what the resident set grew by from before the model
was made (Linux only), on a GPU what torch had allocated.

How to read it: at batch size 1 a variant finds in the cache what the one before it left there, so compare models there
and variants at larger batches. images/s are from the median time of the repetitions; the last column is slowest /
fastest call of the variant that varied most.
"""

import argparse
import copy
import math
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from common import add_common_args, check, perturb_norms, print_table, setup, timed, turns
from timm.utils import reparameterize_model
from torch import nn

from timm_mixpath.models.cost import count_macs

MODELS = (
    'mixpath_a',
    'mixpath_b',
    'mixnet_m',
    'mixnet_s',
    'efficientnet_b0',
    'mnasnet_100',
    'mobilenetv3_large_100',
)
TOLERANCE = 1e-6
VARIANTS = ('plain', 'channels_last', 'folded', 'compiled')


def make_model(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=1000).eval()
    perturb_norms(model, seed)
    return model


def make_variant(model: nn.Module, variant: str) -> nn.Module:
    model = copy.deepcopy(model)
    if variant != 'plain':
        model = model.to(memory_format=torch.channels_last)
    if variant == 'folded':
        model = reparameterize_model(model, inplace=True)
    if variant == 'compiled':
        model = torch.compile(model)
    return model


@torch.inference_mode()
def check_variants(model: nn.Module, name: str, variants: Sequence[str], img_size: int) -> None:
    x = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)).double()
    model = copy.deepcopy(model).double()
    y = model(x)
    for variant in variants:
        difference = (make_variant(model, variant)(x) - y).abs().max() / y.abs().max()
        if not difference < TOLERANCE:
            sys.exit(f'CHECK FAILED: {variant} of {name} differs by {difference:.1e} of the largest output')


def _peak_memory(name: str, batch_size: int, img_size: int, device: str, threads: int, result: Callable) -> None:
    torch.set_num_threads(threads)
    if device == 'cuda':
        model = timm.create_model(name, num_classes=1000).eval().cuda()
        with torch.inference_mode():
            model(torch.zeros(batch_size, 3, img_size, img_size, device=device))
        result(torch.cuda.max_memory_allocated() / 2**20)
        return
    torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))  # what the library itself takes
    status, clear = Path('/proc/self/status'), Path('/proc/self/clear_refs')
    if not clear.exists():
        result(math.nan)  # importing takes more than a model, and only Linux can forget that
        return
    clear.write_text('5')  # makes the present resident set the peak
    before = _peak_rss_mib(status)
    model = timm.create_model(name, num_classes=1000).eval()
    with torch.inference_mode():
        model(torch.zeros(batch_size, 3, img_size, img_size))
    result(_peak_rss_mib(status) - before)


def _peak_rss_mib(status: Path) -> float:
    return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) / 2**10


def peak_memory_mib(name: str, batch_size: int, img_size: int, device: str) -> float:
    """Peak memory of a forward pass in a process of its own."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(
        target=_peak_memory, args=(name, batch_size, img_size, device, threads, sender.send), daemon=True
    )
    process.start()
    value = receiver.recv()
    process.join()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME', help='timm models')
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 32], metavar='N')
    parser.add_argument('--img-size', type=int, default=224, metavar='N')
    parser.add_argument('--repetitions', type=int, default=10, metavar='N', help='timed calls of each (default: 10)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='calls before them (default: 2)')
    args = parser.parse_args()
    device = setup(args, 'Inference speed of the discovered models')

    macs, params, memory = {}, {}, {}
    sides: dict[tuple[str, str, int], Callable[[], torch.Tensor]] = {}
    for name in args.models:
        model = make_model(name, args.seed)
        macs[name] = sum(count_macs(model, (3, args.img_size, args.img_size)).values())
        params[name] = sum(p.numel() for p in model.parameters())
        check_variants(model, name, [v for v in args.variants if v != 'compiled'], args.img_size)
        memory[name] = peak_memory_mib(name, max(args.batch_sizes), args.img_size, device.type)
        for batch_size in args.batch_sizes:
            generator = torch.Generator().manual_seed(args.seed)
            x = torch.randn(batch_size, 3, args.img_size, args.img_size, generator=generator).to(device)
            for variant in args.variants:
                module = make_variant(model.to(device), variant)
                x_side = x if variant == 'plain' else x.contiguous(memory_format=torch.channels_last)
                side = sides[name, variant, batch_size] = torch.inference_mode()(
                    lambda module=module, x_side=x_side: module(x_side)
                )
                for _ in range(1 + args.warmup):
                    side()
        print(f'ready: {name}', flush=True)
    check(True, f'variants of {len(args.models)} models agree to {TOLERANCE} of the largest output')

    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in sides}
    for repetition in range(args.repetitions):
        for key in turns(list(sides), repetition):
            times[key].append(timed(sides[key], device)[0])

    header = ['model', 'MACs (M)', 'params (M)']
    header += [f'{variant} b{batch_size}' for batch_size in args.batch_sizes for variant in args.variants]
    header += ['peak MiB', 'spread']
    rows = []
    for name in args.models:
        row = [name, f'{macs[name] / 1e6:.1f}', f'{params[name] / 1e6:.3f}']
        for batch_size in args.batch_sizes:
            for variant in args.variants:
                row.append(f'{batch_size / statistics.median(times[name, variant, batch_size]):.1f}')
        spread = max(max(t) / min(t) for key, t in times.items() if key[0] == name)
        rows.append([*row, f'{memory[name]:.0f}', f'{spread:.2f}'])
    print_table(header, rows)
    print(f'images/s, n = {args.repetitions} calls each, {args.img_size}x{args.img_size}')


if __name__ == '__main__':
    main()
