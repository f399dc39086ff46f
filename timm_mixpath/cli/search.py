"""The commands search and profile."""

import argparse

from ..models.cost import cost_table, profile_space
from ..models.latency_table import LatencyTable
from ..search.config import ALGORITHMS, OBJECTIVES, SearchConfig
from ..search.front import print_result
from ..search.images import SearchData
from ..search.pool import check_limits
from ..search.run import objectives_of, search_checkpoint
from ..train.options import KeyValue
from ..utils.errors import as_usage_error
from ..utils.numbers import parse_count, parse_milliseconds
from ..utils.tables import format_size
from .common import (
    add_checkpoint_options,
    add_device_option,
    add_image_options,
    add_latency_limit,
    create_supernet,
    from_args,
    is_first_process,
    like,
    setup_logging,
)

__all__ = ['add_profile', 'add_search', 'run_profile', 'run_search']


def _objective(text: str) -> tuple[str, float]:
    name, _, weight = text.partition('=')
    try:
        return name, float(weight or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form name or name=weight') from None


def add_search(parser: argparse.ArgumentParser) -> None:
    default = SearchConfig()
    add = parser.add_argument
    add_checkpoint_options(parser, 'last.pth.tar of a supernet')
    add('--output', required=True, metavar='DIR', help='folder for archive, front and plot')
    add_image_options(parser)

    group = parser.add_argument_group('search')
    add = group.add_argument
    add('--algorithm', default=default.algorithm, choices=ALGORITHMS)
    add('--objectives', nargs='+', type=_objective, metavar='NAME[=WEIGHT]',
        help=f'what to minimise, of {", ".join(OBJECTIVES)}; a weight counts in the crowding distance (default: '
        f'{" ".join(name for name, _ in default.objectives)})')  # fmt: skip
    add('--max-macs', type=parse_count, metavar='N', help='for example 15M')
    add('--min-macs', type=parse_count, metavar='N')
    add('--max-params', type=parse_count, metavar='N')
    add('--min-params', type=parse_count, metavar='N')
    add_latency_limit(group)
    add('--min-latency', type=parse_milliseconds, metavar='MS')
    add('--population', type=int, default=default.population, metavar='N')
    add('--offspring', type=int, default=default.offspring, metavar='N', help='evaluations per generation')
    add('--generations', type=int, default=default.generations, metavar='N')
    add('--seed', type=int, default=default.seed)
    add('--near', metavar='ARCH',
        help="draw every other arch of generation 0 near this one (default: the backbone's own in a supernet around "
             "one, else none)")  # fmt: skip
    add('--recalibration-images', type=parse_count, default=256, metavar='N',
        help='recalibrate the batch norms of every candidate with N training images, 0 for not (default: '
        '%(default)s)')  # fmt: skip
    add('--img-size', type=int, metavar='N', help='pixels of the images (default: as in the training)')
    add('--cost-input-size', nargs=3, type=int, metavar='N',
        help='channels, height, width to count MACs for (default: those of the images)')  # fmt: skip
    add('--cost-num-classes', type=int, metavar='N', help='classes to count costs for (default: as in the training)')
    add('--latency', action='store_true', help='measure the latency of the archs on the front without a table')
    add_device_option(parser)


def run_search(args: argparse.Namespace) -> None:
    setup_logging()
    args.objectives = args.objectives or objectives_of(args.output)
    result = search_checkpoint(
        args.checkpoint,
        args.output,
        from_args(SearchConfig, args),
        from_args(SearchData, args),
        recalibration_images=args.recalibration_images,
        img_size=args.img_size,
        cost_input_size=tuple(args.cost_input_size) if args.cost_input_size else None,
        cost_num_classes=args.cost_num_classes,
        batch_size=args.batch_size,
        amp_dtype=args.amp_dtype if args.amp else None,
        device=args.device,
        workers=args.workers,
        latency=args.latency,
        latency_table=args.latency_table,
        like=like(args),
    )
    if is_first_process():
        print_result(result, args.output)


def add_profile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--model', required=True, metavar='NAME', help='a supernet, for example mixpath_s1_supernet')
    add('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE', help='for example m=2')
    add('--num-classes', type=int, metavar='N')
    add('--input-size', nargs=3, type=int, metavar='N', help='channels, height, width')
    add('--num-samples', type=parse_count, default=10_001, metavar='N', help='sampled archs behind the median')
    add_latency_limit(parser)
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')


def run_profile(args: argparse.Namespace) -> None:
    model = create_supernet(args, device='meta')
    with as_usage_error('the space can not be profiled'):
        table = cost_table(model, tuple(args.input_size) if args.input_size else None)
        if args.latency_table:
            LatencyTable.load(args.latency_table).add_to(table)
        check_limits(SearchConfig(max_latency=args.max_latency), table)
        profile = profile_space(table, num_samples=args.num_samples)
    num_archs = f'{profile.size:,}' if profile.size < 10**12 else f'{profile.size:.3g}'
    print(f'{args.model}: {num_archs} archs, m = {model.space.max_paths}, input {format_size(table.input_size)}')
    print(f'{"":12}{"min":>12}{"median":>12}{"max":>12}')
    for name, unit, digits in (('macs', 'MACs (M)', 2), ('params', 'params (M)', 3)):
        row = getattr(profile, name)
        print(f'{unit:12}' + ''.join(f'{v / 1e6:12.{digits}f}' for v in (row.min, row.median, row.max)))
    if profile.latency is not None:
        row = profile.latency
        print(f'{"latency (ms)":12}' + ''.join(f'{v:12.2f}' for v in (row.min, row.median, row.max)))
    print(f'median of {profile.num_samples:,} archs sampled as in training; min and max are exact')
