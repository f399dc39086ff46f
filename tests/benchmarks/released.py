"""The S1 supernet against the code that the paper's authors released, which this package holds nothing of.

    git clone https://github.com/xiaomi-automl/MixPath
    python tests/benchmarks/released.py --clone MixPath --threads 2

A checkpoint of theirs, with weights and statistics at random, is loaded into `mixpath_s1_supernet` by the package's
loader; outputs in eval mode in float64 must be equal to the bit, for every one of 100 archs. Then both train: forward,
cross-entropy, backward, SGD with momentum on images of 32x32 pixels, the same archs on the same images in turns, on
their side as their script does, on ours as `timm-mixpath train --channels-last --cpu-kernels`. Freed memory is kept on
both sides, as in `timm-mixpath train`; `--plain-memory` leaves it to the allocator, as in their script. Ratios are
theirs / ours.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import add_common_args, check, median_range, perturb_norms, print_table, setup, timed, turns
from torch import nn

from timm_mixpath import SupernetTask, get_space, sample
from timm_mixpath.models.cpu_kernels import use_cpu_kernels
from timm_mixpath.utils.memory import keep_freed_memory

NUM_CLASSES = 10
NUM_ARCHS = 100


def load(clone: Path) -> ModuleType:
    path = clone / 'S1' / 'model_search.py'
    if not path.is_file():
        sys.exit(f'--clone {str(clone)!r} holds no {path.relative_to(clone)}, it is a clone of xiaomi-automl/MixPath')
    spec = importlib.util.spec_from_file_location('released_model_search', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_choice(arch: Any) -> dict[int, dict[str, Any]]:
    """An arch as their network takes it: indices of kernels and of the expansion, by block."""
    spec = get_space('s1').blocks[0]
    return {
        i: {
            'conv': [spec.kernel_sizes.index(kernel) for kernel in choice.groups[0]],
            'rate': sorted(spec.expand_ratios).index(choice.expand_ratio),
        }
        for i, choice in enumerate(arch.blocks)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--clone', type=Path, required=True, metavar='DIR', help='clone of xiaomi-automl/MixPath')
    parser.add_argument('--steps', type=int, default=12, metavar='N', help='timed steps (default: 12)')
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='images per step (default: 32)')
    parser.add_argument('--plain-memory', action='store_true', help='do not keep freed memory, on neither side')
    args = parser.parse_args()
    device = setup(args, "S1 supernet, m = 4: the package against the authors' released code")
    if not args.plain_memory:
        keep_freed_memory()

    theirs = load(args.clone).SuperNetwork(shadow_bn=True, layers=12, classes=NUM_CLASSES)
    perturb_norms(theirs, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), f'{folder}/theirs.pt')
        ours = timm.create_model(
            'mixpath_s1_supernet', m=4, num_classes=NUM_CLASSES, seed=args.seed, checkpoint_path=f'{folder}/theirs.pt'
        )
    for model in (theirs, ours):
        model.double().eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    is_equal = True
    with torch.no_grad():
        for step in range(NUM_ARCHS):
            ours.active_arch = arch = sample(ours.space, seed=args.seed + 1, step=step)
            is_equal &= torch.equal(ours(x), theirs(x, their_choice(arch)))
    check(is_equal, f'outputs of {NUM_ARCHS} archs are equal to the bit in float64')

    theirs, ours = theirs.float().to(device).train(), ours.float().to(device, memory_format=torch.channels_last).train()
    task = SupernetTask(ours, nn.CrossEntropyLoss(), device=device, verbose=False)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-4) for model in (theirs, ours)
    ]
    x = torch.randn(args.batch_size, 3, 32, 32, device=device)
    target = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)

    def their_step(choice: dict[int, dict[str, Any]]) -> None:
        optimizers[0].zero_grad()
        F.cross_entropy(theirs(x, choice), target).backward()
        optimizers[0].step()

    def our_step() -> None:
        optimizers[1].zero_grad()
        task(x.contiguous(memory_format=torch.channels_last), target)['loss'].backward()
        optimizers[1].step()

    seconds: list[tuple[float, float]] = []
    for step in range(2 + args.steps):
        choice = their_choice(sample(ours.space, seed=args.seed, step=step))
        took: dict[str, float] = {}
        for side in turns(('theirs', 'ours'), step):
            use_cpu_kernels(side == 'ours' and device.type == 'cpu')
            took[side], _ = timed(our_step if side == 'ours' else lambda choice=choice: their_step(choice), device)
        if step >= 2:
            seconds.append((took['theirs'], took['ours']))
    medians = [statistics.median(column) for column in zip(*seconds)]
    print_table(
        ['', 'theirs', 'ours', 'ratio', 'ratio per step'],
        [
            [
                'step (s)',
                *(f'{m:.3f}' for m in medians),
                f'{medians[0] / medians[1]:.2f}',
                median_range(a / b for a, b in seconds),
            ]
        ],
    )


if __name__ == '__main__':
    main()
