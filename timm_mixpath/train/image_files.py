"""Image files as pixels of 8 bits, and by their name where they can't be read."""

import logging
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..utils.errors import RunError

__all__ = ['ImageFiles', 'ImagesInMode', 'to_mode']

_logger = logging.getLogger(__name__)

# Of the file system and of Pillow
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)

# Formats whose 32-bit images are 16-bit ones in Pillow's larger type
_SIXTEEN_BIT_FORMATS = ('PNG', 'PPM')


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image, which `PIL.Image.Image.convert` does too, but clips what has more than 8 bits: to white.

    Args:
        image: Image of any mode.
        mode: `'RGB'`, `'L'` or another mode of 8 bits.

    Returns:
        The image; one of 16 bits is scaled to 8, 65535 to 255.

    Raises:
        ValueError: Its pixels are floats or 32-bit integers, whose range nothing tells, or Pillow knows no conversion.
    """
    is_wide = image.mode == 'I' and image.format in _SIXTEEN_BIT_FORMATS
    if image.mode.startswith('I;16') or is_wide:
        pixels = np.asarray(image).astype(np.uint32)  # [H, W]
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        kind = {'I': '32-bit integers', 'F': 'floats'}[image.mode]
        raise ValueError(f'its pixels are {kind}, whose range nothing tells; save it with 8 or 16 bits')
    return image.convert(mode)


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return to_mode(image, mode)
    except ValueError as e:
        raise RunError(f'image {name} can not be used: {e}') from None


def _decode(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()  # decodes, so errors are met here
    except (ValueError, struct.error, zlib.error) as e:  # what Pillow's decoders let through
        raise OSError(str(e)) from e
    return image


class ImageFiles(ImageDataset):
    """timm's `ImageDataset`, with images of all modes as `to_mode` converts them, and with file names in messages.

    As in timm, a file that can't be decoded is skipped with a warning, and the next one takes its place.

    Args:
        dataset: Data set of timm whose files, targets and transform it takes.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(
            '',
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return image, target and additional features of a sample, see timm.

        Raises:
            RunError: An image can't be converted, or one after the other can't be decoded; the message names the file.
        """
        return self.first_readable(range(len(self)), index)

    def first_readable(self, indices: Sequence[int], position: int) -> tuple[Any, ...]:
        """Return the sample of an index, or of the first one behind it whose image can be decoded.

        Args:
            indices: Samples to choose from, in order; the first follows the last.
            position: Where the index is in `indices`.

        Raises:
            RunError: See `__getitem__`.
        """
        for _ in range(self._max_retries):
            index = indices[position]
            try:
                file, target, *features = self.reader[index]
                image = _decode(file)
                break
            except _DECODING_ERRORS as e:
                _logger.warning(f'Skipped image {self._name(index)!r}: {e}')
                position = (position + 1) % len(indices)
        else:
            raise RunError(
                f'{self._max_retries} images one after the other can not be decoded, the last of them '
                f'{self._name(index)!r}; remove them, or save them again'
            )
        if self.input_img_mode:
            image = _converted(image, self.input_img_mode, repr(self._name(index)))
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target, *features

    def _name(self, index: int) -> str:
        try:
            return str(self.filename(index, absolute=True))
        except (AttributeError, NotImplementedError, TypeError):  # a reader of what has no files
            return f'number {index}'


class ImagesInMode(Dataset):
    """A data set of torchvision, whose images are converted as those of files are.

    What is asked of it beside samples, such as `targets`, is answered by the data set.

    Args:
        dataset: Data set that gives images of Pillow with their class, without a transform of its own.
        mode: Mode of 8 bits, see `to_mode`.
    """

    def __init__(self, dataset: Dataset, mode: str) -> None:
        self.dataset = dataset
        self.mode = mode
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return image and target of a sample.

        Raises:
            RunError: The image can't be converted.
        """
        image, target = self.dataset[index]
        image = _converted(image, self.mode, f'number {index}')
        return image if self.transform is None else self.transform(image), target

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)
