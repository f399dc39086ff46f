"""Accuracy of archs with the weights of a supernet, and recalibration of batch norm statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import create_loader
from timm.task import ClassificationEvaluator
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.data import Dataset

from .arch import Arch
from .data import Subset, read
from .errors import UsageError
from .supernet import Supernet

__all__ = ['SupernetEvaluator', 'evaluate', 'load_batches', 'recalibrate_bn']

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


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
    return [(x.contiguous(memory_format=memory_format), y) for x, y in read(loader)]


def evaluate(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return `top1` and `top5` (percent) and `loss` (cross-entropy, nats) of a model.

    Args:
        model: Model, put into eval mode. A supernet is evaluated at its `active_arch`.
        batches: Images [B, C, H, W] and class indices [B], on the model's device.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=batches[0][0].device)
    with torch.inference_mode():
        for x, y in batches:
            evaluator.update(model(x), y)
    return dict(evaluator.compute())


@contextmanager
def recalibrate_bn(supernet: Supernet, arch: Arch | str, batches: Batches) -> Iterator[Supernet]:
    """Within the context, `arch` runs with batch norm statistics of its own.

    The statistics of the batch norms that the arch uses are reset and averaged over the batches; afterwards those of
    the supernet are back. Nothing is carried from one candidate to the next.

    Args:
        supernet: Supernet, put into eval mode.
        arch: Arch to recalibrate.
        batches: Training images [B, C, H, W]; a few hundred suffice, batches should not be small.

    Yields:
        The supernet, in eval mode, with `active_arch` set.
    """
    supernet.eval()
    supernet.active_arch = arch
    norms = [m for m in supernet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [
        (bn, bn.momentum, bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone())
        for bn in norms
    ]
    try:
        for bn in norms:
            bn.reset_running_stats()
            bn.momentum = None  # cumulative average over the batches
            bn.train()
        with torch.no_grad():
            for x, _ in batches:
                supernet(x)
        for bn in norms:
            bn.eval()
        yield supernet
    finally:
        for bn, momentum, mean, var, tracked in saved:
            bn.momentum = momentum
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(var)
            bn.num_batches_tracked.copy_(tracked)
            bn.eval()


class SupernetEvaluator:
    """Scores archs with a supernet's weights, on images that stay in memory.

    Without recalibration the batch norms are folded into the convolutions once, for all archs: shadow batch norms
    behind a projection become one projection per number of paths.

    Args:
        supernet: Trained supernet; it is copied where folding changes it.
        batches: Search split, see `load_batches`.
        recalibration_batches: Training images to recalibrate every arch with, none if None.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Batches,
        recalibration_batches: Batches | None = None,
    ) -> None:
        self.batches = batches
        self.recalibration_batches = recalibration_batches
        supernet.eval()
        self.supernet = supernet if recalibration_batches else reparameterize_model(supernet)

    def __call__(self, arch: Arch | str) -> dict[str, float]:
        """Return `top1`, `top5` (percent) and `loss` (nats) of an arch."""
        if self.recalibration_batches:
            with recalibrate_bn(self.supernet, arch, self.recalibration_batches) as supernet:
                return evaluate(supernet, self.batches)
        self.supernet.active_arch = arch
        return evaluate(self.supernet, self.batches)
