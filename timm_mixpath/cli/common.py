"""Options that several commands share."""

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.utils import setup_default_logging
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch.utils.data import Dataset

from ..models.supernet import Supernet
from ..train.checkpoint import check_model_name
from ..train.data import HOLDOUT_SPLIT, STREAMS, class_names, open_dataset
from ..train.options import KeyValue, default_args
from ..utils.errors import UsageError, as_usage_error
from ..utils.files import new_output_dir
from ..utils.numbers import parse_count, parse_milliseconds, parse_share
from ..utils.precision import add_amp_options
from ..utils.tables import write_json

__all__ = [
    'add_checkpoint_options',
    'add_device_option',
    'add_image_options',
    'add_latency_limit',
    'add_model_options',
    'add_user_images',
    'check_single_process',
    'create_supernet',
    'describe_job',
    'from_args',
    'is_first_process',
    'job_folder',
    'like',
    'open_user_images',
    'setup_logging',
    'user_images',
]


def setup_logging() -> None:
    if not logging.root.handlers:  # a second command in the same process would print every line twice
        setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of files in every epoch
    for client in ('httpx', 'httpx2'):  # that of huggingface_hub, whose every request is a line
        logging.getLogger(client).setLevel(logging.WARNING)


def from_args(cls: type, args: argparse.Namespace) -> Any:
    """Make a dataclass of the options of its fields' names."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def add_checkpoint_options(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """Add `--checkpoint`, of `what`, and the options that `like` reads."""
    add = parser.add_argument
    add('--checkpoint', required=required, metavar='PATH', help=f'{what}, a model folder, or hf-hub:ORG/NAME')
    add_model_options(
        parser, "what weights alone are of (timm's clean_checkpoint.py and avg_checkpoints.py write such files)"
    )


def add_model_options(parser: argparse.ArgumentParser, title: str) -> None:
    """Add the options that `like` reads, as a group of a title."""
    add = parser.add_argument
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first, for a space of your own')
    add = parser.add_argument_group(title).add_argument
    add('--model', metavar='NAME')
    add('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE')
    add('--config', dest='model_config', metavar='FILE', help='recipe or args.yaml of the training, in their place')


def like(args: argparse.Namespace) -> argparse.Namespace | None:
    """Return the training options that say what weights alone are of, None if nothing was said."""
    if not args.model and not args.model_config:
        if args.model_kwargs:
            raise UsageError('--model-kwargs say nothing without --model NAME')
        return None
    options = default_args(config=args.model_config or '')
    options.is_model_only = not args.model_config  # the rest are defaults, not options of a training
    if args.model:
        options.model, options.model_kwargs = args.model, {}
    options.model_kwargs = {**options.model_kwargs, **args.model_kwargs}
    return options


def create_supernet(args: argparse.Namespace, **kwargs: Any) -> Any:
    """Create the supernet of `--model`, `--model-kwargs`, `--num-classes` and `--input-size`.

    Args:
        args: Options.
        **kwargs: Arguments of `timm.create_model` beside those.

    Raises:
        UsageError: It can not be created, or is no supernet.
    """

    check_model_name(args.model)
    in_chans = args.input_size[0] if args.input_size else None
    with as_usage_error(f'model {args.model!r} can not be created'):
        model = timm.create_model(
            args.model, num_classes=args.num_classes, in_chans=in_chans, **kwargs, **args.model_kwargs
        )
    if not isinstance(model, Supernet):
        raise UsageError(f'{args.model!r} is no supernet; try {", ".join(timm.list_models("mixpath*_supernet"))}')
    return model


def add_image_options(parser: argparse.ArgumentParser, num_images: int | None = None, scored: bool = True) -> None:
    """Add where images come from and, if archs are `scored` with them, how many."""
    add = parser.add_argument_group('images (default: as in the training of the supernet)').add_argument
    add('--data-dir', metavar='DIR')
    add('--dataset', metavar='NAME', help='type/name as in timm')
    add('--dataset-download', action='store_true')
    add('--train-split', metavar='NAME')
    _add_keys(add, 'wds/, hfds/ and hfids/')
    add('--search-holdout', type=parse_share, metavar='SHARE', help='share of the training images that was held out')
    add('--search-split', metavar='NAME', help='use this split whole instead')
    parser.set_defaults(num_images=num_images)
    if scored:
        add('--num-images', type=parse_count, metavar='N',
            help=f'number of images (default: {num_images or "all, at most 20,000"})')  # fmt: skip


def _add_keys(add: Any, sets: str) -> None:
    add('--class-map', metavar='FILE', help='file that names all classes, one a line, in the order of their indices')
    add(
        '--input-key',
        metavar='KEY',
        help=f"key of the images in {sets} data sets, endings of a folder's, as '.webp;.png'",
    )
    add('--target-key', metavar='KEY', help='key of the class indices in them')


def add_user_images(add: Any, what: str) -> None:
    """Add where the images of a whole job are, see `user_images`."""
    add('--data-dir', metavar='DIR', help=what)
    add('--dataset', default='', metavar='NAME', help='type/name as in timm')
    add('--train-split', default='train', metavar='NAME')
    add('--val-split', default='validation', metavar='NAME')
    add('--dataset-download', action='store_true', help='download torch/ data sets')
    _add_keys(add, 'hfds/')


def add_latency_limit(parser: Any) -> None:
    add = parser.add_argument
    add(
        '--latency-table', metavar='FILE', help='predicts the latency of every arch; `timm-mixpath latency` measures it'
    )
    add('--max-latency', type=parse_milliseconds, metavar='MS', help='for example 8ms, per batch of the latency table')


def add_device_option(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """Add where to run; with mixed precision if there is no default batch size, as where archs are scored."""
    group = parser.add_argument_group('device')
    add = group.add_argument
    default = '100 on a CPU, 512 on a GPU' if batch_size is None else batch_size
    add('-b', '--batch-size', type=int, default=batch_size, metavar='N', help=f'images at once (default: {default})')
    if batch_size is None:
        add_amp_options(group)
    add('--device', metavar='NAME', help='default: cuda if there is a GPU, else cpu')
    add('-j', '--workers', type=int, default=2, metavar='N')


def is_first_process() -> bool:
    return not is_distributed_env() or world_info_from_env()[1] == 0


def check_single_process(command: str) -> None:
    """Check that a command which makes a folder step by step was not started once per GPU.

    Raises:
        UsageError: It was, by torchrun or Slurm.
    """

    if is_distributed_env() and (world_size := world_info_from_env()[2]) > 1:
        raise UsageError(
            f'`timm-mixpath {command}` is one process, and was started as one of {world_size}; start it alone, or '
            '`train` and `search` with torchrun'
        )


@contextmanager
def job_folder(output: str | os.PathLike, config: Any, name: str) -> Iterator[Path]:
    """Make the folder of a job, keep there what the job is, and check that it is the one that the folder holds.

    A job that ends before it has left anything else leaves nothing, so that a wrong value can be mended.

    Args:
        output: Folder; it may exist.
        config: Dataclass of what to do. `workers`, `device`, `cpu_kernels` and `dataset_download` may change.
        name: Name of the JSON file.

    Raises:
        UsageError: The folder holds another job.
        RunError: The folder can't be made or written to.
    """
    with new_output_dir(output) as folder:
        path = folder / name
        is_new = not path.exists()
        _check_same_run(config, path)
        try:
            yield folder
        except BaseException:
            if is_new and list(folder.iterdir()) == [path]:
                path.unlink()
            raise


# Options of jobs that name a file or folder
_PATHS = ('data_dir', 'class_map', 'backbone_weights', 'latency_table', 'reuse')


def describe_job(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a job as they are kept in its folder: JSON-ready, with paths that hold anywhere.

    Raises:
        ValueError: They are none, as where the file holds something else.
    """
    if not isinstance(options, dict):
        raise ValueError(f'{options!r} are no options')
    options = json.loads(json.dumps(options))  # tuples become lists, as in the file
    paths = {name: os.path.abspath(options[name]) for name in _PATHS if isinstance(options.get(name), str)}
    return {**options, **paths}


def _check_same_run(config: Any, path: Path) -> None:
    content = describe_job(dataclasses.asdict(config))
    if path.exists():
        try:
            other = describe_job(json.loads(path.read_text()))
        except ValueError:
            raise UsageError(f'{str(path)!r} is damaged; choose another --output') from None
        # where and with how many processes it runs does not change what it is, nor that the images are here by now, and
        # what an earlier version did not ask could not be answered otherwise
        left_out = ('dataset_download', 'workers', 'device', 'cpu_kernels')
        changed = [k for k in content if k in other and content[k] != other[k] and k not in left_out]
        if changed:
            raise UsageError(
                f'{str(path.parent)!r} holds a run with another {changed[0]} ({other.get(changed[0])!r}, now '
                f'{content[changed[0]]!r}); choose another --output'
            )
        return
    write_json(path, content)


def user_images(config: Any, data_dir: str | None) -> tuple[dict[str, Any], list[str], int]:
    """Open the training images of a job, and say in the options of `train` where its images are.

    Args:
        config: Job with the options of `add_user_images`.
        data_dir: Root of the images.

    Returns:
        The options, the names of the classes, and the number of training images.

    Raises:
        UsageError: The images do not exist, their classes are not known, or there are none to report on.
    """

    if config.val_split in ('', HOLDOUT_SPLIT):
        raise UsageError(
            f'--val-split {config.val_split!r}: the result is measured on a split of its own, name one of the data set'
        )
    if config.dataset.split('/')[0].lower() in STREAMS:
        raise UsageError(
            f'{config.dataset!r} is a stream, no images of which can be held out for the search; use folders, or '
            '`timm-mixpath train` and `search` with --search-split'
        )
    keys = dict(class_map=config.class_map or '', input_key=config.input_key, target_key=config.target_key)
    opened = dict(dataset=config.dataset, data_dir=data_dir, dataset_download=config.dataset_download, **keys)
    train_set = open_user_images(opened, config.train_split)
    names = class_names(train_set)
    if names is None:
        raise UsageError(f'the classes of data set {config.dataset!r} are not known, use `timm-mixpath train`')
    return {**opened, 'train_split': config.train_split, 'val_split': config.val_split}, names, len(train_set)


def open_user_images(options: Mapping[str, Any], split: str) -> Dataset:
    """Open a split of what `user_images` has found."""
    keys = {key: options[key] for key in ('class_map', 'input_key', 'target_key')}
    return open_dataset(options['dataset'], options['data_dir'], split, download=options['dataset_download'], **keys)
