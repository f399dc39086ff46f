"""What `adapt` is to do, and what it may take from an earlier job."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from timm.models import get_pretrained_cfg

from ..models.backbone import check_backbone, check_weights
from ..utils.errors import UsageError
from ..utils.numbers import check_at_least
from ..utils.precision import AMP_DTYPES
from .common import describe_job

__all__ = ['AdaptConfig', 'as_begun', 'check_config', 'find_reused']


@dataclass(frozen=True)
class AdaptConfig:
    """What to adapt to what.

    Attributes:
        backbone: Network of timm, see `timm_mixpath.list_backbones`.
        backbone_weights: File of its weights, those that timm has on the Hub if None.
        data_dir: Root of an image data set with a training and a validation split.
        dataset: Type and name as in timm.
        train_split: Training split; a tenth of it scores archs in the search and trains nothing.
        val_split: Validation split, for the final accuracies only.
        dataset_download: Download the data set where timm can.
        class_map: File that maps class names to indices.
        input_key: Key of the images in data sets of hfds/, endings of the files of a folder.
        target_key: Key of the class indices in data sets of hfds/.
        img_size: Size that the images are brought to, in pixels; the backbone's if None. Of several the search chooses:
            smaller images are the other way to a limit. The backbone is fine-tuned with the largest.
        max_macs: Limit of the search, for the images of the size that it is made with.
        max_params: Limit of the search.
        max_latency: Limit of the search, in milliseconds per batch of the latency table.
        search_floor: Share of the only limit below which networks are not looked at, where the backbone is above it; 0
            for none.
        latency_table: File of a `LatencyTable` of the space around the backbone.
        m: Largest number of paths that are summed.
        reduce_only: Search neither kernels larger than the backbone's nor sums of paths where the supernet is not
            trained. There they compute what the backbone does; it is the training of the winner that may use them.
        finetune_epochs: Epochs of the backbone.
        winner_epochs: Epochs of the winner; the less it costs than the backbone, the more it gains by them. 0 for none:
            what the backbone's features give it by least squares.
        supernet_epochs: Epochs of the supernet, 0 to search it as it starts. None takes 0 where the backbone is outside
            the limits, `SUPERNET_EPOCHS` where it is inside them with the largest images: at the start nothing is
            better than the backbone, and kernels that are larger compute the same.
        batch_size: Images per step.
        generations: Generations of the search; searches with images of several sizes share them, but have at least 2
            if there are as many.
        num_images: Number of images to score archs with, at most.
        recalibration_images: Training images to recalibrate the batch norms of every candidate with, 0 for none.
        refit_images: Training images on which the blocks of the winner are brought near the backbone's before
            it is trained, see `timm_mixpath.refit`, 0 for none; not behind a supernet that was trained.
        lr: Learning rate of AdamW for the supernet and the winner; a quarter of it for the backbone, and for a winner
            whose top-1 in the search was within 5 points of the backbone's on the validation split.
        distill: The fine-tuned backbone teaches the supernet and the winner.
        seed: Seed of everything.
        reuse: Folder of an earlier job with the same images and the same training of the backbone, which is used, as is
            a supernet that was trained for as many epochs. What follows is done again, for another limit.
        workers: Processes that load images.
        device: Device, the GPU if there is one and None is given.
        cpu_kernels: Train with faster gradients on the CPU, see `models.cpu_kernels`.
        amp: Mixed precision in the trainings and the search. The networks that are made are float32 in any case.
        amp_dtype: Its dtype, 'float16' or 'bfloat16'.
    """

    backbone: str
    backbone_weights: str | None = None
    data_dir: str | None = None
    dataset: str = ''
    train_split: str = 'train'
    val_split: str = 'validation'
    dataset_download: bool = False
    class_map: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    img_size: int | Sequence[int] | None = None
    max_macs: int | None = None
    max_params: int | None = None
    max_latency: float | None = None
    search_floor: float = 0.8
    latency_table: str | None = None
    m: int = 2
    reduce_only: bool = False
    finetune_epochs: int = 3
    winner_epochs: int = 8
    supernet_epochs: int | None = None
    batch_size: int = 32
    generations: int = 10
    num_images: int = 500
    recalibration_images: int = 256
    refit_images: int = 512
    lr: float = 1e-3
    distill: bool = True
    seed: int = 0
    reuse: str | None = None
    workers: int = 2
    device: str | None = None
    cpu_kernels: bool = False
    amp: bool = False
    amp_dtype: str = AMP_DTYPES[0]

    def __post_init__(self) -> None:
        if self.img_size is None:
            return
        sizes = self.img_size if isinstance(self.img_size, Sequence) else (self.img_size,)
        if not sizes or not all(type(size) is int for size in sizes):
            raise UsageError(f'--img-size {self.img_size!r} must be one or more integers')
        sizes = tuple(sorted(set(sizes)))  # in any order they are the same job
        object.__setattr__(self, 'img_size', sizes if len(sizes) > 1 else sizes[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of images to try, in pixels, in ascending order; the backbone is fine-tuned with the last."""
        return _sizes(self.img_size, self.backbone)


def _sizes(img_size: int | Sequence[int] | None, backbone: str) -> tuple[int, ...]:
    if img_size is None:
        return (get_pretrained_cfg(backbone).input_size[1],)
    return (img_size,) if isinstance(img_size, int) else tuple(img_size)


def check_config(config: AdaptConfig) -> None:
    """Check what can be checked without images, before hours of training and not behind them.

    Raises:
        UsageError: There is no such backbone, or a value is out of range.
    """
    check_backbone(config.backbone)
    if config.backbone_weights:
        check_weights(config.backbone, config.backbone_weights)
    if config.data_dir is None and not config.dataset:
        raise UsageError('no images: pass --data-dir DIR with train/ and validation/, or --dataset NAME')
    if config.sizes[0] < 1:
        raise UsageError(f'--img-size {config.sizes[0]} must be at least 1')
    at_least = dict.fromkeys(('finetune_epochs', 'batch_size', 'num_images'), 1)
    at_least |= dict.fromkeys(('recalibration_images', 'refit_images', 'supernet_epochs', 'winner_epochs'), 0)
    check_at_least(config, at_least)
    for option in ('recalibration_images', 'refit_images'):
        if getattr(config, option) == 1:
            raise UsageError(f'--{option.replace("_", "-")} 1 has no batch statistics; 0 for none, or some hundreds')
    if not 0 <= config.search_floor < 1:
        raise UsageError(f'--search-floor {config.search_floor} must be at least 0 and below 1')
    if config.amp_dtype not in AMP_DTYPES:
        raise UsageError(f'--amp-dtype {config.amp_dtype!r} must be one of {", ".join(AMP_DTYPES)}')
    if not 0 < config.lr < math.inf:
        raise UsageError(f'--lr {config.lr} must be a positive number')


# Options on which the training of the supernet depends, but not that of the backbone
_OF_THE_SUPERNET = ('supernet_epochs', 'm', 'distill')

# Options that may differ between a job and the one whose backbone it uses
_NOT_OF_THE_BACKBONE = frozenset({
    'dataset_download', 'max_macs', 'max_params', 'max_latency', 'search_floor', 'reduce_only', 'latency_table',
    'generations', 'num_images', 'recalibration_images', 'refit_images', 'reuse', 'workers', 'device', 'cpu_kernels',
    'amp', 'amp_dtype', 'winner_epochs', *_OF_THE_SUPERNET,
})  # fmt: skip


def as_begun(config: AdaptConfig, output: str | os.PathLike) -> AdaptConfig:
    """Return a job as the version began it that made its folder: earlier ones searched without a floor."""
    try:
        job = json.loads((Path(output) / 'adapt.json').read_text())
    except (OSError, ValueError):  # a new one, or damaged, which the job finds out
        return config
    is_earlier = isinstance(job, dict) and 'search_floor' not in job
    return replace(config, search_floor=0.0) if is_earlier else config


def find_reused(config: AdaptConfig, folder: Path) -> dict[str, Path]:
    """Check that a job can go on from what another one trained; return the folders of the trainings that it takes."""
    mine, jobs = describe_job(asdict(config)), {}
    while folder not in jobs:
        try:
            jobs[folder] = describe_job(json.loads((folder / 'adapt.json').read_text()))
        except (OSError, ValueError):
            raise UsageError(f'--reuse {str(folder)!r} is not the output folder of an adapt job') from None
        folder = Path(jobs[folder].get('reuse') or folder)  # of which it took what it did not train itself
    theirs = jobs[folder]
    for options in (mine, theirs):
        options['img_size'] = max(_sizes(options.get('img_size'), config.backbone))  # that of the backbone
    for name in mine:
        if name not in _NOT_OF_THE_BACKBONE and (other := theirs.get(name)) != mine[name]:
            raise UsageError(
                f'--reuse {str(folder)!r} has another {name} ({other!r}, now {mine[name]!r}), and so another backbone'
            )
    if not all((folder / 'backbone' / name).exists() for name in ('model', 'summary.csv')):
        raise UsageError(f'--reuse {str(folder)!r} has not trained its backbone to the end yet; let it do that first')
    reused = {'backbone': folder / 'backbone'}
    for folder, other in jobs.items():
        is_like_mine = all(other.get(name) == mine[name] for name in _OF_THE_SUPERNET)
        # a search follows the training of a supernet: one that is still trained must not be trained from here, too
        if is_like_mine and (folder / 'supernet').exists() and (folder / 'search').exists():
            return {**reused, 'supernet': folder / 'supernet'}
    return reused
