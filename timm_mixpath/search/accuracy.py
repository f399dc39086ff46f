"""Accuracy of archs with the weights of a supernet, and recalibration of batch norm statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from timm.utils import reparameterize_model
from torch import nn

from ..models.supernet import Supernet
from ..spaces.arch import Arch
from ..utils.distributed import Ranks
from ..utils.errors import UsageError
from ..utils.precision import AMP_DTYPES, autocast_context
from .images import Batches

__all__ = ['SupernetEvaluator', 'evaluate', 'prepare_device', 'recalibrate_bn']


_BatchNorm = nn.modules.batchnorm._BatchNorm

_ALONE = Ranks(0, 1)


def prepare_device(
    device: torch.device | str, batch_size: int | None, amp_dtype: str | None
) -> tuple[int, Callable[[], Any]]:
    """Set a device up for the evaluation of many archs on the same images.

    Args:
        device: The device.
        batch_size: Images per forward pass, 100 on a CPU and 512 elsewhere if None.
        amp_dtype: 'bfloat16' or 'float16' for mixed precision, None for none.

    Returns:
        The batch size, and what makes the context of a forward pass.

    Raises:
        UsageError: There is no such dtype.
    """
    kind = torch.device(device).type
    if amp_dtype not in (None, *AMP_DTYPES):
        raise UsageError(f'unknown dtype {amp_dtype!r} of mixed precision, known are {", ".join(AMP_DTYPES)}')
    if kind == 'cuda':
        torch.backends.cudnn.benchmark = True  # the shapes are always the same
    if batch_size is None:
        batch_size = 100 if kind == 'cpu' else 512
    return batch_size, autocast_context(kind, amp_dtype)


def evaluate(
    model: nn.Module, batches: Batches, *, ranks: Ranks = _ALONE, autocast: Callable[[], Any] = nullcontext
) -> dict[str, float]:
    """Return `top1` and `top5` (percent) and `loss` (cross-entropy, nats) of a model.

    Args:
        model: Model, put into eval mode. A supernet is evaluated at its `active_arch`.
        batches: Images [B, C, H, W] and class indices [B], on the model's device.
        ranks: Processes that have a share of the batches each, every one in turn. All of them have to call, and get
            what one process with all batches would get, to the last bit.
        autocast: Makes the context of a forward pass.

    Raises:
        UsageError: There are no batches.
    """
    sums = ranks.interleave(lambda: _sums(model, batches, autocast))
    if not sums:
        raise UsageError('there are no images to evaluate a model with')
    loss, count, top1, top5 = (sum(column) for column in zip(*sums))
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


def _sums(model: nn.Module, batches: Batches, autocast: Callable[[], Any]) -> list[list[float]]:
    """Sum of the loss, number of images, of correct and of almost correct ones, of every batch."""
    model.eval()
    sums: list[torch.Tensor] = []
    with torch.inference_mode(), autocast():
        for x, y in batches:
            evaluator = ClassificationEvaluator(device=y.device)
            evaluator.update(model(x), y)
            sums.append(torch.cat([evaluator.loss_sum[None], evaluator.counts.to(evaluator.loss_sum.dtype)]))
    return torch.stack(sums).tolist() if sums else []  # one wait for the device


@contextmanager
def recalibrate_bn(
    supernet: Supernet,
    arch: Arch | str,
    batches: Batches | None,
    *,
    ranks: Ranks = _ALONE,
    autocast: Callable[[], Any] = nullcontext,
) -> Iterator[Supernet]:
    """Within the context, `arch` runs with batch norm statistics of its own.

    The statistics of the batch norms that the arch uses are those of the batches, averaged; afterwards those of the
    supernet are back. Nothing is carried from one candidate to the next.

    Args:
        supernet: Supernet, put into eval mode.
        arch: Arch to recalibrate.
        batches: Training images [B, C, H, W]; a few hundred suffice, batches should not be small. None leaves the
            statistics as they are.
        ranks: Processes that have a share of the batches each, as in `evaluate`.
        autocast: Makes the context of a forward pass.

    Yields:
        The supernet, in eval mode, with `active_arch` set.

    Raises:
        UsageError: There are no batches, or one is too small to have statistics.
    """
    supernet.eval()
    supernet.active_arch = arch
    norms = {
        name: module
        for name, module in supernet.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if batches is None or not norms:  # all may be frozen
        yield supernet
        return
    saved: dict[str, tuple[float | None, tuple[torch.Tensor, ...]]] = {}

    def save(name: str) -> None:
        bn = norms[name]
        saved[name] = bn.momentum, tuple(s.clone() for s in (bn.running_mean, bn.running_var, bn.num_batches_tracked))

    def reset(name: str, bn: nn.Module, _: Any) -> None:
        # in front of its first forward pass: an arch runs a fraction of the norms of its supernet
        if name not in saved:
            save(name)
            bn.reset_running_stats()
            bn.momentum = 1.0  # the statistics of the batch; with None torch waits for the device to count batches
            bn.train()

    def batch_statistics() -> list[tuple[list[str], torch.Tensor, int]]:
        """Names of the norms in use, their statistics in one row, and the number of images, of every batch."""
        found: list[tuple[list[str], torch.Tensor, int]] = []
        hooks = [bn.register_forward_pre_hook(partial(reset, name)) for name, bn in norms.items()]
        try:
            with torch.no_grad(), autocast():
                for x, _ in batches:
                    supernet(x)
                    used = [norms[name] for name in saved]
                    row = torch.cat([s for bn in used for s in (bn.running_mean, bn.running_var)])
                    found.append((list(saved), row.cpu() if ranks.world_size > 1 else row, len(x)))
        except ValueError as e:  # torch's of a single value per channel
            raise UsageError(f'a batch of {len(x)} image(s) is too small for batch statistics: {e}') from None
        finally:
            for hook in hooks:
                hook.remove()
            for name in saved:
                norms[name].eval()
        return found

    try:
        found = ranks.interleave(batch_statistics)
        if not found:
            raise UsageError('there are no images to recalibrate batch norms with; None leaves them as they are')
        names = found[0][0]
        mean = _mean_over_images(torch.stack([row for _, row, _ in found]), [count for *_, count in found])
        sizes = [norms[name].num_features for name in names for _ in range(2)]
        parts = iter(mean.to(norms[names[0]].running_mean.device).split(sizes))
        for name in names:
            if name not in saved:  # where a process has no batch
                save(name)
            bn = norms[name]
            bn.running_mean.copy_(next(parts))
            bn.running_var.copy_(next(parts))
            bn.num_batches_tracked.fill_(len(found))
        yield supernet
    finally:
        for name, (momentum, statistics) in saved.items():
            bn = norms[name]
            bn.momentum = momentum
            for now, before in zip((bn.running_mean, bn.running_var, bn.num_batches_tracked), statistics):
                now.copy_(before)


def _mean_over_images(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Mean of the rows of several batches, each weighed by its number of images."""
    if len(set(counts)) == 1:
        return rows.mean(0)
    shares = torch.tensor(counts, dtype=rows.dtype) / sum(counts)
    return (rows * shares.to(rows.device)[:, None]).sum(0)


class SupernetEvaluator:
    """Scores archs with a supernet's weights, on images that stay in memory.

    Without recalibration the batch norms are folded into the convolutions once, for all archs: shadow batch norms
    behind a projection become one projection per number of paths.

    Args:
        supernet: Trained supernet; it is copied where folding changes it.
        batches: Search split, see `load_batches`.
        recalibration_batches: Training images to recalibrate every arch with, none if None.
        ranks: Processes that have a share of both each, as in `evaluate`.
        autocast: Makes the context of a forward pass.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Batches,
        recalibration_batches: Batches | None = None,
        *,
        ranks: Ranks = _ALONE,
        autocast: Callable[[], Any] = nullcontext,
    ) -> None:
        self.batches = batches
        self.recalibration_batches = recalibration_batches
        self.how: dict[str, Any] = dict(ranks=ranks, autocast=autocast)
        supernet.eval()
        self.supernet = supernet if recalibration_batches is not None else reparameterize_model(supernet)

    def __call__(self, arch: Arch | str) -> dict[str, float]:
        """Return `top1`, `top5` (percent) and `loss` (nats) of an arch."""
        if self.recalibration_batches is not None:
            with recalibrate_bn(self.supernet, arch, self.recalibration_batches, **self.how) as supernet:
                return evaluate(supernet, self.batches, **self.how)
        self.supernet.active_arch = arch
        return evaluate(self.supernet, self.batches, **self.how)
