"""Pretrained weights of timm for supernets and networks that stand on one of its networks."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d
from torch import nn

from ..utils.errors import UsageError
from .backbone import BackboneNet, BackboneSupernet, difference, inherited, plain_network
from .backbone_blocks import SEARCHED_BLOCKS, BackboneChoice
from .blocks import GroupedPaths, MultiPathResidual, PathSum
from .choice_blocks import ChoiceBlock, GroupNorms
from .layers import ShadowBatchNorm2d, sum_statistics
from .mixpath import MixPath
from .pretrained import PREPROCESSING

__all__ = ['check_source', 'warm_start']


# The network of timm that the spaces of this package stand on
_BACKBONES = {'s2': 'mixnet_m', 's3': 'mixnet_m'}


@torch.no_grad()
def warm_start(model: nn.Module, source: nn.Module) -> None:
    """Give a supernet, or a network of one arch, the weights of the network of timm that it stands on, in place.

    `mixpath_supernet` and `mixpath` stand on their `backbone`: every arch of a supernet whose expansions are the
    backbone's and whose kernels are at least as large computes what `source` does in eval mode. The models of S2 and
    S3, `mixpath_a` and `mixpath_b` stand on mixnet_m. There that holds for archs without sums; a sum is exact in
    blocks without squeeze-and-excite, whose gate sees the sum of S2, and in networks of one arch. Smaller kernels
    start as the centre of the pretrained ones. The classifier is taken over where it has as many classes, and mean,
    std and resizing of the images in any case.

    Args:
        model: The model.
        source: The network of timm, with the same input channels.

    Raises:
        UsageError: The model stands on no network of timm, `source` is another one, or the model has options with which
            it has no place for the weights; nothing was changed then.
    """
    name = check_source(model, source)
    own, classifier = model.state_dict(), _classifier(name)
    weights = inherited(model, source) if name == model.space.name else _inherited_mixnet(model, source)
    weights = {key: value for key, value in weights.items() if not _is_cut_off(model, key)}
    if problem := difference(weights, own, (classifier, 'sample_step')):
        raise UsageError(f'the model has options with which it can not start from {name}: {problem}')
    if difference(weights, own, 'sample_step'):
        weights = {key: value for key, value in weights.items() if not key.startswith(classifier)}
    model.load_state_dict({**own, **weights})
    if getattr(model, 'pretrained_cfg', None):
        model.pretrained_cfg['notes'] = (_origin(source, name),)
        # Tags of one network may differ in it, and the weights are for images as their own tag has them
        known = getattr(source, 'pretrained_cfg', None) or {}
        model.pretrained_cfg.update({key: known[key] for key in PREPROCESSING if known.get(key) is not None})


def _is_cut_off(model: nn.Module, key: str) -> bool:
    """Whether weights are of the head or the last stages, in a model that gives features alone."""
    name, index, *_ = key.split('.')
    if name == 'blocks':
        return int(index) >= len(model.blocks)
    return isinstance(getattr(model, name, None), nn.Identity)


def check_source(model: nn.Module, source: nn.Module) -> str:
    """Check that a model stands on a network of timm; return the name of that.

    Args:
        model: The model.
        source: What should be the network, with any number of classes.

    Raises:
        UsageError: See `warm_start`.
    """
    if isinstance(model, BackboneNet | BackboneSupernet):
        name = model.space.name
    elif isinstance(model, MixPath) and model.space.name in _BACKBONES:
        name = _BACKBONES[model.space.name]
    else:
        raise UsageError(
            f'{type(model).__name__} stands on no network of timm that it could start from; mixpath_supernet and '
            'mixpath do, and the models of S2 and S3'
        )
    if not isinstance(source, nn.Module):
        raise UsageError(f'the source must be a network, such as timm.create_model({name!r}) makes, not {source!r:.60}')
    _check_weights(source, name, model.state_dict())
    _check_computation(source, model, name)
    return name


def _classifier(name: str) -> str:
    return f'{plain_network(name).pretrained_cfg["classifier"]}.'


def _check_weights(source: nn.Module, name: str, own: dict[str, torch.Tensor]) -> None:
    plain = plain_network(name)
    first_conv = f'{plain.pretrained_cfg["first_conv"]}.weight'
    expected = {**plain.state_dict(), first_conv: own[first_conv]}
    if problem := difference(source.state_dict(), expected, _classifier(name)):
        raise UsageError(f'the weights are not those of {name}: {problem}')


# What does not change what a network computes in eval mode, or is not of its weights
_NO_COMPUTATION = (nn.Identity, nn.Dropout, nn.Flatten, DropPath, SelectAdaptivePool2d)


def _computation(module: nn.Module) -> tuple[str, Any] | None:
    """What a layer does beside what the shapes of its weights tell, and how to call it."""
    if isinstance(module, nn.Conv2d):
        return 'class', type(module).__name__
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return 'eps', module.eps
    is_leaf = next(module.children(), None) is None and next(module.parameters(), None) is None
    return ('class', type(module).__name__) if is_leaf and not isinstance(module, _NO_COMPUTATION) else None


def _block_computation(block: nn.Module) -> set[tuple[str, Any]]:
    """What the layers of a block do, whose convolutions may be several paths: epsilons, activations, pools, blurs."""
    return {found for layer in block.modules() if not isinstance(layer, nn.Conv2d) and (found := _computation(layer))}


def _check_computation(source: nn.Module, model: nn.Module, name: str) -> None:
    """Check what shapes do not tell: how it pads, activations, blurs, and the epsilons of its batch norms."""
    if any(tensor.is_meta for tensor in source.state_dict().values()):
        raise UsageError(f'the source has no weights, it is a {name} on the meta device')
    theirs, blocks = dict(source.named_modules()), model.get_choice_blocks()
    plain = dict(plain_network(name).named_modules())
    left_out = ('global_pool', *(f'{block}.' for block in blocks))
    problems: list[str] = []
    for key, ours in model.named_modules():
        is_without = isinstance(ours, nn.Identity) and not isinstance(plain.get(key), nn.Identity)  # a head, or a block
        if key not in theirs or key in blocks or key.startswith(left_out) or is_without:
            continue
        mine, given = _computation(ours), _computation(theirs[key])
        if mine != given:
            what = (mine or given)[0]
            mine, given = (found[1] if found else 'none' for found in (mine, given))
            problems.append(f'the {what} of its {key} is {given}, not {mine}')
    for key, block in blocks.items():
        given = _block_computation(theirs[key])
        if isinstance(block, BackboneChoice):
            mine = _block_computation(block.get_submodule(block.widest))
        elif isinstance(block, SEARCHED_BLOCKS):
            mine = _block_computation(block)
        elif isinstance(block, nn.Identity):
            continue  # left out
        else:  # of S2 or S3, which is built otherwise, with an epsilon that is the model's choice
            eps = {found for found in given if found[0] == 'eps'}
            mine = {found for found in _block_computation(plain[key]) if found[0] != 'eps'} | eps
        for kind, value in sorted(mine ^ given, key=str):
            has, verb = ('has', 'lacks') if (kind, value) in given else ('lacks', 'has')
            problems.append(f'its {key} {has} a {kind} {value}, which {name} {verb} there')
    if problems:
        raise UsageError(f'the weights are those of a network that computes otherwise than {name}: {problems[0]}')


def _origin(source: nn.Module, name: str) -> str:
    """What a model card says about the weights: timm names weights of every network, loaded or not."""
    cfg: dict[str, Any] = getattr(source, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or name
    origin = f'warm start from a {name} at hand'
    tagged = f'{name}.{cfg.get("tag")}'
    known = timm.get_pretrained_cfg(tagged) if cfg.get('tag') and timm.is_model(name) else None
    if known is not None and known.has_weights and cfg.get('license'):
        origin += f'; if its weights go back to {tagged} of timm, these are under the licence {cfg["license"]}'
    return origin


def _inherited_mixnet(model: MixPath, source: nn.Module) -> dict[str, torch.Tensor]:
    """What a model of S2 or S3 inherits from mixnet_m: all but the blocks by name."""
    names = model.get_choice_blocks()
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith(tuple(f'{name}.' for name in names))}
    for name, block in names.items():
        branches = dict(block.named_children()) if isinstance(block, ChoiceBlock) else {'': block}
        for branch_name, branch in branches.items():
            prefix = '.'.join(filter(None, (name, branch_name)))
            inherited = _inherited_block(branch, source.get_submodule(name))
            weights.update({f'{prefix}.{key}': value for key, value in inherited.items()})
    return weights


def _inherited_block(block: MultiPathResidual, source: nn.Module) -> dict[str, torch.Tensor]:
    theirs = source.state_dict()

    def norm(ours: str, theirs_name: str, channels: slice = slice(None), num_paths: int = 1) -> None:
        for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
            value = theirs[f'{theirs_name}.{key}']
            weights[f'{ours}.{key}'] = value[channels] if value.ndim else value
        mean, var = weights[f'{ours}.running_mean'], weights[f'{ours}.running_var']
        weights[f'{ours}.running_mean'], weights[f'{ours}.running_var'] = sum_statistics(mean, var, num_paths, eps)

    weights: dict[str, torch.Tensor] = {}
    eps = source.bn3.eps
    # Several pointwise convolutions of equal width are one with groups
    for conv in ('conv_pw', 'conv_pwl'):
        parts = [value for key, value in theirs.items() if key.startswith(f'{conv}.')]
        weights[f'{conv}.weight'] = torch.cat(parts)
    norm('bn1', 'bn1')
    weights.update({key: value for key, value in theirs.items() if key.startswith('se.')})

    # Depthwise kernels of all channels, in one size; the paths take their centre
    kernels = [value for key, value in theirs.items() if key.startswith('conv_dw.')]
    size = max(kernel.shape[-1] for kernel in kernels)
    dense = torch.cat([F.pad(kernel, [(size - kernel.shape[-1]) // 2] * 4) for kernel in kernels])
    is_grouped = isinstance(block.paths, GroupedPaths)
    sums: dict[str, PathSum] = dict(block.paths.items()) if is_grouped else {'': block.paths}
    start = 0
    for name, paths in sums.items():
        prefix = '.'.join(filter(None, ('paths', name)))
        for path_name, path in paths.items():
            channels = slice(start, start + path.conv.out_channels)
            margin = (path.conv.kernel_size[0] - size) // 2  # negative: the centre
            weights[f'{prefix}.{path_name}.conv.weight'] = F.pad(dense[channels], [margin] * 4)
            if not block.joint_norm:
                norm(f'{prefix}.{path_name}.bn', 'bn2', channels)
        start = channels.stop
    if block.joint_norm:
        norm('bn2', 'bn2')

    # Norms behind sums, and what a fixed sum needs in front of the projection
    num_paths = 1
    if isinstance(block.bn2, GroupNorms):
        for index, shadows in enumerate(block.bn2):
            weights.update(_mean_norms(f'bn2.{index}', shadows, eps, dense.dtype))
    elif isinstance(block.bn2, nn.BatchNorm2d) and not block.joint_norm:
        chs = [next(iter(paths.values())).conv.out_channels for paths in sums.values()]
        counts = torch.tensor([len(paths) for paths in sums.values()], dtype=dense.dtype)
        weights.update(_mean_norm('bn2', counts.repeat_interleave(torch.tensor(chs)), eps))
    elif not is_grouped and not isinstance(block.bn3, ShadowBatchNorm2d):
        num_paths = 1 if hasattr(block.paths, 'active') else len(block.paths)
    if num_paths > 1 and 'se.conv_reduce.weight' in weights:
        weights['se.conv_reduce.weight'] = weights['se.conv_reduce.weight'] / num_paths
    if isinstance(block.bn3, ShadowBatchNorm2d):
        for index in range(block.bn3.num_shadows):
            norm(f'bn3.shadows.{index}', 'bn3', num_paths=index + 1)
    else:
        norm('bn3', 'bn3', num_paths=num_paths)
    return weights


def _mean_norms(name: str, norms: nn.Module, eps: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if not isinstance(norms, ShadowBatchNorm2d):
        return _mean_norm(name, torch.ones(norms.num_features, dtype=dtype), eps)
    weights: dict[str, torch.Tensor] = {}
    for index in range(norms.num_shadows):
        count = torch.full((norms.num_features,), index + 1.0, dtype=dtype)
        weights.update(_mean_norm(f'{name}.shadows.{index}', count, eps))
    return weights


def _mean_norm(name: str, num_paths: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
    """A batch norm that divides by the number of paths, per channel; nothing is known of the statistics there."""
    return {
        f'{name}.weight': torch.ones_like(num_paths),
        f'{name}.bias': torch.zeros_like(num_paths),
        f'{name}.running_mean': torch.zeros_like(num_paths),
        f'{name}.running_var': num_paths**2 - eps,
        f'{name}.num_batches_tracked': torch.tensor(0),
    }
