"""What a training step on a CPU gains by the kernels of `--cpu-kernels` and by memory that is kept.

The sides take their turn in every step: torch's gradients of depthwise convolutions and this package's, with the same
batch and arch; first with memory that the C library returns to the system at once, then with memory that it keeps, as
in `timm-mixpath train`. That can't be undone in a process, so its two halves are not side by side.
"""

import argparse
import statistics
from functools import partial

import timm
import torch
import torch.nn.functional as F
from common import add_common_args, check, median_range, print_table, setup, timed, turns
from torch import nn

from timm_mixpath import Supernet
from timm_mixpath.models.cpu_kernels import cpu_kernel_calls, use_cpu_kernels
from timm_mixpath.utils.memory import keep_freed_memory

# Name, arguments, pixels, images per step
MODELS = (
    ('mixpath_s1_supernet', dict(m=4), 32, 32),
    ('mixpath_nano_supernet', {}, 32, 128),
    ('mixpath_supernet', dict(backbone='tf_efficientnet_lite0'), 128, 32),
    ('tf_efficientnet_lite0', {}, 128, 32),
    ('mixpath_a', {}, 128, 32),
)
SIDES = ('torch', 'kernels')


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    F.cross_entropy(model(x), target).backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    _, kwargs, pixels, images = next(entry for entry in MODELS if entry[0] == name)
    pixels, images = args.img_size or pixels, args.batch_size or images
    model = timm.create_model(name, num_classes=10, **kwargs).train().to(memory_format=torch.channels_last)
    x = torch.randn(images, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (images,))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(args.warmup + args.steps):
        start = int(model.sample_step) if isinstance(model, Supernet) else 0
        for side in turns(SIDES, index):
            if isinstance(model, Supernet):
                model._step = start  # the same arch for both
            use_cpu_kernels(side == 'kernels')
            duration, _ = timed(partial(step, model, x, target), device)
            if index >= args.warmup:
                seconds[side].append(duration)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    names = [name for name, *_ in MODELS]
    parser.add_argument('--models', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--steps', type=int, default=10, metavar='N', help='timed steps of each side (default: 10)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='steps before those (default: 2)')
    parser.add_argument('--img-size', type=int, metavar='N', help="pixels (default: the model's own)")
    parser.add_argument('--batch-size', type=int, metavar='N', help="images per step (default: the model's own)")
    args = parser.parse_args()
    device = setup(args, 'Training steps on a CPU, gradients of torch / of --cpu-kernels')
    use_cpu_kernels()
    before = {name: measure(name, args, device) for name in args.models}
    kept = keep_freed_memory()
    after = {name: measure(name, args, device) for name in args.models} if kept else before
    check(cpu_kernel_calls() > 0, f'the kernels computed {cpu_kernel_calls()} gradients')
    rows = []
    for name in args.models:
        sides = [before[name]['torch'], before[name]['kernels'], after[name]['torch'], after[name]['kernels']]
        medians = [statistics.median(side) for side in sides]
        rows.append(
            [
                name,
                *(f'{m * 1e3:.0f}' for m in medians),
                median_range(a / b for a, b in zip(before[name]['torch'], before[name]['kernels'])),
                f'{medians[0] / medians[3]:.2f}',
            ]
        )
    header = [
        f'n = {args.steps} steps, ms',
        'torch',
        'kernels',
        'torch, kept',
        'kernels, kept',
        'kernels per step',
        'both',
    ]
    print_table(header, rows)


if __name__ == '__main__':
    main()
