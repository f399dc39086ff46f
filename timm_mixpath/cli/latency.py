"""The command latency."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from ..analysis.latency import LatencyConfig, compare_prediction, measure_table
from ..analysis.rank_statistics import require_scipy
from ..models.cost import cost_table
from ..models.latency_table import MIN_TAU, LatencyTable, measure_archs
from ..models.runtimes import RUNTIMES, describe_device
from ..models.supernet import Supernet
from ..train.checkpoint import load_supernet, resolve_data
from ..utils.errors import UsageError, as_usage_error
from ..utils.numbers import parse_count
from ..utils.tables import format_size, format_table
from .common import add_model_options, create_supernet, like, setup_logging

__all__ = ['add_latency', 'run_latency']


def add_latency(parser: argparse.ArgumentParser) -> None:
    default = LatencyConfig()
    add = parser.add_argument
    add('--checkpoint', metavar='PATH', help='last.pth.tar of a supernet, a model folder, or hf-hub:ORG/NAME; '
        '--model NAME in its place needs no weights')  # fmt: skip
    add_model_options(parser, 'the supernet, without a checkpoint')
    add('--output', metavar='FILE', help='JSON file for the table; the same command goes on with what was cut off')
    add('--num-classes', type=int, metavar='N', help='(default: as in the training)')
    add('--input-size', nargs=3, type=int, metavar='N', help='channels, height, width (default: as in the training)')

    add = parser.add_argument_group('what is measured').add_argument
    add('--runtime', choices=RUNTIMES,
        help='torch: eager, batch norms folded; compile: that under torch.compile (default: torch)')  # fmt: skip
    add('--threads', type=int, metavar='N', help="CPU threads (default: torch's)")
    add('-b', '--batch-size', type=int, metavar='N', help='images per batch (default: 1)')
    add('--device', metavar='NAME', help='default: cuda if there is a GPU, else cpu')
    add('--num-archs', type=parse_count, metavar='N',
        help=f'networks to fit the table to (default: {default.num_archs})')  # fmt: skip
    add('--test-archs', type=parse_count, metavar='N',
        help=f'unseen networks to test it with (default: {default.test_archs})')  # fmt: skip
    add('--rounds', type=int, metavar='N', help=f'visits of each (default: {default.rounds})')
    add('--seed', type=int)

    add = parser.add_argument_group('measure archs, beside what a table predicts').add_argument
    add('--archs', nargs='+', metavar='ARCH',
        help='archs, or the front.json of a search; they are measured as those of the table were')  # fmt: skip
    add('--latency-table', metavar='FILE', help='a table of this supernet')


def run_latency(args: argparse.Namespace) -> None:
    setup_logging()
    if bool(args.archs) != bool(args.latency_table):
        raise UsageError('--archs and --latency-table go together: archs to measure, and the table that predicts them')
    if bool(args.archs) == bool(args.output):
        raise UsageError('pass either --output FILE for a table, or --archs and --latency-table to measure archs')
    if args.output:
        _measure_table(args)
        return
    for name in _OF_A_TABLE:
        if (value := getattr(args, name)) is not None:
            shown = ' '.join(map(str, value)) if isinstance(value, list) else value
            raise UsageError(
                f'--{name.replace("_", "-")} {shown} has no effect on --archs, which are measured as those of the '
                'table were; leave it out'
            )
    table = LatencyTable.load(args.latency_table)
    args.num_classes, args.input_size = table.num_classes, table.input_size
    supernet, _ = _supernet(args)
    _measure(supernet, _archs(args.archs, supernet), table, args.device)


# What a table decides where archs are measured beside it
_OF_A_TABLE = (
    'num_classes', 'input_size', 'runtime', 'threads', 'batch_size', 'num_archs', 'test_archs', 'rounds', 'seed',
)  # fmt: skip


def _measure_table(args: argparse.Namespace) -> None:
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(LatencyConfig)}
    config = LatencyConfig(**{name: value for name, value in given.items() if value is not None})
    supernet, input_size = _supernet(args)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with as_usage_error(f'--device {device!r} can not be used'):
        supernet = supernet.to(device)
    table = measure_table(supernet, args.output, config, input_size=input_size)
    test, repeats = table.test, table.test['repeats']
    rows = [
        ('', 'tau', 'mean error', 'largest error'),
        ('this table', f'{test["tau"]:.3f}', f'{test["mean_error"]:.1%}', f'{test["max_error"]:.1%}'),
        (
            'measured again',
            f'{repeats["tau"]:.3f}',
            f'{repeats["mean_error"]:.1%}',
            f'{repeats["max_error"]:.1%}',
        ),
        ('counting MACs', f'{test["tau_of_macs"]:.3f}', '', ''),
    ]
    print(f'{table.space}, {format_size(table.input_size)}: {table.describe()}')
    print(f'{test["num_archs"]} networks that the table has not seen, measured end to end:\n')
    print(format_table(rows, '<>'))
    times = [row['latency_ms'] for row in table.measured]
    print(
        f'\nmeasured networks take {min(times):.2f} to {max(times):.2f} ms; the speed of the machine varied by a '
        f'factor of {table.protocol["drift"]:.2f} in between, which was taken out\nthe table is in {args.output}'
    )
    if not test['tau'] >= MIN_TAU:
        print(
            f'\nThis table is too poor to search by (tau below {MIN_TAU}): measure on an idle machine, or with more '
            '--num-archs and --rounds'
        )


def _supernet(args: argparse.Namespace) -> tuple[Supernet, tuple[int, int, int] | None]:
    input_size = tuple(args.input_size) if args.input_size else None
    if args.checkpoint:
        loaded = load_supernet(args.checkpoint, 'latency table', 0, like(args))
        supernet, trained_size = loaded.model, tuple(loaded.data_config['input_size'])
        if args.num_classes is not None and args.num_classes != supernet.num_classes:
            with as_usage_error(f'--num-classes {args.num_classes} is out of range'):
                supernet.reset_classifier(args.num_classes)
        input_size = input_size or trained_size
    elif args.model or args.model_config:
        options = like(args)
        args.model, args.model_kwargs = options.model, options.model_kwargs
        if args.num_classes is None:
            args.num_classes = options.num_classes
        supernet = create_supernet(args)
        if args.model_config and input_size is None:
            input_size = tuple(resolve_data(options, supernet)['input_size'])
    else:
        raise UsageError('no supernet: pass --checkpoint PATH, --model NAME, or --config FILE')
    return supernet.eval(), input_size


def _archs(texts: list[str], supernet: Supernet) -> list[str]:
    archs: list[str] = []
    for text in texts:
        if text.endswith('.json'):
            with as_usage_error(f'{text!r} is no front.json of a search'):
                archs += [row['arch'] for row in json.loads(Path(text).read_text())['front']]
        else:
            archs.append(text)
    with as_usage_error('an arch can not be measured'):
        return [supernet.space.arch(arch) for arch in archs]


def _measure(supernet: Supernet, archs: list[str], table: LatencyTable, device: str | None) -> None:
    require_scipy()
    cost = cost_table(supernet, table.input_size)
    table.add_to(cost)
    with as_usage_error(f'--device {device!r} can not be used'):
        if device is not None and torch.device(device).type != table.device:
            raise ValueError(f'the table is of {table.device!r}, where --archs are measured; leave it out')
    device = device or table.device
    with as_usage_error(
        f'the table is of {table.device_name} ({table.device}), on which --archs are measured; run this where there is '
        'one'
    ):
        supernet = supernet.to(device)
        here = describe_device(device)
    measured = measure_archs(supernet, archs, table)
    predicted = [cost.cost('latency', arch) for arch in archs]
    rows = [
        ('predicted ms', 'measured ms', 'error', 'arch'),
        *((f'{p:.2f}', f'{m:.2f}', f'{p / m - 1:+.1%}', str(arch)) for p, m, arch in zip(predicted, measured, archs)),
    ]
    print(f'{table.space}, {format_size(table.input_size)}: table of {table.describe()}; measured on {here}\n')
    print(format_table(rows, '>>><'))
    if len(archs) > 1:
        test = compare_prediction(predicted, measured)
        print(f'\ntau {test["tau"]:.3f}, mean error {test["mean_error"]:.1%}, largest {test["max_error"]:.1%}')
