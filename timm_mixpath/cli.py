"""The `timm-mixpath` command.

Exit status: 0 done, 1 a run failed, 2 the command was wrong, 130 interrupted.
"""

import argparse
import dataclasses
import importlib
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RunError, UsageError, as_usage_error

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: Words behind `timm-mixpath`, those of this process if None.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, commands = _build_parser()
        args = parser.parse_args(argv)
        if getattr(args, 'config', None):
            from .options import apply_config
            from .recipes import find_recipe

            apply_config(commands[args.command], find_recipe(args.config))
            args = parser.parse_args(argv)
        for module in getattr(args, 'device_modules', None) or []:
            _import(module)
        if args.command != 'run':  # what goes wrong in a user's script is the user's to see
            args.run(args)
    except UsageError as e:
        return _fail(e, 2)
    except (RunError, ImportError, OSError) as e:  # extras that are not installed say how to install them
        return _fail(e, 1)
    except KeyboardInterrupt:
        print('timm-mixpath: interrupted; the same command goes on where it can', file=sys.stderr)
        return 130
    return _run(args) if args.command == 'run' else 0


def _fail(error: Exception, status: int) -> int:
    print(f'timm-mixpath: error: {error}', file=sys.stderr)
    return status


def _import(module: str) -> None:
    sys.path.insert(0, '')
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise UsageError(f'--device-modules {module}: {e}') from None
    finally:
        sys.path.remove('')


def _count(text: str) -> int:
    """Parse a number such as 5M, 1.2G, 350000."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kKMG]?)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number such as 5M, 1.2G or 350000')
    scale = {'': 1, 'k': 10**3, 'K': 10**3, 'M': 10**6, 'G': 10**9}[match[2]]
    return round(float(match[1]) * scale)


def _objective(text: str) -> tuple[str, float]:
    name, _, weight = text.partition('=')
    try:
        return name, float(weight or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form name or name=weight') from None


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from .options import add_train_options
    from .version import __version__

    parser = argparse.ArgumentParser(
        prog='timm-mixpath', description='Train, search and export MixPath models of timm.'
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    sub = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, run: Any, text: str, **kwargs: Any) -> argparse.ArgumentParser:
        commands[name] = sub.add_parser(name, help=text, description=text, **kwargs)
        commands[name].set_defaults(run=run)
        return commands[name]

    _add_demo(command('demo', _demo, 'the whole job on a small data set or on your own images'))
    add_train_options(
        command('train', _train, "train a supernet or any timm model, with the options of timm's train.py")
    )
    _add_table(command('table', _table, 'train many archs from scratch into a table of accuracies'))
    _add_search(command('search', _search, 'search a trained supernet'))
    _add_rank(command('rank', _rank, 'tell how well a supernet ranks archs of known accuracy'))
    _add_stats(command('stats', _stats, 'do k summed paths of a supernet look like k times one path'))
    _add_export(command('export', _export, 'write a model folder for timm.create_model'))
    _add_push(command('push', _push, 'publish a model or a supernet on the Hugging Face Hub'))
    _add_profile(command('profile', _profile, 'size and cost of a search space'))
    _add_recipes(command('recipes', _recipes, 'list the recipes, or copy one'))
    _add_run(command('run', None, 'run any timm script with the mixpath models registered'))
    return parser, commands


def _setup_logging() -> None:
    import logging

    from timm.utils import setup_default_logging

    if not logging.root.handlers:  # a second command in the same process would print every line twice
        setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files in every epoch
    for client in ('httpx', 'httpx2'):  # that of huggingface_hub, whose every request is a line
        logging.getLogger(client).setLevel(logging.WARNING)


def _from_args(cls: type, args: argparse.Namespace) -> Any:
    """Make a dataclass of the options of its fields' names."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from .demo import DemoConfig

    default = DemoConfig()
    add = parser.add_argument
    add('--output', default='mixpath-demo', metavar='DIR', help='output folder (default: mixpath-demo)')
    add('--data-dir', metavar='DIR', help="your images (default: scikit-learn's digits)")
    add('--dataset', default='', metavar='NAME', help='type/name as in timm')
    add('--train-split', default=default.train_split, metavar='NAME')
    add('--val-split', default=default.val_split, metavar='NAME')
    add('--dataset-download', action='store_true', help='download torch/ data sets')
    add('--img-size', type=int, default=default.img_size, metavar='N', help='pixels (default: %(default)s)')
    add('--supernet-epochs', type=int, default=default.supernet_epochs, metavar='N')
    add('--train-epochs', type=int, default=default.train_epochs, metavar='N')
    add('-b', '--batch-size', type=int, default=default.batch_size, metavar='N')
    add('--generations', type=int, default=default.generations, metavar='N', help='generations of the search')
    add('--max-macs', type=_count, metavar='N', help='limit of the search, for example 5M')
    add('--seed', type=int, default=default.seed)
    add('-j', '--workers', type=int, default=default.workers, metavar='N')
    add('--device', metavar='NAME')


def _demo(args: argparse.Namespace) -> None:
    from .demo import DemoConfig, run_demo

    _setup_logging()
    run_demo(_from_args(DemoConfig, args), args.output)


def _train(args: argparse.Namespace) -> None:
    from .train import train

    _setup_logging()
    train(argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ('run', 'command', 'config')}))


def _add_table(parser: argparse.ArgumentParser) -> None:
    from .options import add_train_options
    from .sampling import STRATEGIES

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
    archs.add_argument('--num-archs', type=int, metavar='N', help='draw N distinct archs of the space')
    add('--archs-seed', type=int, default=0, metavar='N', help='seed of --num-archs (default: 0)')
    add('--archs-m', type=int, metavar='M', help="most paths of --num-archs (default: m of the space's supernet)")
    add('--archs-sampling', choices=STRATEGIES, default='paths',
        help='how to draw --num-archs: paths as the supernet does, which leaves out nodes without inputs of nb201; '
        'uniform over all archs; or fair (default: paths)')  # fmt: skip
    add('--seeds', type=int, nargs='+', metavar='SEED', help='train every arch with each of these (default: --seed)')
    add('--drop-checkpoints', action='store_true', help='delete the checkpoints of trainings that have ended')
    add('--verbose', action='store_true', help='log what train logs, not one line per training')
    add_train_options(parser)


def _table(args: argparse.Namespace) -> None:
    from .options import default_args
    from .train_table import arch_space, draw_archs, read_archs, train_table

    _setup_logging()
    options = argparse.Namespace(**{name: getattr(args, name) for name in vars(default_args())})
    space = arch_space(options)
    if args.archs is not None:
        archs = read_archs(args.archs, space)
    else:
        archs = draw_archs(
            args.model, args.num_archs, seed=args.archs_seed, m=args.archs_m, sampling=args.archs_sampling
        )
    train_table(
        options,
        archs,
        args.table_dir,
        seeds=args.seeds,
        drop_checkpoints=args.drop_checkpoints,
        verbose=args.verbose,
    )


def _add_supernet(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        '--checkpoint',
        required=True,
        metavar='PATH',
        help='last.pth.tar of a supernet, a model folder, or hf-hub:ORG/NAME',
    )
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first, for a space of your own')


def _add_search(parser: argparse.ArgumentParser) -> None:
    from .search import ALGORITHMS, OBJECTIVES, SearchConfig

    default = SearchConfig()
    add = parser.add_argument
    _add_supernet(parser)
    add('--output', required=True, metavar='DIR', help='folder for archive, front and plot')
    _add_images(parser)

    add = parser.add_argument_group('search').add_argument
    add('--algorithm', default=default.algorithm, choices=ALGORITHMS)
    add('--objectives', nargs='+', type=_objective, default=default.objectives, metavar='NAME[=WEIGHT]',
        help=f'what to minimise, of {", ".join(OBJECTIVES)}; a weight counts in the crowding distance')  # fmt: skip
    add('--max-macs', type=_count, metavar='N', help='for example 5M')
    add('--min-macs', type=_count, metavar='N')
    add('--max-params', type=_count, metavar='N')
    add('--min-params', type=_count, metavar='N')
    add('--population', type=int, default=default.population, metavar='N')
    add('--offspring', type=int, default=default.offspring, metavar='N', help='evaluations per generation')
    add('--generations', type=int, default=default.generations, metavar='N')
    add('--seed', type=int, default=default.seed)
    add('--recalibration-images', type=int, default=0, metavar='N',
        help='recalibrate the batch norms of every candidate with N training images (default: 0, none)')  # fmt: skip
    add('--cost-input-size', nargs=3, type=int, metavar='N',
        help='channels, height, width to count MACs for (default: as in the training)')  # fmt: skip
    add('--cost-num-classes', type=int, metavar='N', help='classes to count costs for (default: as in the training)')
    add('--latency', action='store_true', help='measure the latency of the archs on the front')
    _add_device(parser)


def _add_images(parser: argparse.ArgumentParser, num_images: int | None = None) -> None:
    add = parser.add_argument_group('images (default: as in the training of the supernet)').add_argument
    add('--data-dir', metavar='DIR')
    add('--dataset', metavar='NAME', help='type/name as in timm')
    add('--dataset-download', action='store_true')
    add('--train-split', metavar='NAME')
    add('--class-map', metavar='FILE')
    add('--search-holdout', type=float, metavar='SHARE', help='share of the training images that was held out')
    add('--search-split', metavar='NAME', help='use this split whole instead')
    add('--num-images', type=int, default=num_images, metavar='N',
        help=f'number of images (default: {num_images or "all"})')  # fmt: skip


def _add_device(parser: argparse.ArgumentParser, batch_size: int = 100) -> None:
    add = parser.add_argument_group('device').add_argument
    add('-b', '--batch-size', type=int, default=batch_size, metavar='N')
    add('--device', metavar='NAME', help='default: cuda if there is a GPU, else cpu')
    add('-j', '--workers', type=int, default=2, metavar='N')


def _search(args: argparse.Namespace) -> None:
    from .pipeline import SearchData, print_result, search_checkpoint
    from .search import SearchConfig

    _setup_logging()
    result = search_checkpoint(
        args.checkpoint,
        args.output,
        _from_args(SearchConfig, args),
        _from_args(SearchData, args),
        recalibration_images=args.recalibration_images,
        cost_input_size=tuple(args.cost_input_size) if args.cost_input_size else None,
        cost_num_classes=args.cost_num_classes,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
        latency=args.latency,
    )
    if _is_first_process():
        print_result(result, args.output)


def _is_first_process() -> bool:
    from timm.utils.distributed import is_distributed_env, world_info_from_env

    return not is_distributed_env() or world_info_from_env()[1] == 0


def _add_rank(parser: argparse.ArgumentParser) -> None:
    from .ranking import SCORES, RankConfig

    default = RankConfig()
    add = parser.add_argument
    _add_supernet(parser)
    add('--table', required=True, metavar='FILE', help='CSV of archs and the accuracies that they reach on their own')
    add('--output', metavar='DIR', help='folder for archive, statistics and plot; without it nothing is kept, and a '
        'run that is cut off starts again')  # fmt: skip

    add = parser.add_argument_group('table').add_argument
    add('--arch-column', metavar='NAME', help='default: the first of arch, cell, ops')
    add('--accuracy-column', metavar='NAME', help='default: accuracy, or what NAS-Bench-101 and -201 call it')
    add('--num-archs', type=int, metavar='N', help='draw N archs of the table at random (default: all)')
    add('--seed', type=int, default=default.seed, help='of the draw and of the bootstrap')

    add = parser.add_argument_group('ranking').add_argument
    add('--recalibration-images', type=int, default=1024, metavar='N',
        help='score a second time, with batch norms of every arch recalibrated with N training images (default: '
        '%(default)s, 0 for not)')  # fmt: skip
    add('--score', default=default.score, choices=SCORES, help='what the supernet ranks by (default: %(default)s)')
    add('--top-k', nargs='+', type=int, default=default.top_k, metavar='K',
        help='report how many of the k best archs are among the k best of the supernet (default: 10 50)')  # fmt: skip
    add('--num-resamples', type=int, default=default.num_resamples, metavar='N',
        help='bootstrap resamples behind an interval (default: %(default)s)')  # fmt: skip
    add('--level', type=float, default=default.level, metavar='SHARE', help='of the intervals (default: %(default)s)')
    _add_images(parser)
    _add_device(parser)


def _rank(args: argparse.Namespace) -> None:
    from .pipeline import SearchData, print_ranking, rank_checkpoint
    from .ranking import RankConfig

    _setup_logging()
    result = rank_checkpoint(
        args.checkpoint,
        args.table,
        args.output,
        _from_args(RankConfig, args),
        _from_args(SearchData, args),
        arch_column=args.arch_column,
        accuracy_column=args.accuracy_column,
        recalibration_images=args.recalibration_images,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
    )
    if _is_first_process():
        print_ranking(result, args.output)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A reconstruction of the content of the paper's figure; its exact protocol is not published."
    add = parser.add_argument
    _add_supernet(parser)
    add('--output', metavar='DIR', help='folder for stats.json, stats.csv and stats.png (default: only print)')
    add('--num-archs', type=int, default=20, metavar='N',
        help='run at most N sampled archs to reach every sum of paths three times (default: %(default)s)')  # fmt: skip
    _add_images(parser, num_images=512)
    _add_device(parser, batch_size=32)


def _stats(args: argparse.Namespace) -> None:
    from .pipeline import SearchData
    from .stats import format_stats, stats_checkpoint

    _setup_logging()
    result = stats_checkpoint(
        args.checkpoint,
        args.output,
        _from_args(SearchData, args),
        num_archs=args.num_archs,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
    )
    if not _is_first_process():
        return
    print(format_stats(result))
    if args.output:
        print(f'\nall numbers and the figure are in {Path(args.output)}')


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='PATH', help='*.pth.tar of a run, a model folder, or hf-hub:ORG/NAME')
    add('--arch', metavar='TEXT', help='sub-network of a supernet, with the weights it inherits')
    add('--output', required=True, metavar='DIR', help='model folder to make')
    add('--recalibration-images', type=int, default=0, metavar='N', help='recalibrate the batch norms of --arch')
    add('--data-dir', metavar='DIR', help='where the images are (default: as in the training of the supernet)')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')


def _export(args: argparse.Namespace) -> None:
    from .export import export
    from .pipeline import SearchData

    export(
        args.checkpoint,
        args.output,
        args.arch,
        recalibration_images=args.recalibration_images,
        data=SearchData(data_dir=args.data_dir),
    )
    print(f"timm.create_model('local-dir:{args.output}', pretrained=True)  # after `import timm, timm_mixpath`")


def _add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='PATH', help='*.pth.tar of a run, a model folder, or hf-hub:ORG/NAME')
    add('--repo-id', required=True, metavar='ORG/NAME', help='for example me/mixpath_nano.cifar10')
    add('--private', action='store_true', help='make a new repo private')
    add('--revision', metavar='BRANCH', help='branch to push to, made if needed (default: main)')
    add('--message', metavar='TEXT', help='commit message')
    add('--dry-run', action='store_true', help='write the files into a folder and push nothing')
    add('--output', metavar='DIR', help='folder of --dry-run (default: NAME)')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first, for a space of your own')

    add = parser.add_argument_group('model card (what is not given and not recorded is left out)').add_argument
    add(
        '--search', metavar='DIR', help='output folder of the search that found the arch, or that searched the supernet'
    )
    add('--license', metavar='NAME', help='licence of the weights, for example apache-2.0')
    add('--dataset-id', metavar='NAME', help='data set by its name on the Hub, for example uoft-cs/cifar10')
    add('--dataset-name', metavar='TEXT', help='its name for readers, for example CIFAR-10')
    add('--commit', metavar='SHA', help='commit of timm-mixpath that trained the model')


def _push(args: argparse.Namespace) -> None:
    from .card import CardDetails
    from .hub import check_repo_id, push, write_repo

    _setup_logging()
    details = _from_args(CardDetails, args)
    check_repo_id(args.repo_id)
    name = args.repo_id.partition('/')[2]
    if args.output and not args.dry_run:
        raise UsageError(f'--output {args.output} is the folder of --dry-run; add --dry-run, or leave it out')
    target = args.repo_id + (f', branch {args.revision}' if args.revision else '')
    if args.dry_run:
        folder = Path(args.output or name)
        files = write_repo(
            args.checkpoint, args.repo_id, folder, details=details, search=args.search, revision=args.revision
        )
        print(f'would push to {target} in one commit:')
        for file in files:
            print(f'  {(folder / file).stat().st_size:>12,}  {folder / file}')
        return
    result = push(
        args.checkpoint,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        details=details,
        search=args.search,
        message=args.message,
    )
    if result.created:
        print(f'pushed to {result.url}, commit {result.commit[:12]}: {", ".join(result.files)}')
    else:
        print(f'nothing to push: {result.url} holds the same content, commit {result.commit[:12]}')
    source = f'hf-hub:{args.repo_id}' + (f'@{args.revision}' if args.revision else '')
    print(f"timm.create_model('{source}', pretrained=True)  # after `import timm, timm_mixpath`")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    from .options import KeyValue

    add = parser.add_argument
    add('--model', required=True, metavar='NAME', help='a supernet, for example mixpath_s1_supernet')
    add('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE', help='for example m=2')
    add('--num-classes', type=int, metavar='N')
    add('--input-size', nargs=3, type=int, metavar='N', help='channels, height, width')
    add('--num-samples', type=int, default=10_001, metavar='N', help='sampled archs behind the median')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')


def _profile(args: argparse.Namespace) -> None:
    import timm

    from .checkpoint import check_model_name
    from .cost import cost_table, profile_space
    from .supernet import Supernet

    check_model_name(args.model)
    in_chans = args.input_size[0] if args.input_size else None
    with as_usage_error(f'model {args.model!r} can not be created'):
        model = timm.create_model(
            args.model, num_classes=args.num_classes, in_chans=in_chans, device='meta', **args.model_kwargs
        )
    if not isinstance(model, Supernet):
        raise UsageError(f'{args.model!r} is no supernet; try {", ".join(timm.list_models("mixpath*_supernet"))}')
    with as_usage_error('the space can not be profiled'):
        table = cost_table(model, tuple(args.input_size) if args.input_size else None)
        profile = profile_space(table, num_samples=args.num_samples)
    size = 'x'.join(str(v) for v in table.input_size)
    num_archs = f'{profile.size:,}' if profile.size < 10**12 else f'{profile.size:.3g}'
    print(f'{args.model}: {num_archs} archs, m = {model.space.max_paths}, input {size}')
    print(f'{"":12}{"min":>12}{"median":>12}{"max":>12}')
    for name, unit, digits in (('macs', 'MACs (M)', 2), ('params', 'params (M)', 3)):
        row = getattr(profile, name)
        print(f'{unit:12}' + ''.join(f'{v / 1e6:12.{digits}f}' for v in (row.min, row.median, row.max)))
    print(f'median of {profile.num_samples:,} archs sampled as in training; min and max are exact')


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest='action', metavar='ACTION')
    copy = actions.add_parser('cp', help='copy a recipe into a folder')
    copy.add_argument('name', metavar='NAME')
    copy.add_argument('folder', metavar='DIR')


def _recipes(args: argparse.Namespace) -> None:
    from .recipes import copy_recipe, list_recipes

    if args.action == 'cp':
        print(copy_recipe(args.name, args.folder))
        return
    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    for name, text in recipes.items():
        print(f'{name:{width}}  {text}')


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--device-modules', nargs=1, metavar='MODULE', help='Python module to import first, for a space of your own')
    add('script', metavar='SCRIPT', help='for example validate.py of timm')
    add('arguments', nargs=argparse.REMAINDER, metavar='ARGS', help='options of the script')


def _run(args: argparse.Namespace) -> int:
    script = Path(args.script)
    if not script.is_file():
        return _fail(UsageError(f'script {args.script!r} does not exist'), 2)
    import timm_mixpath  # noqa: F401  registers the models

    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as `python SCRIPT` does
    runpy.run_path(args.script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
