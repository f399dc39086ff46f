"""The commands rank and stats."""

import argparse
from pathlib import Path

from ..analysis.path_report import format_stats
from ..analysis.ranking import SCORES, RankConfig
from ..analysis.ranking_report import print_ranking
from ..analysis.run import rank_checkpoint, stats_checkpoint
from ..search.images import SearchData
from ..utils.numbers import parse_count, parse_share
from .common import (
    add_checkpoint_options,
    add_device_option,
    add_image_options,
    from_args,
    is_first_process,
    like,
    setup_logging,
)

__all__ = ['add_rank', 'add_stats', 'run_rank', 'run_stats']


def add_rank(parser: argparse.ArgumentParser) -> None:
    default = RankConfig()
    add = parser.add_argument
    add_checkpoint_options(parser, 'last.pth.tar of a supernet')
    add('--table', required=True, metavar='FILE', help='CSV of archs and the accuracies that they reach on their own')
    add('--output', metavar='DIR', help='folder for archive, statistics and plot; without it nothing is kept, and a '
        'run that is cut off starts again')  # fmt: skip

    add = parser.add_argument_group('table').add_argument
    add('--arch-column', metavar='NAME', help='default: the first of arch, cell, ops')
    add('--accuracy-column', metavar='NAME', help='default: accuracy, or what NAS-Bench-101 and -201 call it')
    add('--num-archs', type=parse_count, metavar='N', help='draw N archs of the table at random (default: all)')
    add('--seed', type=int, default=default.seed, help='of the draw and of the bootstrap')

    add = parser.add_argument_group('ranking').add_argument
    add('--recalibration-images', type=parse_count, default=1024, metavar='N',
        help='score a second time, with batch norms of every arch recalibrated with N training images (default: '
        '%(default)s, 0 for not)')  # fmt: skip
    add('--score', default=default.score, choices=SCORES, help='what the supernet ranks by (default: %(default)s)')
    add('--top-k', nargs='+', type=int, default=default.top_k, metavar='K',
        help='report how many of the k best archs are among the k best of the supernet (default: 10 50)')  # fmt: skip
    add('--num-resamples', type=parse_count, default=default.num_resamples, metavar='N',
        help='bootstrap resamples behind an interval (default: %(default)s)')  # fmt: skip
    add(
        '--level',
        type=parse_share,
        default=default.level,
        metavar='SHARE',
        help='of the intervals (default: %(default)s)',
    )
    add(
        '--band',
        nargs=2,
        action=_Band,
        metavar=('COST', 'SHARE'),
        help='Kendall tau over the pairs of archs of equal cost, for example: --band macs 3%%',
    )
    add_image_options(parser)
    add_device_option(parser)


class _Band(argparse.Action):
    """A cost, and the share up to which two of them are equal."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str], *_) -> None:
        try:
            setattr(namespace, self.dest, (values[0], parse_share(values[1])))
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentError(self, str(e)) from None


def run_rank(args: argparse.Namespace) -> None:
    setup_logging()
    result = rank_checkpoint(
        args.checkpoint,
        args.table,
        args.output,
        from_args(RankConfig, args),
        from_args(SearchData, args),
        arch_column=args.arch_column,
        accuracy_column=args.accuracy_column,
        recalibration_images=args.recalibration_images,
        batch_size=args.batch_size,
        amp_dtype=args.amp_dtype if args.amp else None,
        device=args.device,
        workers=args.workers,
        like=like(args),
    )
    if is_first_process():
        print_ranking(result, args.output)


def add_stats(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A reconstruction of the content of the paper's figure; its exact protocol is not published."
    add = parser.add_argument
    add_checkpoint_options(parser, 'last.pth.tar of a supernet')
    add('--output', metavar='DIR', help='folder for stats.json, stats.csv and stats.png (default: only print)')
    add('--num-archs', type=parse_count, default=20, metavar='N',
        help='run at most N sampled archs to reach every sum of paths three times (default: %(default)s)')  # fmt: skip
    add_image_options(parser, num_images=512)
    add_device_option(parser, batch_size=32)


def run_stats(args: argparse.Namespace) -> None:
    setup_logging()
    result = stats_checkpoint(
        args.checkpoint,
        args.output,
        from_args(SearchData, args),
        num_archs=args.num_archs,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
        like=like(args),
    )
    if not is_first_process():
        return
    print(format_stats(result))
    if args.output:
        print(f'\nall numbers and the figure are in {Path(args.output)}')
