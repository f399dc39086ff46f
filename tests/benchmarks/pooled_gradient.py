"""What a training step on a CPU gains where the gradient of what a network pools is laid out as that is.

    python tests/benchmarks/pooled_gradient.py --threads 1

The sides take their turn in every step, with the same weights, batch and arch, channels-last, with `--cpu-kernels` and
memory that is kept, as in `timm-mixpath train`. Before that their gradients are compared in float64.
"""

import argparse
import copy
import statistics
from functools import partial

import timm
import torch
import torch.nn.functional as F
from common import add_common_args, check, median_range, print_table, setup, timed, turns
from torch import nn

from timm_mixpath import Supernet
from timm_mixpath.models.cpu_kernels import use_cpu_kernels
from timm_mixpath.models.layers import keep_layout_of_gradient
from timm_mixpath.utils.memory import keep_freed_memory

# Label, name, arguments, pixels, images per step
MODELS = (
    ('S1 supernet, a quarter of the width', 'mixpath_s1_supernet', dict(m=4, width_mult=0.25), 32, 96),
    ('S1 supernet', 'mixpath_s1_supernet', dict(m=4), 32, 32),
    ('mixpath_nano', 'mixpath_nano', {}, 32, 128),
    ('efficientnet_lite0', 'tf_efficientnet_lite0', {}, 160, 32),
)
SIDES = ('as torch lays it out', 'as its input')


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    F.cross_entropy(model(x), target).backward()


def compare(models: dict[str, nn.Module], label: str) -> None:
    """Compare the gradients of one step in float64."""
    x, target = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    grads = []
    for model in models.values():
        double = copy.deepcopy(model).double()
        step(double, x.contiguous(memory_format=torch.channels_last), target)
        grads.append([p.grad for p in double.parameters() if p.grad is not None])
    same = all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(*grads, strict=True))
    check(same, f'{label}: the same {len(grads[0])} gradients')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--steps', type=int, default=10, metavar='N', help='timed steps of each side (default: 10)')
    args = parser.parse_args()
    device = setup(args, 'Training steps on a CPU, the gradient of what is pooled as torch lays it out / as its input')
    use_cpu_kernels()
    keep_freed_memory()
    rows = []
    for label, name, kwargs, pixels, images in MODELS:
        model = timm.create_model(name, num_classes=10, drop_rate=0.0, **kwargs).train()
        model.to(memory_format=torch.channels_last)
        models = dict(zip(SIDES, (model, copy.deepcopy(model))))
        keep_layout_of_gradient(models[SIDES[1]])
        compare(models, label)
        x = torch.randn(images, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
        target = torch.randint(10, (images,))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for index in range(args.steps + 2):
            for side in turns(SIDES, index):
                if isinstance(model, Supernet):
                    models[side]._step = index  # the same arch for both
                duration, _ = timed(partial(step, models[side], x, target), device)
                if index >= 2:
                    seconds[side].append(duration)
        medians = [f'{statistics.median(seconds[side]) * 1e3:.0f}' for side in SIDES]
        rows.append([label, *medians, median_range(a / b for a, b in zip(*seconds.values()))])
    print_table([f'n = {args.steps} steps, ms', *SIDES, 'per step'], rows)


if __name__ == '__main__':
    main()
