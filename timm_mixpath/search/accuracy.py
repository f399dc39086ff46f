"""Accuracy of archs with the weights of a supernet, and recalibration of batch norm statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from timm.utils import reparameterize_model
from torch import nn

from ..models.supernet import Supernet
from ..spaces.arch import Arch
from .images import Batches

__all__ = ['SupernetEvaluator', 'evaluate', 'recalibrate_bn']


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
    saved: dict[nn.modules.batchnorm._BatchNorm, tuple[float | None, tuple[torch.Tensor, ...]]] = {}

    def reset(bn: nn.modules.batchnorm._BatchNorm, _: Any) -> None:
        # in front of its first forward pass: an arch runs a fraction of the norms of its supernet
        if bn not in saved:
            saved[bn] = bn.momentum, tuple(s.clone() for s in (bn.running_mean, bn.running_var, bn.num_batches_tracked))
            bn.reset_running_stats()
            bn.momentum = None  # cumulative average over the batches
            bn.train()

    hooks = [
        module.register_forward_pre_hook(reset)
        for module in supernet.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    try:
        try:
            with torch.no_grad():
                for x, _ in batches:
                    supernet(x)
        finally:
            for hook in hooks:
                hook.remove()
            for bn in saved:
                bn.eval()
        yield supernet
    finally:
        for bn, (momentum, statistics) in saved.items():
            bn.momentum = momentum
            for now, before in zip((bn.running_mean, bn.running_var, bn.num_batches_tracked), statistics):
                now.copy_(before)


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
