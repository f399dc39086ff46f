"""The commands train and table."""

import argparse
from typing import Any

from ..analysis.arch_lists import arch_space, draw_archs, read_archs
from ..analysis.train_table import train_table
from ..spaces.sampling import STRATEGIES
from ..train.checkpoint import create_model, resolve_data
from ..train.loop import train
from ..train.options import add_train_options, default_args
from ..utils.errors import UsageError
from ..utils.numbers import parse_count, parse_share
from .common import setup_logging

__all__ = ['add_table', 'run_table', 'run_train']


def run_train(args: argparse.Namespace) -> None:
    setup_logging()
    train(argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ('run', 'command', 'config')}))


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Train many archs of a space from scratch and write their accuracies into a table, the ground truth of a '
        'ranking. All options of `timm-mixpath train` apply to every training; --model is a sub-network model such as '
        'mixpath_nano. The accuracy is that of the last epoch, since the best one would be chosen on the images that '
        'it is measured on. To leave the test set alone, measure on held-out training images: --search-holdout 0.1 '
        '--val-split search-holdout. The same command goes on with a table that was cut off; archs and seeds can be '
        'added to one. Under torchrun every process trains archs of its own.'
    )
    add = parser.add_argument_group('table').add_argument
    add('--table-dir', required=True, metavar='DIR', help='folder for table.csv and the trainings')
    archs = parser.add_mutually_exclusive_group(required=True)
    archs.add_argument(
        '--archs', metavar='FILE', help='text file of one arch per line, or .csv with a column arch, cell or ops'
    )
    archs.add_argument('--num-archs', type=parse_count, metavar='N', help='draw N distinct archs of the space')
    add('--archs-seed', type=int, metavar='N', help='seed of --num-archs (default: 0)')
    add('--archs-m', type=int, metavar='M', help="most paths of --num-archs (default: m of the space's supernet)")
    add('--archs-sampling', choices=STRATEGIES,
        help='how to draw --num-archs: paths as the supernet does, which leaves out nodes without inputs of nb201; '
        'uniform over all archs; or fair (default: paths)')  # fmt: skip
    add(
        '--archs-macs', type=parse_count, metavar='N', help='draw archs of about N MACs only, at the size of the images'
    )
    add('--archs-band', type=parse_share, metavar='SHARE',
        help='how far from --archs-macs they may be, up and down (default: 3%%)')  # fmt: skip
    add('--seeds', type=int, nargs='+', metavar='SEED', help='train every arch with each of these (default: --seed)')
    add('--drop-checkpoints', action='store_true', help='delete the checkpoints of trainings that have ended')
    add('--verbose', action='store_true', help='log what train logs, not one line per training')
    add_train_options(parser)


def run_table(args: argparse.Namespace) -> None:
    setup_logging()
    options = argparse.Namespace(**{name: getattr(args, name) for name in vars(default_args())})
    space = arch_space(options)
    if args.archs is not None:
        for name in ('archs_seed', 'archs_m', 'archs_sampling', 'archs_macs', 'archs_band'):
            if (value := getattr(args, name)) is not None:
                raise UsageError(
                    f'--{name.replace("_", "-")} {value} has no effect on the archs of a file, leave it or --archs out'
                )
        archs = read_archs(args.archs, space)
    else:
        kwargs = dict(options.model_kwargs)
        own = kwargs.pop('m', None)
        if None not in (own, args.archs_m) and own != args.archs_m:
            raise UsageError(f'--archs-m {args.archs_m} and --model-kwargs m={own} differ, leave one out')
        archs = draw_archs(
            args.model,
            args.num_archs,
            seed=args.archs_seed or 0,
            m=own if args.archs_m is None else args.archs_m,
            sampling=args.archs_sampling or 'paths',
            **{**kwargs, **_band(args, options)},
        )
    train_table(
        options,
        archs,
        args.table_dir,
        seeds=args.seeds,
        drop_checkpoints=args.drop_checkpoints,
        verbose=args.verbose,
    )


def _band(args: argparse.Namespace, options: argparse.Namespace) -> dict[str, Any]:
    """Where the multiply-adds of drawn archs have to be, and for which input they are counted."""
    width = 0.03 if args.archs_band is None else args.archs_band
    if not 0 < width < 1:
        raise UsageError(f'--archs-band {width} is not a share between 0 and 1, such as 0.03 or 3%')
    if args.archs_macs is None:
        if args.archs_band is not None:
            raise UsageError(f'--archs-band {width} has no effect without --archs-macs, give both or none')
        return {}
    model = create_model(options, device='meta')
    band = args.archs_macs * (1 - width), args.archs_macs * (1 + width)
    input_size = tuple(resolve_data(options, model)['input_size'])
    return dict(macs=band, input_size=input_size, num_classes=model.num_classes, in_chans=input_size[0])
