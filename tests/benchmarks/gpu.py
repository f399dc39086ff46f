"""The first ten minutes on a card: what a training step and a search cost there, in one table.

    python tests/benchmarks/gpu.py --csv gpu.csv

Training steps (forward, backward, clip, momentum SGD) of the supernets and of two networks, in float32, bfloat16 and
float16, in both memory formats; a step with DDP and with this package's reduction, in a process group of one process;
archs per second of a search, with and without recalibration; with `--compile`, steps under torch.compile. A supernet
runs another arch in every step. Every measurement lasts `--seconds`, behind warm-up steps in which cuDNN tries its
algorithms. The time of a profile by operators goes to `--profile`. With `--device cpu` it runs without a card, to try
the script.
"""

import argparse
import copy
import csv
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import add_common_args, print_table, setup
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from timm_mixpath import Supernet, sample
from timm_mixpath.models.compiled import CompiledRegions
from timm_mixpath.search.accuracy import SupernetEvaluator
from timm_mixpath.train.data_parallel import SampledDataParallel

SMALL = 'nano supernet'  # to try the script
# Name, arguments, pixels, images per step on a card
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    'S1 supernet': ('mixpath_s1_supernet', dict(m=4), 32, 96),
    'S2 supernet': ('mixpath_s2_supernet', {}, 224, 128),
    'S3 supernet': ('mixpath_s3_supernet', {}, 224, 128),
    'nb201 supernet': ('mixpath_nb201_supernet', {}, 32, 256),
    SMALL: ('mixpath_nano_supernet', {}, 32, 256),
    'supernet of efficientnet_b0': ('mixpath_supernet', dict(backbone='efficientnet_b0'), 224, 128),
    'mixpath_a': ('mixpath_a', {}, 224, 128),
    'mixnet_m': ('mixnet_m', {}, 224, 128),
}
IN_PARALLEL = ('S1 supernet', 'S2 supernet', 'S3 supernet', SMALL)
FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
COLUMNS = ('what', 'model', 'dtype', 'format', 'per_s', 'unit', 'peak_mib')


class Training:
    """A model that is trained on random images."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, memory_format: torch.memory_format):
        model, kwargs, pixels, images = MODELS[name]
        self.images, pixels = args.batch_size or images, args.img_size or pixels
        self.model = timm.create_model(model, num_classes=args.num_classes, **kwargs).train()
        self.model.to(device=device, memory_format=memory_format)
        self.wrapped: nn.Module = self.model
        self.x = torch.randn(self.images, 3, pixels, pixels, device=device).contiguous(memory_format=memory_format)
        self.target = torch.randint(args.num_classes, (self.images,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step(self, autocast: Callable[[], Any], scaler: torch.amp.GradScaler | None) -> None:
        with autocast():
            loss = F.cross_entropy(self.wrapped(self.x), self.target)
        self.optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            return
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        scaler.step(self.optimizer)
        scaler.update()


def rate(call: Callable[[], None], args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Calls per second, and the peak of memory in MiB (0 on a CPU)."""

    def wait() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    for _ in range(args.warmup):
        call()
    wait()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        call()
        count += 1
        if count % 4 == 0:
            wait()  # or the queue would run ahead of the clock
    wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == 'cuda' else 0.0
    return count / seconds, peak


def precision(dtype: torch.dtype | None, device: torch.device) -> tuple[Callable[[], Any], torch.amp.GradScaler | None]:
    if dtype is None:
        return nullcontext, None
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    return partial(torch.autocast, device_type=device.type, dtype=dtype), scaler


def trainings(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    for name, (dtype_name, dtype), (format_name, memory_format) in itertools.product(
        args.models, DTYPES.items(), FORMATS.items()
    ):
        training = Training(name, args, device, memory_format)
        steps, peak = rate(partial(training.step, *precision(dtype, device)), args, device)
        yield 'training', name, dtype_name, format_name, steps * training.images, 'images', peak


def compiled(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    for name in args.compile:
        training = Training(name, args, device, torch.channels_last)
        autocast, scaler = precision(torch.bfloat16, device)
        start = time.perf_counter()
        if isinstance(training.model, Supernet):
            regions = CompiledRegions(training.model, args.backend)
            with autocast():
                regions.warm_up(training.x)
            print(f'{name}: {regions.num_graphs} graphs in {time.perf_counter() - start:.0f} s', flush=True)
        else:
            training.wrapped = torch.compile(training.model, backend=args.backend)
        steps, peak = rate(partial(training.step, autocast, scaler), args, device)
        yield 'training, compiled', name, 'bfloat16', 'channels_last', steps * training.images, 'images', peak


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, init_method=f'file://{folder}/store', rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def parallel(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    wraps = {
        'training, DDP': lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        'training, reduced at once': SampledDataParallel,
    }
    with process_group(device):
        for name, (what, wrap) in itertools.product(args.models, wraps.items()):
            if name not in IN_PARALLEL:
                continue
            training = Training(name, args, device, torch.channels_last)
            training.wrapped = wrap(training.model)
            steps, peak = rate(partial(training.step, *precision(torch.bfloat16, device)), args, device)
            yield what, name, 'bfloat16', 'channels_last', steps * training.images, 'images', peak


def searches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    for name, (dtype_name, dtype), recalibrated in itertools.product(args.models, DTYPES.items(), (False, True)):
        training = Training(name, args, device, torch.channels_last)
        if not isinstance(training.model, Supernet) or dtype_name == 'float16':
            continue
        batches = [(training.x, training.target)] * 2
        evaluator = SupernetEvaluator(
            copy.deepcopy(training.model).eval(), batches, batches if recalibrated else None,
            autocast=precision(dtype, device)[0],
        )  # fmt: skip
        archs = (sample(evaluator.supernet.space, seed=0, step=step) for step in itertools.count())
        per_second, peak = rate(lambda evaluator=evaluator, archs=archs: evaluator(next(archs)), args, device)
        what = f'scoring on {2 * training.images} images' + (', recalibrated with as many' if recalibrated else '')
        yield what, name, dtype_name, 'channels_last', per_second, 'archs', peak


def write_profile(path: str, args: argparse.Namespace, device: torch.device) -> None:
    """Write the time by operator of one step of every model, in channels_last and, on a card, in bfloat16.

    A CPU computes a grouped convolution of bfloat16 group by group: 400,000 events, which take a minute to add up.
    """
    dtype = torch.bfloat16 if device.type == 'cuda' else None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == 'cuda' else [])]
    sort = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    parts: list[str] = []
    for name in args.models:
        training = Training(name, args, device, torch.channels_last)
        call = partial(training.step, *precision(dtype, device))
        for _ in range(args.warmup):
            call()
        with profile(activities=activities) as profiler:
            call()
        parts.append(f'{name}\n{profiler.key_averages().table(sort_by=sort, row_limit=25)}')
    Path(path).write_text('\n'.join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.set_defaults(device='cuda')
    add = parser.add_argument
    add('--models', nargs='+', choices=list(MODELS), default=[name for name in MODELS if name != SMALL], metavar='NAME',
        help=f'{", ".join(MODELS)} (default: all but {SMALL})')  # fmt: skip
    add('--compile', nargs='+', choices=list(MODELS), default=[], metavar='NAME',
        help='compile these too; a supernet takes minutes')  # fmt: skip
    add('--backend', default='inductor', metavar='NAME', help='backend of torch.compile (default: inductor)')
    add('--seconds', type=float, default=2.0, metavar='S', help='length of a measurement (default: 2)')
    add('--warmup', type=int, default=8, metavar='N', help='steps before it (default: 8)')
    add('--batch-size', type=int, metavar='N', help="images per step (default: the recipe's)")
    add('--img-size', type=int, metavar='N', help="pixels (default: the recipe's)")
    add('--num-classes', type=int, default=1000, metavar='N', help='(default: 1000)')
    add('--csv', metavar='FILE', help='write the table to a file, too')
    add('--profile', metavar='FILE', help='write the time by operator of a step of every model')
    args = parser.parse_args()
    device = setup(args, 'Training steps and searches on a device')
    rows: list[tuple] = []
    for row in itertools.chain(
        trainings(args, device), parallel(args, device), searches(args, device), compiled(args, device)
    ):
        rows.append(row)
        print(f'{row[0]:45} {row[1]:28} {row[2]:9} {row[3]:14} {row[4]:10.1f} {row[5]}/s {row[6]:8.0f} MiB', flush=True)
        if args.csv:  # after every row: whatever ends the script, what was measured is kept
            with open(args.csv, 'w', newline='') as file:
                csv.writer(file).writerows([COLUMNS, *rows])
    if args.profile:
        write_profile(args.profile, args, device)
    print_table(COLUMNS, [[*row[:4], f'{row[4]:.1f}', row[5], f'{row[6]:.0f}'] for row in rows])


if __name__ == '__main__':
    main()
