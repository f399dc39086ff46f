"""What an arch inherits from a supernet: its weights, a mean with those that it started from, or better projections."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.refit import refit
from ..models.warm_start import warm_start
from ..spaces.arch import Arch
from ..train.checkpoint import LoadedModel, load_supernet
from ..utils.distributed import open_process
from ..utils.errors import UsageError
from .accuracy import evaluate, prepare_device, recalibrate_bn
from .images import SearchData, load_images

__all__ = ['SHARES', 'Blend', 'inherit_blended', 'inherit_refitted']

_logger = logging.getLogger(__name__)

# Shares of the start that are tried
SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Blend:
    """The network of an arch with the best mean of trained and first weights.

    Attributes:
        model: The network, in eval mode on the CPU.
        share: Share of the first weights in it.
        scores: `top1` in percent and `loss` on the search split, by share.
        loaded: The supernet's checkpoint.
    """

    model: nn.Module
    share: float
    scores: dict[float, dict[str, float]]
    loaded: LoadedModel

    @property
    def score(self) -> dict[str, float]:
        """What `model` scores."""
        return self.scores[self.share]


def inherit_blended(
    checkpoint: str | os.PathLike,
    arch: Arch | str,
    source: nn.Module,
    *,
    shares: Sequence[float] = SHARES,
    data: SearchData | None = None,
    img_size: int | None = None,
    recalibration_images: int = 0,
    workers: int = 2,
    device: str | torch.device | None = None,
) -> Blend:
    """Extract an arch of a warm-started supernet, with the mean of trained and first weights that scores best.

    A training for all archs at once moves the weights away from what a single arch would want. Those that the supernet
    started from are exact for the backbone and close for archs near it, and both lie in the same valley: a mean of them
    is better than either there, as that of a pretrained and a fine-tuned network is (WiSE-FT, arXiv 2109.01903). Shares
    are tried on the search split with batch norms recalibrated; 0 is what the supernet has.

    Args:
        checkpoint: Checkpoint of a supernet that was warm-started from `source`.
        arch: The arch.
        source: The network that it started from.
        shares: Shares of the start to try.
        data: Images to score with, the held-out ones of the training if None.
        img_size: Size that the images are brought to, in pixels; that of the supernet's training if None.
        recalibration_images: Training images to recalibrate the batch norms with, 0 for none.
        workers: Processes that decode the images.
        device: Device, the GPU if there is one and None is given.

    Raises:
        UsageError: The checkpoint is not of a supernet around `source`, or a number is out of range.
        RunError: The checkpoint or the images can't be read.
    """
    loaded = load_supernet(checkpoint, 'blend', recalibration_images, img_size=img_size)
    with open_process(device) as process, torch.no_grad():
        supernet = loaded.model.to(device=process.device, memory_format=torch.channels_last).eval()
        batch_size, _ = prepare_device(process.device, None, None)
        images = load_images(loaded, data, recalibration_images, batch_size, process.device, workers)
        trained = {key: value.clone() for key, value in supernet.state_dict().items()}
        warm_start(supernet, source.to(process.device))
        first = {key: value.clone() for key, value in supernet.state_dict().items()}
        arch = supernet.space.arch(arch)
        scores: dict[float, dict[str, float]] = {}
        chosen = shares[0]
        for share in shares:
            supernet.load_state_dict({
                key: torch.lerp(value, first[key], share) if value.is_floating_point() else value
                for key, value in trained.items()
            })  # fmt: skip
            with recalibrate_bn(supernet, arch, images.recalibration):
                score = evaluate(supernet, images.batches)
                if not scores or score['loss'] < scores[chosen]['loss']:
                    best, chosen = supernet.extract(arch), share
            scores[share] = score
            what = f'{share:.0%} of the first weights' if len(shares) > 1 else 'Inherited weights'
            _logger.info(f'{what}: {score["top1"]:.2f} % top-1 and a loss of {score["loss"]:.4f} on the search split')
    return Blend(best.cpu().to(memory_format=torch.contiguous_format), chosen, scores, loaded)


def inherit_refitted(
    checkpoint: str | os.PathLike,
    arch: Arch | str,
    source: nn.Module,
    *,
    num_images: int,
    data: SearchData | None = None,
    img_size: int | None = None,
    workers: int = 2,
    device: str | torch.device | None = None,
) -> Blend:
    """Extract an arch of a supernet that is as it started, with projections that come closest to the source's features.

    See `timm_mixpath.refit`. What it inherits is kept, with recalibrated batch norms, where that scores better:
    the source's features may be no good ones, or the images too few to learn them from.

    Args:
        checkpoint: Checkpoint of a supernet that was warm-started from `source` and not trained.
        arch: The arch.
        source: The network that it started from.
        num_images: Training images to refit with.
        data: Images to score with, the held-out ones of the training if None.
        img_size: Size that the images are brought to, in pixels; that of the supernet's training if None.
        workers: Processes that decode the images.
        device: Device, the GPU if there is one and None is given.

    Raises:
        UsageError: The checkpoint is not of a supernet around `source`, or a number is out of range.
        RunError: The checkpoint or the images can't be read.
    """
    if num_images < 1:
        raise UsageError(f'{num_images} images are none to refit with')
    loaded = load_supernet(checkpoint, 'refit', num_images, img_size=img_size)
    with open_process(device) as process:
        supernet = loaded.model.to(device=process.device, memory_format=torch.channels_last).eval()
        batch_size, _ = prepare_device(process.device, None, None)
        images = load_images(loaded, data, num_images, batch_size, process.device, workers)
        with recalibrate_bn(supernet, arch, images.recalibration):
            inherited, score = supernet.extract(arch), evaluate(supernet, images.batches)
        model = supernet.extract(arch)
        source = source.to(device=process.device, memory_format=torch.channels_last)
        refit(model, source, images.recalibration)
        found = evaluate(model, images.batches)
    for what, metrics in ('Inherited weights', score), ('Refitted', found):
        _logger.info(f'{what}: {metrics["top1"]:.2f} % top-1 and a loss of {metrics["loss"]:.4f} on the search split')
    if not found['loss'] < score['loss']:
        model, found = inherited, score
    return Blend(model.cpu().to(memory_format=torch.contiguous_format), 0.0, {0.0: found}, loaded)
