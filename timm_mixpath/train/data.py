"""Data sets as timm reads them, and the search split that is held out from the training images."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tarfile import TarError
from typing import Any

import torch
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from ..models._timm import search_split
from ..utils.errors import RunError, UsageError, concise

__all__ = ['HOLDOUT_SPLIT', 'Subset', 'class_names', 'hold_out', 'iterate', 'open_dataset', 'targets']


# Name under which the held-out training images are a split to validate on
HOLDOUT_SPLIT = 'search-holdout'

# The kinds of data sets that timm knows; it takes a folder for any other name
_KINDS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')


class Subset(torch.utils.data.Subset):
    """A part of a data set, with a transform of its own that timm's `create_loader` can set.

    Args:
        dataset: Map-style data set.
        indices: Samples of the part.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        super().__init__(copy.copy(dataset), list(indices))

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
        UsageError: The folder or the split does not exist, or the number of classes differs.
        RunError: There is no image in it, or it can't be read.
    """
    if name and name.split('/')[0].lower() not in _KINDS:
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
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
        empty = not isinstance(dataset, IterableDataset) and len(dataset) == 0
    except (OSError, RuntimeError, AssertionError, ImportError, TarError) as e:
        raise RunError(f'data set {name or root!r}, split {split!r}, can not be read: {concise(e)}') from e
    if empty:
        raise RunError(f'data set {name or root!r}, split {split!r}, holds no images')
    names = class_names(dataset)
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise UsageError(
            f'data set {name or root!r}, split {split!r}, has {len(names)} classes but the model has {num_classes}; '
            f'pass --num-classes {len(names)} if that is right'
        )
    return dataset


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
            raise RunError(f'images can not be read: {str(e).strip().splitlines()[-1]}') from e
        yield batch


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
    return None


def hold_out(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split training images into those that train the supernet and those that score archs in the search.

    The split depends on the data set and `fraction` alone, not on a seed, so that a later search finds the images
    that an earlier training left out. Classes keep their share where the data set tells them.

    Args:
        dataset: Map-style training set.
        fraction: Share of the images to hold out, in (0, 1).

    Returns:
        Training part and search part.

    Raises:
        UsageError: The fraction is out of range, a part would be empty, or the data set can't be indexed.
    """
    if not 0 < fraction < 1:
        raise UsageError(f'search hold-out {fraction} is out of range, it is a share between 0 and 1')
    if isinstance(dataset, IterableDataset):
        raise UsageError('a streamed data set can not be split; pass --search-holdout 0 and name a --search-split')
    labels = targets(dataset) or [0] * len(dataset)
    generator = torch.Generator().manual_seed(0)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    held = set()
    for label in sorted(by_class):
        indices = by_class[label]
        order = torch.randperm(len(indices), generator=generator).tolist()
        held.update(indices[i] for i in order[: round(len(indices) * fraction)])
    if not held or len(held) == len(labels):
        raise UsageError(f'holding out {fraction} of {len(labels)} images leaves a part empty')
    kept = [i for i in range(len(labels)) if i not in held]
    return Subset(dataset, kept), Subset(dataset, sorted(held))
