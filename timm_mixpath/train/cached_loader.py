"""Training batches of decoded images in memory, for small ones."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch.utils.data import Dataset, IterableDataset

from ..utils.errors import UsageError
from .data import iterate
from .recovery import outlive_signals

__all__ = ['CachedLoader']


class CachedLoader:
    """Training batches of a data set that is decoded once and kept in memory, for small images.

    Where images are small, reading and decoding them costs as much as a training step of a small network. The
    augmentation is the customary one of CIFAR, for whole batches: a shift by up to an eighth of the size in both
    directions, and a horizontal flip.

    Args:
        dataset: Map-style data set; an image takes C * 1.25 * H * 1.25 * W bytes.
        data_config: See `timm.data.resolve_data_config`. Images are resized to its input size; of those that are not
            square the middle is taken.
        batch_size: Images per batch; an incomplete last one is dropped.
        device: Where the batches go.
        hflip: Probability of a flip.
        augment: Shift and flip, neither if False.
        seed: Seed of order and augmentation, with the epoch.
        rank: Of the ranks that share an epoch, the one that this process is.
        world_size: Their number.
        workers: Processes that decode.

    Raises:
        UsageError: The data set can't be indexed.
        RunError: Images can't be read.
    """

    sampler = None

    def __init__(
        self,
        dataset: Dataset,
        data_config: dict[str, Any],
        *,
        batch_size: int,
        device: torch.device | str = 'cpu',
        hflip: float = 0.5,
        augment: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise UsageError('a streamed data set can not be kept in memory; leave --cache-images out')
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.hflip = hflip if augment else 0.0
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch = 0
        channels, height, width = self._size = data_config['input_size']
        self._pad = (height // 8, width // 8) if augment else (0, 0)
        mean = torch.tensor(data_config['mean']) * 255
        self._mean, self._std = mean.to(self.device), torch.tensor(data_config['std']).to(self.device) * 255

        dataset.transform = create_transform(
            data_config['input_size'],
            is_training=False,
            use_prefetcher=True,  # uint8
            interpolation=data_config['interpolation'],
            crop_pct=1.0,
        )
        pad_y, pad_x = self._pad
        shape = (len(dataset), height + 2 * pad_y, width + 2 * pad_x, channels)
        # What a shift brings in is the mean, 0 for the network
        self._images = mean.round().to(torch.uint8).expand(shape).clone()
        self._targets = torch.empty(len(dataset), dtype=torch.int64)
        decoder = torch.utils.data.DataLoader(dataset, 500, num_workers=workers, collate_fn=fast_collate)
        outlive_signals(decoder)  # which would be taken for images that can't be read
        start = 0
        for x, y in iterate(decoder):
            images = self._images[start : start + len(y)]
            images[:, pad_y : pad_y + height, pad_x : pad_x + width] = x.permute(0, 2, 3, 1)
            self._targets[start : start + len(y)] = y
            start += len(y)

    def __len__(self) -> int:
        return len(self._targets) // self.world_size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Order and augmentation are a function of the seed and the epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give batches of normalised images [B, C, H, W], in the channels-last format, and class indices [B]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._targets), generator=generator)  # the same in all ranks
        generator.manual_seed(((self.seed * 1_000_003 + self._epoch) * 65_537 + self.rank) % 2**63)
        order = order[self.rank :: self.world_size]
        _, height, width = self._size
        rows, cols = torch.arange(height), torch.arange(width)
        for indices in order[: len(self) * self.batch_size].split(self.batch_size):
            top, left = (torch.randint(2 * p + 1, (len(indices), 1), generator=generator) for p in self._pad)
            flip = torch.rand(len(indices), 1, generator=generator) < self.hflip
            x = left + torch.where(flip, width - 1 - cols, cols)  # [B, W]
            batch = self._images[indices[:, None, None], (top + rows)[:, :, None], x[:, None, :]]  # [B, H, W, C]
            batch = batch.to(self.device).float().sub_(self._mean).div_(self._std)
            yield batch.permute(0, 3, 1, 2), self._targets[indices].to(self.device)
