"""The images that archs are scored on and recalibrated with."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import Dataset

from ..models.backbone import BackboneNet, BackboneSupernet
from ..train.checkpoint import LoadedModel, state_dict_sha256
from ..train.data import Subset, check_classes, hold_out, image_mode, iterate, open_dataset
from ..utils.errors import UsageError

__all__ = ['Batches', 'SearchData', 'load_batches', 'load_images', 'open_search_split', 'recalibration_batches']

_logger = logging.getLogger(__name__)


# Batches with which a candidate's batch norms are recalibrated: fewer images give noisy variances
_RECALIBRATION_BATCH_SIZE = 128

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


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
        num_images: Number of images to score archs with, all of the split if None.
    """

    data_dir: str | None = None
    dataset: str | None = None
    train_split: str | None = None
    search_holdout: float | None = None
    search_split: str | None = None
    class_map: str | None = None
    dataset_download: bool = False
    num_images: int | None = None


@dataclass
class SearchImages:
    """What archs are scored with.

    Attributes:
        batches: Images of the search split.
        recalibration: Training images to recalibrate batch norms with, None for none.
        fingerprint: What the scores of archs depend on: weights, images and where they come from.
    """

    batches: list[tuple[torch.Tensor, torch.Tensor]]
    recalibration: list[tuple[torch.Tensor, torch.Tensor]] | None
    fingerprint: dict[str, Any]


def load_images(
    loaded: LoadedModel,
    data: SearchData | None,
    recalibration_images: int,
    batch_size: int,
    device: str,
    workers: int,
) -> SearchImages:
    """Decode the search split, and the training images for recalibration."""
    data = data or SearchData()
    search_set, train_set, source = open_search_split(loaded, data)
    batches = load_batches(
        search_set,
        loaded.data_config,
        device=device,
        batch_size=batch_size,
        max_images=data.num_images,
        workers=workers,
    )
    recalibration = None
    if recalibration_images:
        recalibration = recalibration_batches(train_set, loaded, recalibration_images, device, workers)
    supernet = loaded.model
    fingerprint = dict(
        checkpoint_sha256=state_dict_sha256(supernet.state_dict()),
        images_sha256=state_dict_sha256(
            {f'{i} {j}': t for i, batch in enumerate(batches) for j, t in enumerate(batch)}
        ),
        recalibration_sha256=state_dict_sha256({str(i): x for i, (x, _) in enumerate(recalibration or [])}),
        space=supernet.space.name,
        max_paths=supernet.space.max_paths,
        input_size=list(loaded.data_config['input_size']),
        num_images=sum(len(y) for _, y in batches),
        recalibration_images=recalibration_images,
        **source,
    )
    return SearchImages(batches, recalibration, fingerprint)


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
        input_img_mode=pick(None, 'input_img_mode') or image_mode(loaded.data_config['input_size'][0]),
    )
    if data.search_split:
        search_set = open_dataset(dataset, root, data.search_split, **options)
        train_set = open_dataset(dataset, root, train_split, **options)
        splits = {f'split {train_split!r}': train_set, f'split {data.search_split!r}': search_set}
        check_classes(splits, num_classes, trained)
        return search_set, train_set, dict(dataset=dataset, split=data.search_split)
    trained_holdout = getattr(loaded.args, 'search_holdout', None)
    holdout = next(v for v in (data.search_holdout, trained_holdout or None, 0.1) if v is not None)
    # Weights of a backbone were trained on images of others
    is_warm = isinstance(loaded.model, BackboneSupernet | BackboneNet)
    if not warn:
        pass
    elif not vars(loaded.args):
        _logger.warning(
            'a model folder does not tell which images its supernet was trained on; if they include those that score '
            'archs now, errors will look too low. A training checkpoint tells, or name an unseen --search-split'
        )
    elif not trained_holdout or loaded.args.initial_checkpoint or (loaded.args.pretrained and not is_warm):
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
    train_set, search_set = hold_out(whole, holdout)
    return search_set, train_set, dict(dataset=dataset, split=train_split, holdout=holdout)


def recalibration_batches(
    train_set: Any, loaded: LoadedModel, count: int, device: str = 'cpu', workers: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw training images to recalibrate batch norms with, in batches of about equal size.

    Args:
        train_set: Training images.
        loaded: Model that they are for.
        count: Number of images, all if there are fewer.
        device: Where the images are kept.
        workers: Processes that decode.
    """
    # Drawn at random: batch statistics of images that are sorted by class would be those of one class
    count = min(count, len(train_set))
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:count].tolist()
    # every batch counts the same in the average, so a small last one must not be
    batch_size = math.ceil(count / math.ceil(count / _RECALIBRATION_BATCH_SIZE))
    return load_batches(
        Subset(train_set, order), loaded.data_config, device=device, batch_size=batch_size, workers=workers
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
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Decode a data set once and keep it in memory, as a model takes it.

    Args:
        dataset: Map-style data set.
        data_config: See `timm.data.resolve_data_config`.
        device: Where the images are kept.
        batch_size: Images per batch. On a CPU, activations of about 100 small images still fit its caches.
        channels_last: Memory format of the images.
        max_images: Take this many, evenly spread over the data set, all if None.
        workers: Processes that decode.

    Returns:
        Batches of normalised images [B, C, H, W] and class indices [B]. An image takes 4 * C * H * W bytes.

    Raises:
        UsageError: A number is out of range.
        RunError: Images can't be read.
    """
    if batch_size < 1 or workers < 0 or (max_images is not None and max_images < 1):
        raise UsageError(
            f'batch size {batch_size} and number of images {max_images} must be at least 1, '
            f'workers {workers} at least 0'
        )
    device = torch.device(device)
    if max_images is not None and max_images < len(dataset):
        # samples are sorted by class, so an even stride keeps the classes' shares
        dataset = Subset(dataset, [i * len(dataset) // max_images for i in range(max_images)])
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        num_workers=workers,
        persistent_workers=False,
        device=device,
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [(x.contiguous(memory_format=memory_format), y) for x, y in iterate(loader)]
