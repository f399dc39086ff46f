"""The `timm-mixpath` command.

Exit status: 0 done, 1 a run failed, 2 the command was wrong, 130 interrupted, 128 + signal stopped by a scheduler.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..train.options import add_train_options, apply_config
from ..utils.errors import RunError, Stopped, UsageError, concise
from ..utils.modules import import_modules
from ..utils.recipes import copy_recipe, find_recipe, list_recipes
from ..version import __version__
from .adapt import add_adapt, run_adapt_command
from .demo import add_demo, run_demo_command
from .hub import add_export, add_push, run_export, run_push
from .latency import add_latency, run_latency
from .rank import add_rank, add_stats, run_rank, run_stats
from .search import add_profile, add_search, run_profile, run_search
from .train import add_table, run_table, run_train

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
            apply_config(commands[args.command], find_recipe(args.config))
            args = parser.parse_args(argv)
        import_modules(getattr(args, 'device_modules', None) or ())
        if args.command != 'run':  # what goes wrong in a user's script is the user's to see
            args.run(args)
    except UsageError as e:
        return _fail(e, 2)
    except torch.OutOfMemoryError as e:
        return _fail(RunError(f'{concise(e)} A lower --batch-size, or smaller images, need less'), 1)
    except (RunError, ImportError, OSError) as e:  # extras that are not installed say how to install them
        return _fail(e, 1)
    except KeyboardInterrupt:
        print('timm-mixpath: interrupted; the same command goes on where it can', file=sys.stderr)
        return 130
    except Stopped as e:
        return _fail(e, 128 + e.number)
    return _run(args) if args.command == 'run' else 0


def _fail(error: BaseException, status: int) -> int:
    print(f'timm-mixpath: error: {error}', file=sys.stderr)
    return status


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
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

    add_demo(command('demo', run_demo_command, 'the whole job on a small data set or on your own images'))
    add_adapt(command('adapt', run_adapt_command, 'make a pretrained network of timm fit your images and your budget'))
    add_train_options(
        command('train', run_train, "train a supernet or any timm model, with the options of timm's train.py")
    )
    add_table(command('table', run_table, 'train many archs from scratch into a table of accuracies'))
    add_search(command('search', run_search, 'search a trained supernet'))
    add_rank(command('rank', run_rank, 'tell how well a supernet ranks archs of known accuracy'))
    add_stats(command('stats', run_stats, 'do k summed paths of a supernet look like k times one path'))
    add_export(command('export', run_export, 'write a model folder for timm.create_model'))
    add_push(command('push', run_push, 'publish a model or a supernet on the Hugging Face Hub'))
    add_latency(command('latency', run_latency, 'measure a table that predicts how fast networks are on a device'))
    add_profile(command('profile', run_profile, 'size and cost of a search space'))
    _add_recipes(command('recipes', _recipes, 'list the recipes, or copy one'))
    _add_run(command('run', None, 'run any timm script with the mixpath models registered'))
    return parser, commands


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest='action', metavar='ACTION')
    copy = actions.add_parser('cp', help='copy a recipe into a folder')
    copy.add_argument('name', metavar='NAME')
    copy.add_argument('folder', metavar='DIR')


def _recipes(args: argparse.Namespace) -> None:
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
    # argparse takes what may be empty for required here, and says so if SCRIPT is missing
    add('arguments', nargs=argparse.REMAINDER, metavar='ARGS', help='options of the script').required = False


def _run(args: argparse.Namespace) -> int:
    script = Path(args.script)
    if not script.is_file():
        return _fail(UsageError(f'script {args.script!r} does not exist'), 2)
    import timm_mixpath  # noqa: F401  registers the models

    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as `python SCRIPT` does
    runpy.run_path(args.script, run_name='__main__')
    return 0
