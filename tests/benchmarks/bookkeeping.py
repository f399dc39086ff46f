"""What the sampling of archs costs in the training of the S1 supernet, and what a cost look-up takes.

    python tests/benchmarks/bookkeeping.py [--repetitions 1000] [--rounds 10] [--batch-size 32] [--threads N]

What is compared: the bookkeeping of a training forward of `mixpath_s1_supernet` (m = 4: sample an arch, activate it,
count the step) against a whole training step (forward, cross-entropy, backward, SGD with momentum 0.9 and weight decay
3e-4) at batch 32 and 32x32 pixels, channels-last. A round repeats every part in a tight loop and runs one training
step, in which the bookkeeping is timed once more, so both sides alternate. The look-up of MACs and parameters belongs
to the search, not to training; it stands here because it has to be as cheap.

How to read it: "us" is the median over the rounds of the mean of a tight loop. "in a step" is what the same bookkeeping
takes inside a training step, where the convolutions have just emptied the processor's caches; the share in percent is
that divided by the step it was part of, median over the rounds.

Checked: the forward runs the arch that `timm_mixpath.sample` gives for its step, and the look-ups equal what the
stand-alone network has.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from common import add_common_args, check, print_table, setup, timed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mixpath import MixPathSupernet, sample
from timm_mixpath.models.cost import CostTable, cost_table

SAMPLE, ACTIVATE, COUNT = 'sample an arch', 'activate an arch', 'count the step'
BOOKKEEPING = 'sample, activate, count'
MACS_PARAMS = 'look up macs and params'


def make_parts(supernet: MixPathSupernet, table: CostTable, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed, each call with another arch."""
    space = supernet.space
    archs = [sample(space, seed=seed + 1, step=step) for step in range(256)]
    steps, turn_arch, turn_cost = itertools.count(), itertools.cycle(archs), itertools.cycle(archs)
    counter = torch.zeros((), dtype=torch.int64, device=supernet.sample_step.device)

    def look_up() -> tuple[int, int]:
        arch = next(turn_cost)
        return table.macs(arch), table.params(arch)

    return {
        SAMPLE: lambda: sample(space, seed=seed, step=next(steps)),
        ACTIVATE: lambda: supernet._activate(next(turn_arch)),
        COUNT: lambda: counter.add_(1),
        BOOKKEEPING: supernet._sample,
        MACS_PARAMS: look_up,
    }


def mean_seconds(function: Callable[[], object], repetitions: int) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        function()
    return (time.perf_counter() - start) / repetitions


class TimedSample:
    """Stands in for `supernet._sample` and keeps how long it took."""

    def __init__(self, supernet: MixPathSupernet) -> None:
        self.function = supernet._sample
        self.seconds = 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self.function()
        self.seconds = time.perf_counter() - start


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> None:
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def check_look_up(supernet: MixPathSupernet, table: CostTable, seed: int, num_archs: int = 2) -> None:
    for step in range(num_archs):
        arch = sample(supernet.space, seed=seed, step=step)
        network = supernet.extract(arch).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network(torch.zeros(1, *table.input_size, device=supernet.sample_step.device))
        expected = counter.get_total_flops() // 2, sum(p.numel() for p in network.parameters())
        for form in (arch, str(arch)):
            found = table.macs(form), table.params(form)
            if found != expected:
                check(False, f'look-up {found} equals {expected} of {arch}')
    check(True, f'look-ups of {num_archs} archs equal the MACs and parameters of the extracted networks')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='images per step (default: 32)')
    parser.add_argument('--img-size', type=int, default=32, metavar='N', help='image size in pixels (default: 32)')
    parser.add_argument(
        '--rounds', type=int, default=10, metavar='N', help='rounds, a training step each (default: 10)'
    )
    parser.add_argument('--repetitions', type=int, default=1000, metavar='N', help='calls per round (default: 1000)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='training steps before those (default: 2)')
    parser.add_argument('--m', type=int, default=4, metavar='M', help='largest number of paths (default: 4)')
    args = parser.parse_args()

    device = setup(args, 'Bookkeeping of mixpath_s1_supernet / its training step')
    supernet = timm.create_model('mixpath_s1_supernet', m=args.m, seed=args.seed, num_classes=10)
    supernet.to(device=device).to(memory_format=torch.channels_last)
    table = cost_table(supernet)
    check_look_up(supernet, table, args.seed)

    supernet.train()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)  # (B, 3, H, W)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (args.batch_size,), generator=generator).to(device)

    parts = make_parts(supernet, table, args.seed)
    supernet._sample = timed_sample = TimedSample(supernet)
    step = partial(train_step, supernet, optimizer, x, target)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    step_seconds: list[float] = []
    in_step: list[float] = []
    for index in range(args.warmup + args.rounds):
        if index >= args.warmup:
            for name, function in parts.items():
                seconds[name].append(mean_seconds(function, args.repetitions))
        expected = sample(supernet.space, seed=args.seed, step=int(supernet.sample_step))
        duration, _ = timed(step, device)
        if supernet.sampled_arch != expected:
            check(False, f'training step {index} ran {supernet.sampled_arch}, sampled is {expected}')
        if index >= args.warmup:
            step_seconds.append(duration)
            in_step.append(timed_sample.seconds)
    check(True, f'{args.warmup + args.rounds} training steps ran the archs that sample() gives')

    step_median = statistics.median(step_seconds)
    share = statistics.median(a / b for a, b in zip(in_step, step_seconds))
    rows = [(name, f'{statistics.median(seconds[name]) * 1e6:.1f}', '') for name in parts]
    rows += [
        (f'{BOOKKEEPING}, in a step', f'{statistics.median(in_step) * 1e6:.1f}', f'{share:.4%}'),
        (f'training step, batch {args.batch_size}', f'{step_median * 1e6:.0f}', '100%'),
    ]
    print_table((f'n = {args.rounds} x {args.repetitions} calls, {args.rounds} steps', 'us', 'share of a step'), rows)


if __name__ == '__main__':
    main()
