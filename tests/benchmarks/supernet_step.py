"""One training step of the S1 supernet: the package against a plain reference.

    python tests/benchmarks/supernet_step.py [--batch-size 32] [--steps 30] [--m 4] [--threads N] [--device cuda]

What is compared: forward, cross-entropy, backward, and SGD (momentum 0.9, weight decay 3e-4, no clipping) on images of
32x32 pixels in 10 classes.

- ours: `mixpath_s1_supernet` in `SupernetTask`, as `timm-mixpath train --channels-last` runs it. Sampling the arch,
  clearing the gradients and converting the input to channels-last are part of the step.
- plain: `PlainSupernet` below, written from the description of the space the way one would at first: a ModuleList of
  depthwise conv-BN-ReLU6 paths, `sum()` over their outputs, a list of m batch norms behind the projection, torch's
  default memory format.
- plain, channels-last: the same in the channels-last format. It tells what of the difference the memory format makes
  and what the package's own code.

All have the same weights and run the same archs on the same images, taking turns step by step within one process.

Before that the gradients are compared. Parameters without one must be the same, the others must agree
- in float64, ours with plain as they are timed, on `--check-batch-size` images;
- in float32, ours with plain in the same memory format (on a GPU printed only, cuDNN may choose other algorithms).
In float32 another memory format rounds otherwise, and where that crosses a kink of ReLU6 a gradient jumps; the line
"for information" shows how far that takes either format from float64.

How to read it: ratios are side / ours, above 1 ours is faster or smaller. "per step" is the median of the ratios of
single steps with their range; archs differ in cost, which cancels there. Memory is the peak of a process per side
over the first 10 archs, less what it had before the model was made: weights, gradients, momentum, activations.
Half of a step on a CPU is spent in oneDNN's weight gradients of large depthwise kernels (`--profile`), which
`--cpu-kernels` replaces on our side. Freed memory is kept on all sides, as in `timm-mixpath train`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import add_common_args, check, median_range, print_table, setup, timed, turns
from torch.profiler import ProfilerActivity, profile

from timm_mixpath import Arch, SearchSpace, SupernetTask, get_space, sample
from timm_mixpath.models.cpu_kernels import cpu_kernel_calls, use_cpu_kernels
from timm_mixpath.utils.memory import keep_freed_memory

SIDES = ('ours', 'plain', 'plain, channels-last')
CHANNELS = (48, 48, 96, 96, 96, 192, 192, 192, 256, 256, 320, 320)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1)
EXPANSIONS = (3, 6)
KERNELS = (3, 5, 7, 9)
NUM_CLASSES = 10
MEMORY_STEPS = 10
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of a gradient, relative to the largest one of its tensor


# The plain reference


def conv_bn_relu6(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_chs),
        nn.ReLU6(inplace=True),
    )


class PlainBlock(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, stride: int, m: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_chs == out_chs
        self.expand = nn.ModuleList()
        self.paths = nn.ModuleList()
        self.project = nn.ModuleList()
        self.norms = nn.ModuleList()
        for e in EXPANSIONS:
            mid_chs = in_chs * e
            self.expand.append(conv_bn_relu6(in_chs, mid_chs, 1))
            self.paths.append(nn.ModuleList([conv_bn_relu6(mid_chs, mid_chs, k, stride, mid_chs) for k in KERNELS]))
            self.project.append(nn.Conv2d(mid_chs, out_chs, 1, bias=False))
            self.norms.append(nn.ModuleList([nn.BatchNorm2d(out_chs) for _ in range(m)]))

    def forward(self, x: torch.Tensor, expansion: int, kernels: list[int]) -> torch.Tensor:
        y = self.expand[expansion](x)
        y = sum(self.paths[expansion][k](y) for k in kernels)
        y = self.norms[expansion][len(kernels) - 1](self.project[expansion](y))
        return x + y if self.residual else y


class PlainSupernet(nn.Module):
    def __init__(self, m: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu6(3, 32, 3)
        self.blocks = nn.ModuleList(
            [PlainBlock(i, o, s, m) for i, o, s in zip((32, *CHANNELS[:-1]), CHANNELS, STRIDES)]
        )
        self.head = conv_bn_relu6(CHANNELS[-1], 1280, 1)
        self.classifier = nn.Linear(1280, NUM_CLASSES)

    def forward(self, x: torch.Tensor, arch: Arch) -> torch.Tensor:
        x = self.stem(x)
        for block, choice in zip(self.blocks, arch.blocks):
            kernels = [KERNELS.index(k) for k in choice.groups[0]]
            x = block(x, EXPANSIONS.index(choice.expand_ratio), kernels)
        x = self.head(x).mean((2, 3))
        return self.classifier(x)


def plain_key(key: str, space: SearchSpace) -> str:
    """Translate a key of our state dict to the plain one's."""
    block = re.fullmatch(r'blocks\.(\d+)\.(\d+)\.e(\d+)\.(.+)', key)
    if not block:
        for ours, plain in (('conv_stem', 'stem.0'), ('bn1', 'stem.1'), ('conv_head', 'head.0'), ('bn2', 'head.1')):
            key = re.sub(rf'^{ours}\b', plain, key)
        return key
    stage, position, expansion, rest = block.groups()
    index = sum(len(s) for s in space.stages[: int(stage)]) + int(position)
    e = EXPANSIONS.index(int(expansion))
    rest = re.sub(r'^conv_pw\b', f'expand.{e}.0', rest)
    rest = re.sub(r'^bn1\b', f'expand.{e}.1', rest)
    rest = re.sub(r'^paths\.k(\d+)\.', lambda match: f'paths.{e}.{KERNELS.index(int(match[1]))}.', rest)
    rest = re.sub(rf'^(paths\.{e}\.\d)\.conv\b', r'\1.0', rest)
    rest = re.sub(rf'^(paths\.{e}\.\d)\.bn\b', r'\1.1', rest)
    rest = re.sub(r'^conv_pwl\b', f'project.{e}', rest)
    rest = re.sub(r'^bn3\.shadows\b', f'norms.{e}', rest)
    return f'blocks.{index}.{rest}'


# The two sides


class Ours:
    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.model = timm.create_model('mixpath_s1_supernet', m=args.m, seed=args.seed, num_classes=NUM_CLASSES)
        self.model.to(device=device).to(memory_format=torch.channels_last)
        self.task = SupernetTask(self.model, nn.CrossEntropyLoss(), device=device, verbose=False)
        self.model.train()
        self.optimizer = make_optimizer(self.model)

    def loss(self, x: torch.Tensor, target: torch.Tensor, step: int) -> torch.Tensor:
        # The supernet samples the arch of the step by itself: every step is run once and in order
        assert int(self.model.sample_step) == step
        return self.task(x.contiguous(memory_format=torch.channels_last), target)['loss']


class Plain:
    def __init__(self, args: argparse.Namespace, device: torch.device, memory_format: torch.memory_format) -> None:
        torch.manual_seed(args.seed)
        self.model = PlainSupernet(args.m).to(device=device).to(memory_format=memory_format)
        self.model.train()
        self.optimizer = make_optimizer(self.model)
        self.memory_format = memory_format
        self.space, self.seed = get_space('s1', args.m), args.seed

    def loss(self, x: torch.Tensor, target: torch.Tensor, step: int) -> torch.Tensor:
        arch = sample(self.space, seed=self.seed, step=step)
        return F.cross_entropy(self.model(x.contiguous(memory_format=self.memory_format), arch), target)


def make_side(name: str, args: argparse.Namespace, device: torch.device) -> Ours | Plain:
    if name == 'ours':
        return Ours(args, device)
    return Plain(args, device, torch.channels_last if 'channels-last' in name else torch.contiguous_format)


def make_sides(args: argparse.Namespace, device: torch.device) -> dict[str, Ours | Plain]:
    """All sides, with the same weights."""
    sides = {name: make_side(name, args, device) for name in SIDES}
    ours = sides['ours'].model
    weights = {plain_key(k, ours.space): v for k, v in ours.state_dict().items() if k != 'sample_step'}
    for name in SIDES[1:]:
        sides[name].model.load_state_dict(weights, strict=True)
    return sides


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)


def train_step(side: Ours | Plain, x: torch.Tensor, target: torch.Tensor, step: int) -> torch.Tensor:
    loss = side.loss(x, target, step)
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad()
    return loss.detach()


def make_batch(args: argparse.Namespace, device: torch.device, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)  # (B, 3, H, W)
    target = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)
    return x.to(device), target.to(device)


# What is measured


Gradients = dict[str, torch.Tensor | None]


def gradients(
    side: Ours | Plain, args: argparse.Namespace, device: torch.device, step: int, dtype: torch.dtype
) -> tuple[float, Gradients]:
    """Return the loss and the gradients of a step by the plain side's names."""
    x, target = make_batch(args, device, step)
    loss = side.loss(x.to(dtype), target, step)
    loss.backward()
    name = partial(plain_key, space=side.model.space) if isinstance(side, Ours) else str
    grads = {name(key): p.grad for key, p in side.model.named_parameters()}
    side.optimizer.zero_grad()
    return loss.item(), grads


def largest_error(actual: Gradients, expected: Gradients) -> float:
    """Return the largest error of a gradient, relative to the largest gradient of its tensor."""
    errors = []
    for name, grad in expected.items():
        if grad is None:
            continue
        scale = grad.abs().max()
        if 'norms' in name and name.endswith('bias'):
            # The next batch norm takes this bias off again: its true gradient is 0, so the scale is its weight's
            scale = torch.maximum(scale, expected[name.replace('bias', 'weight')].abs().max())
        errors.append((actual[name].double() - grad.double()).abs().max() / scale)
    return torch.stack(errors).max().item()  # max keeps NaN


def check_gradients(args: argparse.Namespace, device: torch.device) -> None:
    """Compare loss and gradients of the sides in every arch of the check, from the same weights."""
    args = argparse.Namespace(**{**vars(args), 'batch_size': args.check_batch_size})
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    num_threads = torch.get_num_threads()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)  # float64 depthwise convolutions get slower by threads
    losses: list[float] = []
    errors: dict[str, list[float]] = {'float64': [], 'same format': [], 'ours': [], 'plain': []}
    num_grads = num_none = 0
    sides = {torch.float32: make_sides(args, device), torch.float64: make_sides(args, device)}
    del sides[torch.float64][SIDES[2]]
    for side in sides[torch.float64].values():
        side.model.double()
    for step in range(args.check_steps):
        results = {
            (name, dtype): gradients(side, args, device, step, dtype)
            for dtype, by_name in sides.items()
            for name, side in by_name.items()
        }
        without = [{name for name, grad in grads.items() if grad is None} for _, grads in results.values()]
        if any(names != without[0] for names in without):
            check(False, f'parameters without a gradient agree in step {step}')
        num_none += len(without[0])
        num_grads += len(results['ours', torch.float32][1]) - len(without[0])
        exact_loss, exact = results['plain', torch.float64]
        losses.append(abs(results['ours', torch.float64][0] / exact_loss - 1))
        errors['float64'].append(largest_error(results['ours', torch.float64][1], exact))
        errors['same format'].append(
            largest_error(results['ours', torch.float32][1], results[SIDES[2], torch.float32][1])
        )
        for name in ('ours', 'plain'):
            errors[name].append(largest_error(results[name, torch.float32][1], exact))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.set_num_threads(num_threads)

    error64, error32 = max(errors['float64']), max(errors['same format'])
    over = f'{num_grads} gradients of {args.check_steps} archs'
    check(
        max(losses) <= TOLERANCE[torch.float64] and error64 <= TOLERANCE[torch.float64],
        f'float64, {over}: largest relative error {error64:.1e}, loss {max(losses):.1e}; the same {num_none} are None',
    )
    if device.type == 'cpu':
        check(
            error32 <= TOLERANCE[torch.float32],
            f'float32, {over}, in the same memory format: largest relative error {error32:.1e}',
        )
    print(
        f'for information, largest relative error of float32 to float64: ours {max(errors["ours"]):.1e}, '
        f'plain {max(errors["plain"]):.1e}; in the same memory format to each other {error32:.1e}',
        flush=True,
    )


def measure_memory(args: argparse.Namespace) -> None:
    """Print one side's peak memory as JSON; this process does nothing else."""
    device = torch.device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    before = resident_bytes('VmRSS')
    side = make_side(args.memory_of, args, device)
    for step in range(min(args.steps, MEMORY_STEPS)):
        train_step(side, *make_batch(args, device, step), step)
    cuda = device.type == 'cuda'
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident_bytes('VmHWM') - before
    tensors = [*side.model.parameters(), *side.model.buffers()]
    tensors += [s['momentum_buffer'] for s in side.optimizer.state.values()]
    print(json.dumps(dict(peak=peak, state=sum(t.numel() * t.element_size() for t in tensors))))


def resident_bytes(field: str) -> int:
    """Return resident memory of this process, now (`VmRSS`) or at its peak (`VmHWM`)."""
    # On Linux getrusage's maxrss starts from the parent's, which is larger than a baseline must be
    status = Path('/proc/self/status')
    if status.exists():
        match = re.search(rf'^{field}:\s+(\d+) kB', status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def memory_in_subprocess(side: str) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:], '--memory-of', side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_profile(ours: Ours, args: argparse.Namespace, device: torch.device, step: int) -> None:
    cuda = device.type == 'cuda'
    x, target = make_batch(args, device, step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        train_step(ours, x, target, step)
    attribute = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    events = sorted(profiler.key_averages(), key=lambda e: getattr(e, attribute), reverse=True)
    total = sum(getattr(e, attribute) for e in events)
    print(f'One step of ours, {total / 1e3:.1f} ms of self {"device" if cuda else "CPU"} time, arch of step {step}:')
    print_table(
        ('op', 'share', 'ms', 'calls'),
        [
            (e.key[:60], f'{getattr(e, attribute) / total:.1%}', f'{getattr(e, attribute) / 1e3:.2f}', str(e.count))
            for e in events[:12]
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='images per step (default: 32)')
    parser.add_argument('--img-size', type=int, default=32, metavar='N', help='image size in pixels (default: 32)')
    parser.add_argument('--steps', type=int, default=30, metavar='N', help='timed steps of each side (default: 30)')
    parser.add_argument('--warmup', type=int, metavar='N', help='steps before those (default: 5, CUDA: 40)')
    parser.add_argument('--check-steps', type=int, default=3, metavar='N', help='archs of the check (default: 3)')
    parser.add_argument('--check-batch-size', type=int, default=8, metavar='N', help='its images (default: 8)')
    parser.add_argument('--m', type=int, default=4, metavar='M', help='largest number of paths (default: 4)')
    parser.add_argument(
        '--cpu-kernels', action='store_true', help="ours uses this package's kernels, the others torch's"
    )
    parser.add_argument('--no-memory', action='store_true', help='leave the measurement of memory out')
    parser.add_argument('--profile', action='store_true', help='print the top 12 ops of one of our steps')
    parser.add_argument('--memory-of', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args)
        return

    if args.cpu_kernels:  # before the check of the gradients, which is of them, too
        use_cpu_kernels()
    device = setup(args, 'Training step of mixpath_s1_supernet, plain reference / timm-mixpath')
    check_gradients(args, device)

    if device.type == 'cpu':
        keep_freed_memory()
    sides = make_sides(args, device)
    # cuDNN tries its algorithms at the first sight of every convolution
    warmup = args.warmup if args.warmup is not None else 40 if device.type == 'cuda' else 5
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for step in range(warmup + args.steps):
        x, target = make_batch(args, device, step)
        for name in turns(SIDES, step):
            if args.cpu_kernels:
                use_cpu_kernels(name == 'ours')
            duration, loss = timed(partial(train_step, sides[name], x, target, step), device)
            if step >= warmup:
                seconds[name].append(duration)
            if not torch.isfinite(loss):
                check(False, f'the loss of {name} is finite in step {step}')
    if args.cpu_kernels:
        check(cpu_kernel_calls() > 0, f'the CPU kernels computed {cpu_kernel_calls()} gradients of ours')
        use_cpu_kernels()
    if args.profile:
        print_profile(sides['ours'], args, device, warmup + args.steps)

    memory = {} if args.no_memory else {name: memory_in_subprocess(name) for name in SIDES}
    medians = {name: statistics.median(seconds[name]) for name in SIDES}
    rows = []
    for name in SIDES:
        row = [
            name,
            f'{medians[name] * 1e3:.1f}',
            f'{args.batch_size / medians[name]:.1f}',
            f'{medians[name] / medians["ours"]:.2f}',
            median_range(side / ours for side, ours in zip(seconds[name], seconds['ours'])),
        ]
        if memory:
            peak, state = (memory[name][key] / 2**20 for key in ('peak', 'state'))
            row += [f'{peak:.0f}', f'{state:.0f}', f'{memory[name]["peak"] / memory["ours"]["peak"]:.2f}']
        rows.append(row)
    header = [f'n = {args.steps} steps a side', 'median ms', 'images/s', 'ratio', 'per step']
    print_table(header + ['peak MiB', 'weights+momentum', 'ratio'] * bool(memory), rows)


if __name__ == '__main__':
    main()
