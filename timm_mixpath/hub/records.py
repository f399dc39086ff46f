"""What the checkpoint of a training and the folder of a search say of a model."""

import json
import logging
import math
import os
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..models.supernet import Supernet
from ..train.checkpoint import LoadedModel
from ..train.data import HOLDOUT_SPLIT, class_names, open_dataset
from ..utils.errors import RunError, UsageError
from ..utils.tables import read_csv

__all__ = ['PLOT', 'SearchRecord', 'TrainingRecord', 'ValidationRecord', 'read_results', 'read_search', 'read_training']


_logger = logging.getLogger(__name__)

PLOT = 'pareto.png'


@dataclass
class TrainingRecord:
    """How a model was trained and what it then scored.

    Attributes:
        args: Options of the training.
        epoch: Epoch of the weights, counted from 0.
        is_ema: The weights are averaged ones.
        is_best: The epoch was chosen by its validation metric.
        metrics: `top1`, `top5` (percent) and `loss` on the validation split after that epoch, those that are known.
    """

    args: Namespace
    epoch: int | None = None
    is_ema: bool = False
    is_best: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class SearchRecord:
    """What a search folder says.

    Attributes:
        front: Content of front.json.
        plot: Path of the Pareto plot, None if there is none.
        candidate: Entry of the model's arch, None for a supernet.
    """

    front: dict[str, Any]
    plot: Path | None = None
    candidate: dict[str, Any] | None = None


@dataclass
class ValidationRecord:
    """What timm's validate.py measured of a model, with the weights as they are stored.

    Attributes:
        metrics: `top1` and `top5`, percent.
        img_size: Height and width of the images, pixels.
        crop_pct: Share of the resized image that was the centre crop.
    """

    metrics: dict[str, float]
    img_size: int
    crop_pct: float


def read_training(checkpoint: Path, loaded: LoadedModel) -> TrainingRecord | None:
    """Collect what a training checkpoint and its folder hold, None for a model folder, a Hub repo and weights alone.

    Args:
        checkpoint: File that `loaded` was loaded from.
        loaded: The model.
    """
    args = loaded.args
    if not vars(args) or getattr(args, 'is_model_only', False):
        return None
    record = TrainingRecord(args, loaded.epoch, loaded.is_ema, is_best='best' in checkpoint.name)
    summary = checkpoint.with_name('summary.csv')
    for row in read_csv(summary) if summary.exists() else ():
        if row.get('epoch') == str(loaded.epoch):
            values = {name: _number(row.get(f'eval_{name}')) for name in ('top1', 'top5', 'loss')}
            record.metrics = {name: value for name, value in values.items() if value is not None}
    metric = getattr(args, 'eval_metric', None)
    if loaded.metric is not None and getattr(args, 'val_split', None) and metric in ('top1', 'top5'):
        known = record.metrics.setdefault(metric, float(loaded.metric))
        if not math.isclose(known, loaded.metric, abs_tol=0.01):
            raise RunError(
                f'summary.csv beside {str(checkpoint)!r} says {metric} {known} for epoch {loaded.epoch}, the '
                f'checkpoint itself {loaded.metric}: they are not of the same run; copy the checkpoint elsewhere or '
                'restore the file'
            )
    return record


def read_results(path: str | os.PathLike, model: nn.Module) -> ValidationRecord:
    """Read what timm's validate.py wrote with `--results-file FILE --results-format json`.

    Args:
        path: The file.
        model: The model that was measured.

    Raises:
        UsageError: It is no such file, or is of a model with another number of parameters.
    """
    if not Path(path).is_file():
        raise UsageError(f'file of results {str(path)!r} does not exist')
    try:
        content = json.loads(Path(path).read_text())
        metrics = {name: float(content[name]) for name in ('top1', 'top5')}
        record = ValidationRecord(metrics, int(content['img_size']), float(content['crop_pct']))
        params = float(content['param_count'])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{str(path)!r} is not a result of timm's validate.py; it writes one with `--results-file {path} "
            '--results-format json`'
        ) from None
    own = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    if own != params:
        raise UsageError(f'{str(path)!r} is of a network of {params} M parameters, this one has {own} M')
    return record


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_search(folder: Path, model: nn.Module, weights_sha256: str) -> SearchRecord:
    """Read the output folder of the search that found a model, or that searched a supernet.

    Args:
        folder: Output folder of `timm-mixpath search`.
        model: The model.
        weights_sha256: Fingerprint of its weights, as a search notes it.

    Raises:
        UsageError: It is no such folder, or its search has nothing to do with the model.
    """
    try:
        front = json.loads((folder / 'front.json').read_text())
        archs = {entry['arch']: entry for entry in front['front']}
        config, fingerprint = front['config'], front['fingerprint']
        config['algorithm'], front['num_evaluations'], front['space']
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f'{str(folder)!r} is not the output folder of a finished `timm-mixpath search`, it has no valid front.json'
        ) from None
    if front['space'] != model.space.name:
        raise UsageError(f'the search in {str(folder)!r} is of space {front["space"]}, not of {model.space.name}')
    record = SearchRecord(front)
    if isinstance(model, Supernet):
        if fingerprint.get('checkpoint_sha256') != weights_sha256:
            raise UsageError(f'the search in {str(folder)!r} used the weights of another supernet')
    else:
        record.candidate = archs.get(str(model.arch))
        if record.candidate is None:
            raise UsageError(
                f'arch {model.arch} is not on the front of the search in {str(folder)!r}; name the folder of the '
                'search that found it, or leave --search out'
            )
    if (folder / PLOT).exists():
        record.plot = folder / PLOT
    return record


def find_label_names(loaded: LoadedModel) -> list[str] | None:
    """Return the class names that a model was trained with, in the order of their index.

    They are in checkpoints of this package and in model folders that tell them; for other checkpoints the data set of
    the training is asked, if it is still there.

    Returns:
        The names, None if nothing tells them or they are of another number of classes.
    """
    names = loaded.label_names
    args = loaded.args
    dataset, split = getattr(args, 'dataset', ''), getattr(args, 'val_split', '') or getattr(args, 'train_split', '')
    if split == HOLDOUT_SPLIT:
        split = args.train_split
    if not names and split and (dataset or getattr(args, 'data_dir', None)):
        try:
            options = dict(num_classes=loaded.model.num_classes, class_map=args.class_map)
            names = class_names(open_dataset(dataset, args.data_dir, split, **options))
        except (UsageError, RunError, OSError, ImportError) as e:
            _logger.warning(f'config.json gets no class names, the data set of the training is not there: {e}')
    return names if names and len(names) == loaded.model.num_classes else None
