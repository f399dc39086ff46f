"""What the benchmarks share: options, description of the machine, clock, table."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import timm
import torch
from torch import nn

import timm_mixpath
from timm_mixpath.models.runtimes import describe_device

__all__ = ['add_common_args', 'check', 'median_range', 'perturb_norms', 'print_table', 'setup', 'timed', 'turns']


def add_common_args(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='device to measure on (default: cpu)')
    parser.add_argument('--threads', type=int, metavar='N', help="CPU threads of torch (default: torch's choice)")
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='seed of weights, data and archs (default: 0)')


def setup(args: argparse.Namespace, title: str) -> torch.device:
    """Set threads and seed, print what is measured and on what, and return the device."""
    device = torch.device(args.device)
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            sys.exit('--device cuda: there is no GPU here')
        torch.backends.cuda.matmul.allow_tf32 = True  # both as `timm-mixpath train` sets them
        torch.backends.cudnn.benchmark = True
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(title)
    rows = [
        ('CPU', f'{describe_device("cpu")}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads'),
        ('GPU', f'{_gpu()}{"" if device.type == "cuda" else ", not used"}'),
        ('load', f'{_load()} (1-minute average before the start; above 0 others share the cores)'),
        (
            'versions',
            f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, '
            f'timm-mixpath {timm_mixpath.__version__}, {platform.system()}',
        ),
        ('options', ', '.join(f'{k}={v}' for k, v in vars(args).items() if v is not None and v is not False)),
    ]
    for name, value in rows:
        print(f'  {name:<9} {value}')
    print(flush=True)
    return device


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'


def _load() -> str:
    return f'{os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else 'unknown'


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return how long a call takes in seconds, until the device is done, and what it returns."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def turns(sides: Sequence[str], repetition: int) -> list[str]:
    """Return the order in which the sides take their turn: it rotates, so that none is always the one after another."""
    shift = repetition % len(sides)
    return [*sides[shift:], *sides[:shift]]


def perturb_norms(model: nn.Module, seed: int) -> None:
    """Give every batch norm statistics and affine parameters of its own, so that taking a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -0.5),
            ):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))


def check(condition: bool, what: str) -> None:
    """Print that a check passed, or end the benchmark with status 1."""
    if not condition:
        sys.exit(f'CHECK FAILED: {what}')
    print(f'check passed: {what}', flush=True)


def median_range(values: Iterable[float]) -> str:
    """Format median and range of ratios."""
    values = list(values)
    return f'{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print an aligned table, names to the left and numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print()
    for index, row in enumerate(table):
        print('  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))
        if index == 0:
            print('  '.join('-' * w for w in widths))
    print(flush=True)
