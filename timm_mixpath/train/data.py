"""Data sets as timm reads them, and the search split that is held out from the training images."""

import copy
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tarfile import TarError
from typing import Any

import torch
from PIL import ImageMode
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset

from ..models._timm import search_split
from ..utils.errors import RunError, UsageError, concise
from .folders import check_folders, shortened
from .image_files import ImageFiles, ImagesInMode

__all__ = [
    'HOLDOUT_SPLIT',
    'STREAMS',
    'Subset',
    'check_classes',
    'class_names',
    'file_names',
    'hold_out',
    'image_mode',
    'is_stream',
    'iterate',
    'open_dataset',
    'read_alone',
    'split_record',
    'targets',
    'warn_of_other_images',
]


_logger = logging.getLogger(__name__)

# Name under which the held-out training images are a split to validate on
HOLDOUT_SPLIT = 'search-holdout'

# Kinds of data sets whose images can be read in their order only
STREAMS = ('hfids', 'tfds', 'wds')

# The kinds of data sets that timm knows; it takes a folder for any other name
_KINDS = ('torch', 'hfds', *STREAMS)


class Subset(torch.utils.data.Subset):
    """A part of a data set, with a transform of its own that timm's `create_loader` can set.

    Args:
        dataset: Map-style data set.
        indices: Samples of the part.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        super().__init__(copy.copy(dataset), list(indices))

    def __getitem__(self, index: int) -> Any:
        """Return a sample; an image that can't be decoded is replaced by the next one of the part, not of the whole."""
        if isinstance(self.dataset, ImageFiles):
            return self.dataset.first_readable(self.indices, index)
        return super().__getitem__(index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]  # torch's own goes by __getitem__

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def open_dataset(
    name: str,
    root: str | None,
    split: str,
    *,
    num_classes: int | None = None,
    **kwargs: Any,
) -> Dataset:
    """Open a data set through `timm.data.create_dataset`.

    Args:
        name: `''` for a folder or tar of class folders, else timm's `<type>/<name>`.
        root: Folder of the data set.
        split: Split, `''` for a folder whose children are the classes.
        num_classes: Number of classes that the model tells apart.
        **kwargs: See `timm.data.create_dataset`.

    Raises:
        UsageError: The folder or the split does not exist, or the number of classes differs, see `check_classes`.
        RunError: There is no image in it, or it can't be read.
    """
    kind = name.split('/')[0].lower()
    if name and kind not in _KINDS:
        raise UsageError(
            f'unknown kind of data set {name!r}; it is empty for a folder or tar of class folders, or starts with one '
            f'of {", ".join(_KINDS)} and a slash, for example torch/cifar10'
        )
    if not root and not name.startswith(('hfds/', 'hfids/', 'tfds/', 'wds/')):
        raise UsageError("no data: pass --data-dir DIR, a folder with one sub-folder per split, for example 'train'")
    if root and not Path(root).exists() and not kwargs.get('download'):
        raise UsageError(f'data folder {root!r} does not exist')
    if not name and split and Path(root).is_file():
        raise UsageError(
            f'{root!r} is a file, which would be used whole for every split; pass the folder that it is in as '
            f'--data-dir and its name as --train-split'
        )
    if not name and split and Path(root).is_dir() and search_split(root, split) == root:
        # timm would silently take the whole folder, training images included, for the split
        found = ', '.join(sorted(p.name for p in Path(root).iterdir())[:10]) or 'nothing'
        raise UsageError(f'split {split!r} is not in data folder {root!r}, which holds {found}')
    if kind == 'torch' and kwargs.pop('class_map', ''):
        raise UsageError(f'--class-map has no effect on {name!r}, whose classes torchvision numbers; leave it out')
    # Only these have keys and may not know how many images they have; of a folder a key names the kinds of files
    if kind not in ('hfds', *STREAMS):
        left_out = {'input_key', 'target_key', 'num_samples'}
        left_out -= {'input_key'} if not name and Path(root).is_dir() else set()
        kwargs = {key: value for key, value in kwargs.items() if key not in left_out}
    kwargs = {key: value for key, value in kwargs.items() if key != 'input_key' or value is not None}
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
        empty = not isinstance(dataset, IterableDataset) and len(dataset) == 0
    except ValueError as e:  # readers of timm, where nothing tells how many images a stream has
        if 'num_samples' not in str(e):
            raise
        raise UsageError(
            f'data set {name!r} does not tell how many images split {split!r} has; pass --train-num-samples and '
            '--val-num-samples'
        ) from None
    except (OSError, RuntimeError, AssertionError, ImportError, TarError) as e:
        raise RunError(f'data set {name or root!r}, split {split!r}, can not be read: {concise(e)}') from e
    if empty:
        raise RunError(f'data set {name or root!r}, split {split!r}, holds no images')
    if kind == 'hfds':
        _check_keys(dataset.reader, name)
    if type(dataset) is ImageDataset:
        check_folders(dataset.reader, f'split {split!r}', kwargs.get('class_map'), kwargs.get('input_key'))
        dataset = ImageFiles(dataset)
    elif kind == 'torch' and kwargs.get('input_img_mode'):
        dataset = ImagesInMode(dataset, kwargs['input_img_mode'])
    if num_classes is not None:
        check_classes({f'split {split!r}': dataset}, num_classes)
    return dataset


def _check_keys(reader: Any, name: str) -> None:
    """Check that the first sample of a table of the Hub's kind has an image and a class."""
    try:
        _, label = reader[0]
        int(label)
    except (LookupError, TypeError, ValueError, AssertionError, OSError):
        # timm's reader adds an empty column of the name that it was given
        columns = ', '.join(name for name, value in reader.dataset[0].items() if value is not None)
        raise UsageError(
            f'data set {name!r} has no images at --input-key {reader.image_key} or no class indices at --target-key '
            f'{reader.label_key}, its columns are {columns}'
        ) from None


def check_classes(
    splits: Mapping[str, Dataset], num_classes: int | None = None, trained: Sequence[str] | None = None
) -> list[str] | None:
    """Check that splits number the same classes in the same way, that of the model's training, and as many as it has.

    timm numbers the classes of every split by itself, in the order of the names of the folders that hold images. One
    that is missing, empty or called otherwise in one split shifts the numbers of those behind it without a word.

    Args:
        splits: Data sets, which are skipped where they do not tell their classes, by what messages call them.
        num_classes: Number of classes that the model tells apart, anything if None.
        trained: Class names that the model was trained with, in the order of their index, unknown if None.

    Returns:
        Class names in the order of their index, None if no data set tells them.

    Raises:
        UsageError: They differ; the message names the classes that only one side has.
    """
    sides = {} if trained is None else {'the training of the checkpoint': list(trained)}
    sides.update({what: names for what, names in zip(splits, map(class_names, splits.values())) if names is not None})
    empty = sorted({name for dataset in splits.values() for name in _empty_classes(dataset)})
    empty_text = f' (without images: {shortened(empty)})' if empty else ''
    (first, names), *others = sides.items() if sides else [('', None)]
    for what, other in others:
        if other == names:
            continue
        missing = (first, _without(names, other)), (what, _without(other, names))
        only = [f'only {side} has {shortened(classes)}' for side, classes in missing if classes]
        problem = ', '.join(only) or f'{first} numbers them in another order'
        raise UsageError(
            f'the classes of {first} and {what} differ, so the same index would mean two classes: {problem}'
            f'{empty_text}; make the class folders the same, or name all classes, one a line, in a file for '
            '--class-map FILE.txt'
        )
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise UsageError(
            f'{first} has {len(names)} classes{empty_text} but the model has {num_classes}; pass --num-classes '
            f'{len(names)} if that is right' + (', or fill or remove the folders without images' if empty else '')
        )
    return names


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _empty_classes(dataset: Dataset) -> list[str]:
    """Folders beside those of the classes that hold no images, which timm takes for no class."""
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    names = class_names(dataset)
    if root is None or names is None or not Path(root).is_dir():
        return []
    return [path.name for path in Path(root).iterdir() if path.is_dir() and path.name not in names]


def iterate(loader: Iterable) -> Iterator[Any]:
    """Iterate over a loader.

    Raises:
        RunError: Images can't be read.
    """
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, RuntimeError, ValueError) as e:  # a worker's error comes with its traceback as text
            text = re.sub(r'^[\w.]+(Error|Exception): ', '', str(e).strip().splitlines()[-1])
            raise RunError(f'images can not be read: {text}') from e
        except (LookupError, TypeError, AttributeError) as e:  # what readers of timm meet where a key is not there
            text = f'{type(e).__name__}: {str(e).strip().splitlines()[-1]}'
            raise RunError(f'images can not be read, check --input-key and --target-key ({text})') from e
        yield batch


def image_mode(channels: int, mode: str | None = None) -> str:
    """Return the mode in which images are opened for a model of so many input channels.

    Args:
        channels: Input channels.
        mode: Mode of Pillow that was asked for; L for one channel and RGB for three if None.

    Raises:
        UsageError: The mode does not exist or has another number of channels, or there is no usual one.
    """
    usual = {1: 'L', 3: 'RGB'}
    if not mode and channels not in usual:
        raise UsageError(
            f'images of {channels} channels have no usual mode; pass --input-img-mode, such as LA for 2 or RGBA for 4'
        )
    mode = mode or usual[channels]
    try:
        bands = ImageMode.getmode(mode).bands
    except KeyError:
        raise UsageError(f'--input-img-mode {mode!r} is no mode of Pillow, such are L, LA, RGB, RGBA, CMYK') from None
    if len(bands) != channels:
        raise UsageError(
            f'--input-img-mode {mode} has {len(bands)} channels, the model takes {channels}; pass --in-chans '
            f'{len(bands)}, or another mode'
        )
    return mode


def class_names(dataset: Dataset) -> list[str] | None:
    """Return the class names in the order of their index, None where the data set does not tell."""
    for owner in (getattr(dataset, 'reader', None), dataset):
        for attribute in ('class_to_idx', 'class_name_to_idx'):
            mapping = getattr(owner, attribute, None)
            if mapping:
                return sorted(mapping, key=mapping.get)
    return None


def targets(dataset: Dataset) -> list[int] | None:
    """Return the class index of every sample without decoding it, None where the data set does not tell."""
    reader = getattr(dataset, 'reader', None)
    for owner in (reader, dataset):
        if getattr(owner, 'targets', None) is not None:
            return [int(t) for t in owner.targets]
    if getattr(reader, 'samples', None):
        return [int(sample[1]) for sample in reader.samples]
    if hasattr(reader, 'iter_targets'):
        return [int(target) for target in reader.iter_targets()]
    return None


def is_stream(dataset: Dataset) -> bool:
    """Whether images can be read in their order only, as those of webdataset and tfds."""
    return isinstance(dataset, IterableDataset)


def read_alone(dataset: IterableDataset) -> None:
    """Let a stream be read whole by every process of torchrun; readers of timm give each a share of it."""
    reader = getattr(dataset, 'reader', None)
    for name, value in (('dist_rank', 0), ('dist_num_replicas', 1)):
        if hasattr(reader, name):
            setattr(reader, name, value)


def hold_out(dataset: Dataset, fraction: float, *, by_position: bool = False) -> tuple[Subset, Subset]:
    """Split training images into those that train the supernet and those that score archs in the search.

    The split depends on the data set and `fraction` alone, not on a seed, so that a later search finds the images
    that an earlier training left out. Classes keep their share where the data set tells them. Where files have names
    these decide, so that images that are added or removed move at most one other image of their class each.

    Args:
        dataset: Map-style training set.
        fraction: Share of the images to hold out, in (0, 1).
        by_position: Draw positions even where there are names, as versions did that kept no `split_record`.

    Returns:
        Training part and search part.

    Raises:
        UsageError: The fraction is out of range, a part would be empty, or the data set can't be indexed.
    """
    if not 0 < fraction < 1:
        raise UsageError(f'search hold-out {fraction} is out of range, it is a share between 0 and 1')
    if isinstance(dataset, IterableDataset):
        raise UsageError(
            'the images of a stream can not be held out one by one; train with --search-holdout 0 on some of its '
            'shards, and name the others as --search-split of the search, for wds/ as shard-{0008..0009}.tar'
        )
    labels = targets(dataset) or [0] * len(dataset)
    names = None if by_position else file_names(dataset)
    generator = torch.Generator().manual_seed(0)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    held = set()
    for label in sorted(by_class):
        indices = by_class[label]
        if names is not None:
            order = sorted(indices, key=lambda i: _digest(names[i]))
            # A class of which nothing is left to train on would be scored all the same
            count = min(math.floor(len(indices) * fraction + 0.5), len(indices) - 1)
        else:
            order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
            count = round(len(indices) * fraction)
        held.update(order[:count])
    if not held or len(held) == len(labels):
        raise UsageError(
            f'holding out {fraction} of {len(labels)} images of {len(by_class)} classes leaves a part empty; more '
            'images per class are needed, or another share'
        )
    kept = [i for i in range(len(labels)) if i not in held]
    return Subset(dataset, kept), Subset(dataset, sorted(held))


def split_record(held: Subset) -> dict[str, Any]:
    """Return what tells later whether the same images are held out, for a checkpoint.

    Args:
        held: The search part of `hold_out`.

    Returns:
        Number of images of the whole, whether they have names, and a digest of the part: of its names, or of its
        positions and the size of the whole.
    """
    names = file_names(held.dataset)
    whole = len(held.dataset)
    told = sorted(names[i] for i in held.indices) if names is not None else [whole, *held.indices]
    return dict(num_images=whole, named=names is not None, digest=_digest('\n'.join(map(str, told))))


def warn_of_other_images(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say when images are held out that the training had, as its data set has changed.

    Args:
        before: `split_record` of the training.
        now: `split_record` of the data set as it is.
    """
    if before['digest'] != now['digest']:
        share = 'some' if before['named'] and now['named'] else 'most'
        _logger.warning(
            f'the training images are not those that the training began with ({before["num_images"]} then, '
            f'{now["num_images"]} now): {share} of those that are held out now may have been trained on, and errors '
            'look too low; put the images back, or name an unseen --search-split of the search'
        )


def file_names(dataset: Dataset) -> list[str] | None:
    """Return the name of every sample's file below the root of the data set, None where the data set does not tell."""
    for owner in (getattr(dataset, 'reader', None), dataset):
        samples, root = getattr(owner, 'samples', None), getattr(owner, 'root', None)
        if not samples or root is None:
            continue
        files = [sample[0] for sample in samples]
        if all(isinstance(file, str) for file in files):
            prefix = len(os.path.join(root, ''))
            return [file[prefix:].replace(os.sep, '/') for file in files]
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()
