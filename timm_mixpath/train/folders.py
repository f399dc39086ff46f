"""Folders of classes, of which timm reads some files and leaves out the others without a word."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import get_img_extensions

from ..utils.errors import UsageError

__all__ = ['check_folders', 'shortened']

_logger = logging.getLogger(__name__)


def check_folders(reader: Any, what: str, class_map: str | None = None, input_key: str | None = None) -> None:
    """Check that no class is left out unseen, and that a class map numbers the classes from 0 on.

    Args:
        reader: Reader of timm; one that does not read class folders is not looked at.
        what: What messages call its images.
        class_map: File that maps class names to indices.
        input_key: Endings of the files that are read, timm's usual ones if None.

    Raises:
        UsageError: All images of a folder are of a kind that is not read, or indices are missing or given twice.
    """
    mapping, root = getattr(reader, 'class_to_idx', None), getattr(reader, 'root', '')
    if not mapping or not Path(root).is_dir():
        return
    if class_map:
        _check_map(mapping, {sample[1] for sample in reader.samples}, what, class_map)
    kinds = set((input_key or '').split(';')) - {''} or get_img_extensions(as_set=True)
    unread: list[str] = []
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        endings = [os.path.splitext(entry.name)[1].lower() for entry in os.scandir(folder)]
        others = [ending for ending in endings if ending not in kinds and ending in Image.registered_extensions()]
        is_read = any(ending in kinds for ending in endings)
        if class_map and is_read and folder.name not in mapping:
            _logger.warning(f'{what}: folder {folder.name!r} is left out, --class-map {class_map} has no such class')
        if others and not is_read:
            raise UsageError(
                f'the {len(others)} images in {str(folder)!r} are of a kind that is not read ({_joined(others)}), so '
                f'that class would be left out; convert them{_advice(kinds, others)}'
            )
        unread += others
    if unread:
        _logger.warning(
            f'{what}: {len(unread)} images are left out, of a kind that is not read ({_joined(unread)}); convert them'
            f'{_advice(kinds, unread)}'
        )


def _check_map(mapping: dict[str, int], used: set[int], what: str, class_map: str) -> None:
    indices = sorted(mapping.values())
    if indices != list(range(len(mapping))):
        raise UsageError(
            f'--class-map {class_map} gives {len(mapping)} classes the indices {shortened(indices)}, they have to be '
            'those from 0 on, each once; a class that is named twice leaves a gap'
        )
    if unused := [name for name, index in mapping.items() if index not in used]:
        _logger.warning(f'{what} has no images of {shortened(unused)}, which --class-map {class_map} names')


def _advice(kinds: Iterable[str], others: Iterable[str]) -> str:
    return f", or name all kinds, as --input-key '{';'.join(sorted({*kinds, *others}))}'"


def _joined(endings: Iterable[str]) -> str:
    return ', '.join(sorted(set(endings)))


def shortened(names: Sequence[object]) -> str:
    """Return the first few names in quotes, and how many more there are."""
    shown = ', '.join(repr(str(name)) for name in names[:5])
    return f'{shown} and {len(names) - 5} more' if len(names) > 5 else shown
