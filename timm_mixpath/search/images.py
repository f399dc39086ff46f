"""The images that archs are scored on and recalibrated with."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset

from ..models.backbone import BackboneNet, BackboneSupernet
from ..train.checkpoint import LoadedModel, state_dict_sha256
from ..train.data import (
    Subset,
    check_classes,
    hold_out,
    image_mode,
    is_stream,
    iterate,
    open_dataset,
    read_alone,
    split_record,
    targets,
    warn_of_other_images,
)
from ..utils.distributed import Ranks
from ..utils.errors import UsageError

__all__ = [
    'Batches',
    'ImageBatches',
    'SearchData',
    'describe_images',
    'load_batches',
    'load_images',
    'open_search_split',
    'recalibration_batches',
]

_logger = logging.getLogger(__name__)


# Batches with which a candidate's batch norms are recalibrated: fewer images give noisy variances
_RECALIBRATION_BATCH_SIZE = 128

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]

# How many images archs are scored with, unless more are asked for
_DEFAULT_IMAGES = 20_000

_ALONE = Ranks(0, 1)


class ImageBatches(Sequence):
    """Batches that are kept as the bytes they were decoded to, and normalised when they are used.

    Args:
        batches: Images [B, C, H, W], uint8, and class indices [B], on the device.
        data_config: See `timm.data.resolve_data_config`.
        channels_last: Memory format of the images that come out.
    """

    def __init__(
        self, batches: list[tuple[torch.Tensor, torch.Tensor]], data_config: dict[str, Any], channels_last: bool = True
    ) -> None:
        self.raw = batches
        self._data_config = data_config
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # One for all rounds: on a GPU each has a stream, with memory of its own
        self._loader = self._make_loader(batches)

    def _make_loader(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterable[Any]:
        if not batches:
            return ()
        config, device = self._data_config, batches[0][0].device
        return PrefetchLoader(batches, config['mean'], config['std'], config['input_size'][0], device)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            channels_last = self._memory_format == torch.channels_last
            return ImageBatches(self.raw[index], self._data_config, channels_last)
        return next(self._normalised(self._make_loader([self.raw[index]])))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._normalised(self._loader)

    def _normalised(self, loader: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [B, C, H, W], float32, as timm's loader gives them, and class indices [B]."""
        for x, y in loader:
            yield x.contiguous(memory_format=self._memory_format), y

    @property
    def num_images(self) -> int:
        return sum(len(y) for _, y in self.raw)

    def digests(self) -> list[str]:
        """Return the SHA-256 of every batch."""
        return [state_dict_sha256({'images': x, 'classes': y}) for x, y in self.raw]


@dataclass
class SearchData:
    """Where the search split comes from. None takes the value that the supernet was trained with.

    Attributes:
        data_dir: Root folder.
        dataset: Type and name as in timm.
        train_split: Training split, of which a share is held out for the search.
        search_holdout: The share. It must be the one that the training left out, or the supernet has seen the images.
        search_split: A split that is used whole instead of held-out training images.
        class_map: File that maps class names to indices.
        dataset_download: Download the data set where timm can.
        num_images: Number of images to score archs with, all of the split if None, but at most 20,000; of a stream
            the first ones.
        input_key: Key of the images in data sets of wds/, hfds/ and hfids/.
        target_key: Key of the class indices in them.
    """

    data_dir: str | None = None
    dataset: str | None = None
    train_split: str | None = None
    search_holdout: float | None = None
    search_split: str | None = None
    class_map: str | None = None
    dataset_download: bool = False
    num_images: int | None = None
    input_key: str | None = None
    target_key: str | None = None


@dataclass
class SearchImages:
    """What archs are scored with.

    Attributes:
        batches: Images of the search split, this process's share.
        recalibration: Training images to recalibrate batch norms with, None for none.
        fingerprint: What the scores of archs depend on: weights, images and where they come from.
    """

    batches: ImageBatches
    recalibration: ImageBatches | None
    fingerprint: dict[str, Any]


def load_images(
    loaded: LoadedModel,
    data: SearchData | None,
    recalibration_images: int,
    batch_size: int,
    device: str,
    workers: int,
    ranks: Ranks = _ALONE,
) -> SearchImages:
    """Decode the search split, and the training images for recalibration; every process its share of the batches."""
    data = data or SearchData()
    search_set, train_set, source = open_search_split(loaded, data)
    count = data.num_images
    if count is None and is_stream(search_set):
        count = _DEFAULT_IMAGES
    elif count is None and len(search_set) > _DEFAULT_IMAGES:
        count = _DEFAULT_IMAGES
        if ranks.rank == 0:
            _logger.info(
                f'Scoring archs on {count:,} of the {len(search_set):,} images of the search split; --num-images '
                'takes another number'
            )
    batches = load_batches(
        search_set,
        loaded.data_config,
        device=device,
        batch_size=batch_size,
        max_images=count,
        workers=workers,
        ranks=ranks,
    )
    recalibration = None
    if recalibration_images:
        recalibration = recalibration_batches(train_set, loaded, recalibration_images, device, workers, ranks)
    supernet = loaded.model
    num_images = sum(ranks.gather(lambda: batches.num_images))
    if ranks.rank == 0 and (idle := ranks.world_size - math.ceil(num_images / batch_size)) > 0:
        _logger.warning(
            f'{num_images} images in batches of {batch_size} leave {idle} of {ranks.world_size} processes without '
            'work; lower --batch-size or take more images'
        )
    fingerprint = dict(
        checkpoint_sha256=state_dict_sha256(supernet.state_dict()),
        images_sha256=_sha256_of_all(batches, ranks),
        recalibration_sha256=_sha256_of_all(recalibration, ranks),
        space=supernet.space.name,
        max_paths=supernet.space.max_paths,
        input_size=list(loaded.data_config['input_size']),
        num_images=num_images,
        recalibration_images=recalibration_images,
        **_normalisation(loaded.data_config),
        **source,
    )
    return SearchImages(batches, recalibration, fingerprint)


def _normalisation(data_config: dict[str, Any]) -> dict[str, list[float]]:
    """Mean and std where they are not the usual ones; the bytes that are kept do not tell them."""
    usual = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    return {name: list(data_config[name]) for name, value in usual.items() if tuple(data_config[name]) != value}


def describe_images(fingerprint: dict[str, Any]) -> str:
    """Return in a few words what archs are scored on, by a fingerprint of `load_images`."""
    held_out = 'held out of' if fingerprint.get('holdout') else 'of'
    return f'{fingerprint["num_images"]} images {held_out} split {fingerprint["split"]!r}'


def _sha256_of_all(batches: ImageBatches | None, ranks: Ranks) -> str:
    digests = [] if batches is None else ranks.interleave(batches.digests)
    return hashlib.sha256('\n'.join(digests).encode()).hexdigest()


def open_search_split(loaded: LoadedModel, data: SearchData, *, warn: bool = True) -> tuple[Any, Any, dict[str, Any]]:
    """Return the search split, the training images and a description of where the split comes from.

    Args:
        loaded: Model that the images are for.
        data: Where the split comes from.
        warn: Say when the model may have been trained on the split, which makes accuracies look too good.
    """

    def pick(value: Any, name: str, default: Any = None) -> Any:
        return value if value is not None else getattr(loaded.args, name, default)

    dataset = pick(data.dataset, 'dataset', '')
    root = pick(data.data_dir, 'data_dir')
    train_split = pick(data.train_split, 'train_split', 'train')
    num_classes, trained = loaded.model.num_classes, loaded.label_names
    options = dict(
        class_map=pick(data.class_map, 'class_map', ''),
        download=data.dataset_download,
        input_img_mode=image_mode(loaded.data_config['input_size'][0], pick(None, 'input_img_mode')),
        input_key=pick(data.input_key, 'input_key'),
        target_key=pick(data.target_key, 'target_key'),
    )
    if dataset.lower().startswith('hfids/'):
        options['num_samples'] = data.num_images or _DEFAULT_IMAGES  # it asks for a number, and reads as it is told
    if data.search_split:
        search_set = open_dataset(dataset, root, data.search_split, **options)
        train_set = open_dataset(dataset, root, train_split, **options)
        splits = {f'split {train_split!r}': train_set, f'split {data.search_split!r}': search_set}
        check_classes(splits, num_classes, trained)
        return search_set, train_set, dict(dataset=dataset, split=data.search_split)
    trained_holdout, record = (getattr(loaded.args, name, None) for name in ('search_holdout', 'held_out'))
    holdout = next(v for v in (data.search_holdout, trained_holdout or None, 0.1) if v is not None)
    if not warn:
        pass
    elif not vars(loaded.args):
        _logger.warning(
            'a model folder does not tell which images its supernet was trained on; if they include those that score '
            'archs now, errors will look too low. A training checkpoint tells, or name an unseen --search-split'
        )
    elif not trained_holdout or _started_from_seen(loaded):
        _logger.warning(
            'the supernet was trained on all training images, or started from weights that may have been, also on '
            'those that score archs now: errors will look too low. Train with `timm-mixpath train`, which holds a '
            'search split out, or name an unseen --search-split'
        )
    elif holdout != trained_holdout:
        _logger.warning(
            f'the training held out {trained_holdout} of the images, the search takes {holdout}: '
            'some of them may have been trained on'
        )
    whole = open_dataset(dataset, root, train_split, **options)
    check_classes({f'split {train_split!r}': whole}, num_classes, trained)
    train_set, search_set = hold_out(whole, holdout, by_position=bool(trained_holdout) and record is None)
    if warn and record is not None and holdout == trained_holdout:
        warn_of_other_images(record, split_record(search_set))
    labels = targets(whole) if warn else None
    if labels and (unseen := set(labels) - {labels[i] for i in search_set.indices}):
        _logger.warning(
            f'{len(unseen)} of {len(set(labels))} classes have too few images to hold out {holdout} of them, so archs '
            'are scored without them; a larger share in the training and the search, or a --search-split, has them'
        )
    return search_set, train_set, dict(dataset=dataset, split=train_split, holdout=holdout)


def _started_from_seen(loaded: LoadedModel) -> bool:
    """Whether a training started from weights that may have been trained on what it held out."""
    args = loaded.args
    start = getattr(args, 'start_held_out', None)
    if start is not None:
        return start != getattr(args, 'held_out', None)
    # Nothing tells of what: those of a backbone were trained on images of others
    is_warm = isinstance(loaded.model, BackboneSupernet | BackboneNet)
    return bool(args.initial_checkpoint or (args.pretrained and not is_warm))


def recalibration_batches(
    train_set: Any,
    loaded: LoadedModel,
    count: int,
    device: str = 'cpu',
    workers: int = 2,
    ranks: Ranks = _ALONE,
) -> ImageBatches:
    """Draw training images to recalibrate batch norms with, in batches of about equal size.

    Args:
        train_set: Training images.
        loaded: Model that they are for.
        count: Number of images, all if there are fewer.
        device: Where the images are kept.
        workers: Processes that decode.
        ranks: Processes that get every one in turn of the batches each.
    """
    if is_stream(train_set):
        batch_size = math.ceil(count / math.ceil(count / _RECALIBRATION_BATCH_SIZE))
        return load_batches(
            train_set, loaded.data_config, device=device, batch_size=batch_size, max_images=count, ranks=ranks
        )
    # Drawn at random: batch statistics of images that are sorted by class would be those of one class
    count = min(count, len(train_set))
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:count].tolist()
    # batch norms that see a few images only have poor statistics
    batch_size = math.ceil(count / math.ceil(count / _RECALIBRATION_BATCH_SIZE))
    return load_batches(
        Subset(train_set, order),
        loaded.data_config,
        device=device,
        batch_size=batch_size,
        workers=workers,
        ranks=ranks,
    )


def load_batches(
    dataset: Dataset,
    data_config: dict[str, Any],
    *,
    device: torch.device | str = 'cpu',
    batch_size: int = 100,
    channels_last: bool = True,
    max_images: int | None = None,
    workers: int = 2,
    ranks: Ranks = _ALONE,
) -> ImageBatches:
    """Decode a data set once and keep it in memory, for a model.

    Args:
        dataset: Data set. Of a stream every process reads all images, and keeps its share.
        data_config: See `timm.data.resolve_data_config`.
        device: Where the images are kept.
        batch_size: Images per batch. On a CPU, activations of about 100 small images still fit its caches.
        channels_last: Memory format of the images.
        max_images: Take this many, evenly spread over the data set, of a stream the first ones; all if None.
        workers: Processes that decode.
        ranks: Processes that get every one in turn of the batches each.

    Returns:
        Batches of normalised images [B, C, H, W] and class indices [B]. An image takes C * H * W bytes, and four times
        that while it is used.

    Raises:
        UsageError: A number is out of range.
        RunError: Images can't be read.
    """
    for what, number, least in (
        ('batch size', batch_size, 1),
        ('number of images', max_images, 1),
        ('number of workers', workers, 0),
    ):
        if number is not None and number < least:
            raise UsageError(f'{what} {number} must be at least {least}')
    device = torch.device(device)
    stream = is_stream(dataset)
    if stream:
        read_alone(dataset)
        workers = min(workers, 1)  # several would mix the shards, in another order for another number of them
    elif max_images is not None and max_images < len(dataset):
        # samples are sorted by class, so an even stride keeps the classes' shares
        dataset = Subset(dataset, [i * len(dataset) // max_images for i in range(max_images)])
    if ranks.world_size > 1 and not stream:
        starts = range(ranks.rank * batch_size, len(dataset), ranks.world_size * batch_size)
        dataset = Subset(dataset, [i for a in starts for i in range(a, min(a + batch_size, len(dataset)))])
    if not stream and not len(dataset):
        return ImageBatches([], data_config, channels_last)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config.get('crop_mode'),
        num_workers=workers,
        persistent_workers=False,
        device=device,
    )
    # What timm's prefetcher would normalise, before it does
    batches = iterate(loader.loader)
    if stream:
        batches = islice(_first(batches, max_images), ranks.rank, None, ranks.world_size)
    return ImageBatches([(_kept(x, device), _kept(y, device)) for x, y in batches], data_config, channels_last)


def _kept(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    # What comes from another process lies in shared memory, of which containers have little, and keeps a file open
    return x.clone() if x.is_shared() and device.type == 'cpu' else x.to(device)


def _first(batches: Iterator[Any], max_images: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the first images."""
    left = math.inf if max_images is None else max_images
    for x, y in batches:
        yield (x, y) if len(y) <= left else (x[: int(left)], y[: int(left)])
        left -= len(y)
        if left <= 0:
            return
