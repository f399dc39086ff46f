"""Least squares for what a smaller network has left of its backbone: better weights without a training."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..utils.errors import UsageError
from ..utils.modes import eval_mode
from .backbone import BackboneNet
from .backbone_blocks import BlockSite
from .warm_start import check_source

__all__ = ['RIDGE', 'refit']

# How far weights are drawn to those that are inherited, in shares of the mean variance of the projected features:
# recipes/warm_start/README.md
RIDGE = 0.3


@torch.no_grad()
def refit(
    model: nn.Module, source: nn.Module, batches: Iterable[tuple[torch.Tensor, Any]], *, ridge: float = RIDGE
) -> dict[str, tuple[float, float]]:
    """Give the blocks of a network the projections with which they come closest to its backbone, in place.

    One block after another, from the first that computes something else: its batch norms get the statistics of the
    images, then its projection the weights that minimise the squared difference to what the backbone has there, on
    what reaches it in the smaller network. A block in front of blocks that are left out learns what these add, too. It
    is the reconstruction step of channel pruning (arXiv 1707.06168, section 3.1), for a network that has been chosen.

    Blocks whose projection is no plain 1x1 convolution (some of mixnet), those with a layer scale or a convolution
    behind it, and those that have no choice keep their weights; so do those that come no nearer, as may happen where an
    activation follows the projection (lcnet).

    Args:
        model: A `mixpath` with the weights that `warm_start` gave it, or an extracted sub-network.
        source: The backbone whose features are to be met, on the same device.
        batches: Normalised training images [B, C, H, W] and anything; some hundred in batches of about 100. Their
            features in both networks are kept, of one block at a time: the largest are those of the stem.
        ridge: How far the weights are drawn to those that the network has, in shares of the mean variance of the
            features that a projection takes; above 0.

    Returns:
        By fitted block, the shares of the backbone's variance that it misses before and after, on these images.

    Raises:
        UsageError: The model is none around a backbone, the source is another network or has other options, a batch is
            too small for batch statistics, or a value is out of range. The model is as it was then.
    """
    if not isinstance(model, BackboneNet):
        raise UsageError(f'{type(model).__name__} is no network around a backbone of timm, such as mixpath')
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge > 0:
        raise UsageError(f'ridge={ridge!r} must be a number above 0')
    check_source(model, source)
    weight = model.conv_stem.weight
    if source.conv_stem.weight.dtype != weight.dtype:
        raise UsageError(f'the source is of {source.conv_stem.weight.dtype}, the model of {weight.dtype}')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with eval_mode(model), eval_mode(source):
            ours, theirs = [], []
            for batch in batches:
                if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], torch.Tensor):
                    raise UsageError(
                        f'a batch is a pair of images and anything, as a loader gives it, not {type(batch).__name__}'
                    )
                x = batch[0].to(weight.device, weight.dtype)
                ours.append(model.bn1(model.conv_stem(x)))
                theirs.append(source.bn1(source.conv_stem(x)))
            if not ours:
                raise UsageError('there are no images to refit with')
            return _refit(model, source, ours, theirs, ridge)
    except BaseException:
        model.load_state_dict(before)  # an interrupt, or no memory for the next block: half of it is worse than none
        raise


def _refit(
    model: nn.Module, source: nn.Module, ours: list[torch.Tensor], theirs: list[torch.Tensor], ridge: float
) -> dict[str, tuple[float, float]]:
    # Blocks of the network, each with those of the backbone that it stands for
    groups: list[tuple[str, nn.Module, list[nn.Module]]] = []
    for name, block in ((f'blocks.{i}.{j}', block) for i, s in enumerate(model.blocks) for j, block in enumerate(s)):
        if isinstance(block, nn.Identity) and groups:
            groups[-1][2].append(source.get_submodule(name))
        else:
            groups.append((name, block, [source.get_submodule(name)]))
    # Rounding is no difference; of float32 on GPUs, which round it to TF32, neither
    exact = max(1e-6, 100 * torch.finfo(theirs[0].dtype).eps ** 2)
    found: dict[str, tuple[float, float]] = {}
    is_exact = True
    for name, block, others in groups:
        for other in others:
            _run(other, theirs)
        shape, wanted = (tuple(x.shape[1:]) for x in (block(ours[0][:1]), theirs[0]))
        if shape != wanted:
            raise UsageError(
                f'the features of {name} are {shape}, those of the source {wanted}: the two need the same options, '
                'such as output_stride'
            )
        variation = _variation(theirs)
        if not math.isfinite(variation):
            raise UsageError(f'the features of the source are not finite at {name}; are there NaNs in the images?')
        if is_exact:
            outputs = [block(x) for x in ours]
            is_exact = _missed(outputs, theirs) <= exact * variation
            if is_exact:
                ours[:] = outputs
                continue
            del outputs
        _recalibrate(_norms(block), block, ours)
        if projection := _projection(block, others[0]):
            shares = _fit(block, *projection, ours, theirs, ridge)
            found[name] = tuple(share / max(variation, 1e-30) for share in shares)
        _run(block, ours)
    if not is_exact:
        # The head has the backbone's weights, but sees what the smaller network makes of the images
        if isinstance(model, EfficientNet):
            head = nn.Sequential(model.conv_head, model.bn2)
            _recalibrate(_norms(head), head, ours)
        else:
            _recalibrate(_norms(model.norm_head), model.forward_head, ours)
    return found


def _run(block: nn.Module, features: list[torch.Tensor]) -> None:
    for i, x in enumerate(features):
        features[i] = block(x)  # one after the other: both of all images would take twice the memory


def _missed(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return sum((y.double() - x.double()).square().sum().item() for x, y in zip(ours, theirs))


def _variation(features: list[torch.Tensor]) -> float:
    """Squared differences from the mean of every channel, summed."""
    count = sum(y.numel() // y.shape[1] for y in features)
    sums, squares = (sum(f(y.double()).sum((0, 2, 3)) for y in features) for f in (torch.clone, torch.square))
    return (squares - sums**2 / count).sum().item()


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None]


def _recalibrate(norms: list[nn.BatchNorm2d], run: Callable[[torch.Tensor], Any], features: list[torch.Tensor]) -> None:
    """Set batch norms to the statistics of what reaches them in a part of the network, averaged over the batches."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    try:
        for x in features if norms else ():
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen  # the mean over images, of batches of any size
            run(x)
    except ValueError as e:  # torch's of a single value per channel
        raise UsageError(f'a batch of {len(x)} image(s) is too small for batch statistics: {e}') from None
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.eval()


def _projection(block: nn.Module, other: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The projection of a block and the norm behind it, None where it is no plain one or more than a norm follows."""
    site = BlockSite.of(other)
    if isinstance(block, nn.Identity) or isinstance(site, str):
        return None
    name = site.project or site.linear
    conv = block.get_submodule(name)
    # timm's pairs of convolution and norm are called so where they are not `sum_norm`
    norm = block.get_submodule(site.sum_norm if name == site.linear else name.removesuffix('conv') + 'bn')
    behind = [getattr(block, key, None) for key in ('layer_scale', 'dw_end')]
    is_plain = isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.bias is None
    return (conv, norm) if is_plain and all(isinstance(b, nn.Identity | None) for b in behind) else None


def _fit(
    block: nn.Module,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
    ridge: float,
) -> tuple[float, float]:
    """Solve for the change of projection and bias that explains most of what the block's output lacks.

    Returns:
        What is lacking before and after, in sums of squares.
    """
    taken: list[torch.Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    width = conv.in_channels
    gram = torch.zeros(width + 1, width + 1, dtype=torch.double)  # of the features and a one
    moment = torch.zeros(width + 1, conv.out_channels, dtype=torch.double)
    before, count = 0.0, 0
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)  # half precision can not hold such sums
    try:
        for x, y in zip(ours, theirs):
            lacking = (y - block(x)).movedim(1, -1).flatten(0, -2).to(dtype)
            features = taken.pop().movedim(1, -1).flatten(0, -2).to(dtype)
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
            gram += (features.T @ features).double().cpu()
            moment += (features.T @ lacking).double().cpu()
            before += lacking.double().square().sum().item()
            count += len(features)
    finally:
        hook.remove()
    mean = gram[width, :width] / count
    cov = gram[:width, :width] / count - mean.outer(mean)
    penalty = torch.full((width + 1,), ridge * cov.diag().mean().clamp(min=1e-12).item(), dtype=torch.double)
    penalty[width] = 0  # the bias is free
    change = torch.linalg.solve(gram / count + penalty.diag(), moment / count)
    if not change.isfinite().all():
        return before, before

    # What projection and norm do together, and then apart again: the norm with the statistics that it will see, the
    # rows of the projection as long as they were, which a training's step sizes depend on
    old = [tensor.clone() for tensor in _tensors(conv, norm)]
    scale, shift = norm.weight.double().cpu(), norm.bias.double().cpu()
    scale = scale / (norm.running_var.double().cpu() + norm.eps).sqrt()
    shift = shift - norm.running_mean.double().cpu() * scale + change[width]
    rows = conv.weight.flatten(1).double().cpu()
    weight = rows * scale[:, None] + change[:width].T
    length = rows.norm(dim=1) / weight.norm(dim=1)
    length = torch.where((length > 1e-2) & (length < 1e2), length, 1.0)  # but for dead rows
    variance = torch.einsum('oc,cd,od->o', weight, cov, weight).clamp(min=0) * length**2
    new = [
        (weight * length[:, None]).view_as(conv.weight),
        (variance + norm.eps).sqrt() / length,
        shift + weight @ mean,
    ]
    new += [weight @ mean * length, variance]
    for tensor, value in zip(_tensors(conv, norm), new):
        tensor.copy_(value)
    after = sum(_missed([block(x)], [y]) for x, y in zip(ours, theirs))
    if not after < before:
        for tensor, value in zip(_tensors(conv, norm), old):
            tensor.copy_(value)
        after = before
    return before, after


def _tensors(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> list[torch.Tensor]:
    return [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
