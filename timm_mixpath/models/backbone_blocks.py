"""Blocks of timm as choice blocks: which part of a block is left open, and what its candidates inherit.

A block of timm is never rebuilt. Its depthwise convolution gives way to paths, the norm behind the next 1x1 convolution
to its shadows, and the rest stays the module that it was, under the name that it had. Kernels grow by zeros and shrink
to their centre. What follows for a sum of j paths, which all are the same at first:

- Behind a linear layer the sum has j times the mean and j^2 times the variance of one path. So shadow j starts with
  these statistics, and every sum computes what the block did.
- The squeeze of squeeze-and-excite sees the mean of the paths, so that the gate stays what it was.
- Where channel groups sum different numbers of paths, no one number describes what the projection mixes, and the
  paths of each group are averaged instead.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d, Conv2dSame, ConvNormAct, MixedConv2d, get_padding, make_divisible
from timm.models import register_notrace_module
from torch import nn
from torch.func import functional_call

from ..spaces.arch import BlockChoice
from ..spaces.space import BlockSpec
from ._timm import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite, UniversalInvertedResidual
from .blocks import GroupedPaths, PathSum, branch_name, group_name, path_name, split_channels
from .choice_blocks import ActivePathSum
from .layers import ActiveShadowBatchNorm2d, set_num_paths, sum_statistics

__all__ = ['SEARCHED_BLOCKS', 'BackboneChoice', 'BlockSite', 'fixed_block']


# The blocks of timm that have a depthwise convolution in front of a 1x1 one
SEARCHED_BLOCKS = (DepthwiseSeparableConv, InvertedResidual, UniversalInvertedResidual)


@dataclass(frozen=True)
class BlockSite:
    """Where a block has what a choice is made of, as names of modules inside it.

    Attributes:
        conv: The depthwise convolution, or the mixed one.
        conv_norm: Norm and activation behind it.
        paths: What the paths take the place of: `conv`, or the layer that holds `conv` and `conv_norm`.
        linear: The 1x1 convolution that takes the sum.
        sum_norm: The norm behind `linear`.
        expand: The convolution whose outputs are the expanded channels, None for a block without an expansion.
        expand_norm: Norm and activation behind it.
        project: The convolution that takes the expanded channels.
        is_inside: The depthwise convolution has the expanded channels, and squeeze-and-excite stands behind it.
    """

    conv: str
    conv_norm: str
    paths: str
    linear: str
    sum_norm: str
    expand: str | None = None
    expand_norm: str | None = None
    project: str | None = None
    is_inside: bool = True

    @classmethod
    def of(cls, block: nn.Module) -> 'BlockSite | str':
        """Find the site of a block, or say in a few words why there is none."""
        if type(block) is InvertedResidual:
            site = cls('conv_dw', 'bn2', 'conv_dw', 'conv_pwl', 'bn3', 'conv_pw', 'bn1', 'conv_pwl')
        elif type(block) is DepthwiseSeparableConv:
            site = cls('conv_dw', 'bn1', 'conv_dw', 'conv_pw', 'bn2')
        elif type(block) is UniversalInvertedResidual:
            wide = 'pw_exp.conv', 'pw_exp.bn', 'pw_proj.conv'
            if isinstance(block.dw_mid, ConvNormAct):
                site = cls('dw_mid.conv', 'dw_mid.bn', 'dw_mid', 'pw_proj.conv', 'pw_proj.bn', *wide)
            elif isinstance(block.dw_start, ConvNormAct):
                site = cls('dw_start.conv', 'dw_start.bn', 'dw_start', 'pw_exp.conv', 'pw_exp.bn', *wide, False)
            else:
                return 'it has no depthwise convolution in front of a 1x1 convolution'
        else:
            return f'{type(block).__name__} has no depthwise convolution in front of a 1x1 projection'
        return site._problem(block) or site

    def _problem(self, block: nn.Module) -> str | None:
        if getattr(block, 'conv_s2d', None) is not None:
            return 'its depthwise convolution works on pixels moved into channels'
        for conv in _convs(block.get_submodule(self.conv)):
            height, width = conv.kernel_size
            if conv.groups != conv.in_channels or conv.in_channels != conv.out_channels:
                return 'its convolution is grouped, not depthwise'
            if height != width or height % 2 == 0:
                return f'its kernel is {height}x{width}, not odd and square'
        linear = block.get_submodule(self.linear)
        if any(conv.kernel_size != (1, 1) for conv in _convs(linear)):
            return 'its projection is no 1x1 convolution'
        for name in (self.conv_norm, self.sum_norm):
            norm = block.get_submodule(name)
            if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or norm.running_mean is None:
                return f'its norm {type(norm).__name__} is no batch norm with statistics'
        if not isinstance(block.se, nn.Identity | SqueezeExcite):
            return f'its attention is {type(block.se).__name__}, not squeeze-and-excite'
        if self._ratio(block) is None:
            expand = block.get_submodule(self.expand)
            return f'no expansion of {expand.in_channels} channels gives its {expand.out_channels}, they were pruned'
        return None

    def kernel_sizes(self, block: nn.Module) -> tuple[int, ...]:
        """Kernels of the block, one per channel group."""
        return tuple(conv.kernel_size[0] for conv in _convs(block.get_submodule(self.conv)))

    def expand_ratio(self, block: nn.Module) -> int | float:
        """Expansion of the block, with as many decimals as it takes to give its width."""
        ratio = self._ratio(block)
        assert ratio is not None  # `of` makes no site of such a block
        return ratio

    def _ratio(self, block: nn.Module) -> int | float | None:
        if self.expand is None:
            return 1
        expand = block.get_submodule(self.expand)
        for decimals in range(5):
            ratio = round(expand.out_channels / expand.in_channels, decimals)
            if ratio > 0 and make_divisible(expand.in_channels * ratio) == expand.out_channels:
                return int(ratio) if ratio == int(ratio) else ratio
        return None

    def can_narrow(self, block: nn.Module) -> bool:
        """Whether the block may have fewer expanded channels: they must not be dealt out to several convolutions."""
        if self.expand is None:
            return False
        convs = [block.get_submodule(name) for name in (self.expand, self.project)]
        return all(isinstance(conv, nn.Conv2d) and conv.groups == 1 for conv in convs)


class _MeanConv2d(nn.Conv2d):
    """A convolution that takes the mean of the paths out of their sum. Parameters are those of an `nn.Conv2d`.

    Attributes:
        num_paths: Number of active paths in front of it.
    """

    num_paths = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        return super().forward(x / self.num_paths)


class _ActivePathMean(ActivePathSum):
    """An `ActivePathSum` that is divided by the number of its active paths."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        x = super().forward(x)
        return x / len(self.active) if len(self.active) > 1 else x


class _Slice(NamedTuple):
    """A weight of a narrower block as part of the widest one's: `weight.index_select(dim, index[first:last] - start)`.

    `dim` is None for all of it.
    """

    key: str
    dim: int | None
    first: int
    last: int
    start: int


@register_notrace_module  # which weights a narrower copy has is decided when it runs
class BackboneChoice(nn.Module):
    """A searchable block of a backbone: one copy of timm's block per expansion, each with candidate paths.

    The widest copy with the kernels of the block, or with larger ones, computes what the block does, for any number of
    paths. A narrower copy has the channels that weigh most in the block, and a smaller kernel the centre of its own.

    Where widths share weights, a narrower copy has no others than those of its channels in the widest one, and of its
    own only batch norm statistics, and the norms behind sums and behind the projection, which see other distributions.
    Which channels those are is a buffer beside it.

    Args:
        block: Block of timm, which is left as it is.
        spec: What the block may choose from; the largest expansion is the block's own.
        num_shadows: Number of batch norms behind a sum, a single one shared by all numbers of paths if None.
        share_widths: Narrower copies use the weights of the widest.
    """

    def __init__(
        self, block: nn.Module, spec: BlockSpec, num_shadows: int | None = None, share_widths: bool = False
    ) -> None:
        super().__init__()
        self.site = BlockSite.of(block)
        self.out_chs = spec.out_chs
        indices: dict[str, torch.Tensor | None] = {}
        for expand_ratio in spec.expand_ratios:
            name = branch_name(expand_ratio)
            branch, indices[name] = _make_branch(block, self.site, expand_ratio, spec, num_shadows)
            self.add_module(name, branch)
        # The widest is the block itself
        self.widest = branch_name(max(spec.expand_ratios))
        self._slices: dict[str, list[_Slice]] = {}
        if share_widths:
            for name, index in indices.items():
                if index is not None:
                    self._share(name, index)
        self.active_branch: str | None = self.widest
        self.train(block.training)

    def _share(self, name: str, index: torch.Tensor) -> None:
        """Take from a narrower copy the weights that the widest has."""
        self.register_buffer(f'{name}_channels', index)
        branch, widest, site = self._modules[name], self._modules[self.widest], self.site
        # Groups of channels keep a part of their own each
        sums = _path_sums(widest.get_submodule(site.paths)) if site.is_inside else []
        sizes = [next(iter(paths.values())).conv.out_channels for paths in sums]
        groups: dict[str, tuple[int, int, int]] = {}
        for i, keep in enumerate(split_channels(len(index), len(sizes)) if len(sizes) > 1 else ()):
            first = sum(split_channels(len(index), len(sizes))[:i])
            groups[f'{site.paths}.{group_name(i)}.'] = first, first + keep, sum(sizes[:i])
        self._slices[name] = []
        # Up to the projection, in timm's order; what follows are norms, and what works on normalised features
        parameters = list(branch.named_parameters())
        end = max(i for i, (key, _) in enumerate(parameters) if key.startswith(f'{site.project}.'))
        for key, parameter in parameters[: end + 1]:
            if key.startswith(f'{site.sum_norm}.'):
                continue
            shape = widest.get_parameter(key).shape
            dim = next((d for d, (a, b) in enumerate(zip(parameter.shape, shape)) if a != b), None)
            first, last, start = next((g for prefix, g in groups.items() if key.startswith(prefix)), (0, len(index), 0))
            self._slices[name].append(_Slice(key, dim, first, last, start))
            module, _, leaf = key.rpartition('.')
            owner = branch.get_submodule(module)
            owner.register_parameter(leaf, None)
            if isinstance(owner, nn.BatchNorm2d):
                owner.affine = False  # for what goes by it, as timm.utils.freeze does

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """What a copy of the block has in common with the widest one, by its own names."""
        if name not in self._slices:
            return {}
        widest, index = self._modules[self.widest], self._buffers[f'{name}_channels']
        weights: dict[str, torch.Tensor] = {}
        for part in self._slices[name]:
            module, _, leaf = part.key.rpartition('.')
            # Whatever stands in the place of the parameter: a parametrization, what functional_call was given
            weight = getattr(widest.get_submodule(module), leaf)
            if part.dim is not None:
                weight = weight.index_select(part.dim, index[part.first : part.last] - part.start)
            weights[part.key] = weight
        return weights

    # timm.utils.freeze and unfreeze give the norms of a narrower copy tensors of their own, which nothing uses. A state
    # dict is the same before, between and afterwards.

    def state_dict(self, *args: Any, prefix: str = '', **kwargs: Any) -> dict[str, Any]:
        """See `nn.Module.state_dict`."""
        state_dict = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in self._unused_keys():
            state_dict.pop(prefix + key, None)
        return state_dict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key in self._unused_keys():
            module, _, leaf = key.rpartition('.')
            if (own := getattr(self.get_submodule(module), leaf)) is not None:
                state_dict.setdefault(prefix + key, own.detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _unused_keys(self) -> list[str]:
        return [f'{name}.{part.key}' for name, slices in self._slices.items() for part in slices]

    def set_choice(self, choice: BlockChoice) -> None:
        """Activate the paths of a choice."""
        if choice.is_skip:
            self.active_branch = None
            return
        self.active_branch = branch_name(choice.expand_ratio)
        branch = self._modules[self.active_branch]
        for paths, group in zip(_path_sums(branch.get_submodule(self.site.paths)), choice.groups):
            paths.active = tuple(path_name(k) for k in group)
        # With channel groups nothing counts paths
        set_num_paths(branch.get_submodule(self.site.sum_norm), len(choice.groups[0]))
        if self.site.is_inside and isinstance(branch.se, SqueezeExcite):
            set_num_paths(branch.se.conv_reduce, len(choice.groups[0]))

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, the bottleneck in every case: the expansion's width varies."""
        return dict(module='', num_chs=self.out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        if self.active_branch is None:
            return x
        branch, weights = self._modules[self.active_branch], self._weights(self.active_branch)
        return _call_with(branch, weights, x) if weights else branch(x)

    def parts(self, choice: BlockChoice) -> tuple[str, list[str]]:
        """Names of what a choice is made of: the copy of the block, and the paths in it, group by group."""
        branch, paths = branch_name(choice.expand_ratio), self.site.paths
        groups = [''] if len(choice.groups) == 1 else [f'{group_name(i)}.' for i in range(len(choice.groups))]
        names = [f'{g}{path_name(k)}' for g, group in zip(groups, choice.groups) for k in group]
        return branch, [f'{branch}.{paths}.{name}' for name in names]

    @torch.no_grad()
    def fixed(self, choice: BlockChoice) -> nn.Module:
        """Return the block of a choice with a copy of its weights: timm's own, or with sums in its middle.

        What depends on the number of paths goes into the weights, so that a plain sum and plain layers remain.
        """
        if choice.is_skip:
            return SkippedBlock(self.out_chs)
        name = branch_name(choice.expand_ratio)
        site, block = self.site, copy.deepcopy(self._modules[name])
        for key, weight in self._weights(name).items():
            module, _, leaf = key.rpartition('.')
            owner = block.get_submodule(module)
            owner.register_parameter(leaf, nn.Parameter(weight.detach().clone()))
            if isinstance(owner, nn.BatchNorm2d):
                owner.affine = True
        candidates = _path_sums(block.get_submodule(site.paths))
        groups = [{path_name(k): paths[path_name(k)] for k in group} for paths, group in zip(candidates, choice.groups)]
        if all(len(group) == 1 for group in groups):
            _set_single_paths(block, site, [path for group in groups for path in group.values()])
        else:
            block.set_submodule(site.paths, _join_groups([PathSum(group) for group in groups]))

        num_paths = choice.num_paths
        norm = block.get_submodule(site.sum_norm)
        if isinstance(norm, ActiveShadowBatchNorm2d):
            block.set_submodule(site.sum_norm, norm.shadows[num_paths[0] - 1])
        if site.is_inside and isinstance(block.se, SqueezeExcite):
            block.se.conv_reduce = _recast(nn.Conv2d, block.se.conv_reduce)
            _divide_inputs(block.se.conv_reduce, num_paths)
        if len(groups) > 1:
            _divide_inputs(block.get_submodule(site.linear), num_paths)
        return block.train(self.training)

    def inherited(self, choice: BlockChoice, block: nn.Module) -> dict[str, torch.Tensor]:
        """Return the state dict of the block of a choice, which `block` is; see `fixed`."""
        return self.fixed(choice).state_dict()


def _call_with(module: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call a module with weights by name in the place of parameters that it does not have."""
    if not torch.jit.is_tracing():
        return functional_call(module, weights, (x,))
    # which functional_call refuses
    places = {key: (module.get_submodule(key.rpartition('.')[0]), key.rpartition('.')[2]) for key in weights}
    for key, (owner, leaf) in places.items():
        owner._parameters[leaf] = weights[key]
    try:
        return module(x)
    finally:
        for owner, leaf in places.values():
            owner._parameters[leaf] = None


class SkippedBlock(nn.Identity):
    """What is left of a block of which nothing but its shortcut runs.

    Args:
        out_chs: Channels that go through.
    """

    def __init__(self, out_chs: int) -> None:
        super().__init__()
        self.out_chs = out_chs

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, its output in every case."""
        return dict(module='', num_chs=self.out_chs)


def fixed_block(block: nn.Module, choice: BlockChoice) -> nn.Module:
    """Return the stand-alone block of a choice, with the weights that it inherits from a block of timm.

    Args:
        block: Block of timm that has a `BlockSite`; it is left as it is.
        choice: Paths and expansion, or a block that is skipped.
    """
    if choice.is_skip:
        return SkippedBlock(block.feature_info('bottleneck')['num_chs'])
    kernel_sizes = tuple(sorted({k for group in choice.groups for k in group}))
    spec = BlockSpec(
        out_chs=1, expand_ratios=(choice.expand_ratio,), kernel_sizes=kernel_sizes, num_groups=len(choice.groups)
    )
    return BackboneChoice(block, spec, num_shadows=max(choice.num_paths)).fixed(choice)


@torch.no_grad()
def _make_branch(
    block: nn.Module, site: BlockSite, expand_ratio: int | float, spec: BlockSpec, num_shadows: int | None
) -> tuple[nn.Module, torch.Tensor | None]:
    """Return a copy of a block with paths, and which expanded channels it has left, None for all of them."""
    branch, index = copy.deepcopy(block), None
    if site.expand is not None:
        index = _narrow(branch, site, make_divisible(branch.get_submodule(site.expand).in_channels * expand_ratio))

    # Paths
    convs, norm = _convs(branch.get_submodule(site.conv)), branch.get_submodule(site.conv_norm)
    others = {}
    if site.paths != site.conv:  # what else the layer does, such as to blur
        layer = branch.get_submodule(site.paths)
        others = {name: module for name, module in layer.named_children() if name not in ('conv', 'bn')}
    sum_cls = ActivePathSum if len(convs) == 1 else _ActivePathMean
    sums: list[PathSum] = []
    start = 0
    for conv in convs:
        part = range(start, start + conv.out_channels)
        paths: dict[str, nn.Module] = {}
        for kernel_size in spec.kernel_sizes:
            path = {'conv': _resized(conv, kernel_size), 'bn': _narrowed_norm(norm, part), **copy.deepcopy(others)}
            paths[path_name(kernel_size)] = nn.Sequential(OrderedDict(path))
        sums.append(sum_cls(paths))
        start += conv.out_channels
    branch.set_submodule(site.paths, _join_groups(sums))
    if site.paths == site.conv:
        branch.set_submodule(site.conv_norm, nn.Identity())
    if len(convs) > 1:
        return branch, index

    # What stands behind the sum
    if num_shadows is not None:
        branch.set_submodule(site.sum_norm, _make_shadows(branch.get_submodule(site.sum_norm), num_shadows))
    if site.is_inside and isinstance(branch.se, SqueezeExcite):
        branch.se.conv_reduce = _recast(_MeanConv2d, branch.se.conv_reduce)
    return branch, index


def _recast(conv_cls: type[nn.Conv2d], conv: nn.Conv2d) -> nn.Conv2d:
    """A 1x1 convolution of another class with the same parameters."""
    other = conv_cls(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None, device='meta')
    other.weight, other.bias = conv.weight, conv.bias
    return other.train(conv.training)


def _convs(conv: nn.Module) -> list[nn.Conv2d]:
    return list(conv.values()) if isinstance(conv, MixedConv2d) else [conv]


def _path_sums(paths: nn.Module) -> list[PathSum]:
    return list(paths.values()) if isinstance(paths, GroupedPaths) else [paths]


def _join_groups(sums: Sequence[PathSum]) -> nn.Module:
    if len(sums) == 1:
        return sums[0]
    splits = [next(iter(paths.values())).conv.out_channels for paths in sums]
    return GroupedPaths({group_name(i): paths for i, paths in enumerate(sums)}, splits)


def _set_single_paths(block: nn.Module, site: BlockSite, paths: list[nn.Module]) -> None:
    """Put one path per channel group where timm has it."""
    convs = [path.conv for path in paths]
    conv = convs[0]
    if len(paths) > 1:
        chs = sum(conv.out_channels for conv in convs)
        conv = MixedConv2d(chs, chs, [c.kernel_size[0] for c in convs], depthwise=True, device='meta')
        for index, part in enumerate(convs):
            conv[str(index)] = part
    norm = _joined_norm([path.bn for path in paths])
    if site.paths == site.conv:
        block.set_submodule(site.conv, conv)
        block.set_submodule(site.conv_norm, norm)
        return
    # timm's layer is a plain sequence in eval mode as in training, as the paths are
    block.set_submodule(site.paths, paths[0])


def _resized(conv: nn.Conv2d, kernel_size: int) -> nn.Conv2d:
    """Copy a depthwise convolution with another kernel: zeros around the old one, or its centre."""
    conv = copy.deepcopy(conv)
    margin = (kernel_size - conv.kernel_size[0]) // 2
    if margin:
        conv.weight = nn.Parameter(F.pad(conv.weight, [margin] * 4), requires_grad=conv.weight.requires_grad)
        conv.kernel_size = (kernel_size, kernel_size)
        if not isinstance(conv, Conv2dSame):  # which pads for the input that it gets
            conv.padding = (get_padding(kernel_size, conv.stride[0], conv.dilation[0]),) * 2
    return conv


def _narrow(block: nn.Module, site: BlockSite, width: int) -> torch.Tensor | None:
    """Leave the expanded channels that weigh most, in place, and return their indices; None if all are left."""
    expand, project = block.get_submodule(site.expand), block.get_submodule(site.project)
    if width == expand.out_channels:
        return None
    # How much a channel of usual strength adds to the block's output
    scale = block.get_submodule(site.conv_norm if site.is_inside else site.expand_norm).weight.abs()
    weight = project.weight.flatten(1).norm(dim=0) * scale
    convs = _convs(block.get_submodule(site.conv))
    sizes = [conv.out_channels for conv in convs] if site.is_inside else [expand.out_channels]
    keep_sizes = split_channels(width, len(sizes))
    kept = [part.topk(n).indices.sort().values for part, n in zip(weight.split(sizes), keep_sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    index = torch.cat([part + start for part, start in zip(kept, starts)])

    _narrow_conv(expand, outputs=index)
    block.set_submodule(site.expand_norm, _narrowed_norm(block.get_submodule(site.expand_norm), index))
    if site.is_inside:
        for conv, part in zip(convs, kept):
            _narrow_conv(conv, outputs=part)
        block.set_submodule(site.conv_norm, _narrowed_norm(block.get_submodule(site.conv_norm), index))
        for module in block.modules():
            if isinstance(module, BlurPool2d) and module.channels is not None:
                module.channels, module.filt = len(index), module.filt[index]
    if isinstance(block.se, SqueezeExcite):
        _narrow_conv(block.se.conv_reduce, inputs=index)
        _narrow_conv(block.se.conv_expand, outputs=index)
    _narrow_conv(project, inputs=index)
    return index


def _narrow_conv(conv: nn.Conv2d, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None) -> None:
    if outputs is not None:
        conv.weight = nn.Parameter(conv.weight[outputs])
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[outputs])
        if conv.groups > 1:  # depthwise
            conv.in_channels = conv.groups = len(outputs)
        conv.out_channels = len(outputs)
    if inputs is not None:
        conv.weight = nn.Parameter(conv.weight[:, inputs])
        conv.in_channels = len(inputs)


def _narrowed_norm(norm: nn.BatchNorm2d, index: torch.Tensor | range) -> nn.BatchNorm2d:
    """Copy a batch norm, with its activation, for some of its channels."""
    norm = copy.deepcopy(norm)
    index = slice(index.start, index.stop) if isinstance(index, range) else index
    for name in ('weight', 'bias'):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[index].clone()))
    norm.running_mean, norm.running_var = norm.running_mean[index].clone(), norm.running_var[index].clone()
    norm.num_features = len(norm.running_mean)
    return norm


def _joined_norm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """Batch norms of neighbouring channels as one."""
    norm = norms[0]
    if len(norms) > 1:
        for name in ('weight', 'bias'):
            setattr(norm, name, nn.Parameter(torch.cat([getattr(part, name) for part in norms])))
        for name in ('running_mean', 'running_var'):
            setattr(norm, name, torch.cat([getattr(part, name) for part in norms]))
        norm.num_features = len(norm.weight)
    return norm


def _make_shadows(norm: nn.BatchNorm2d, num_shadows: int) -> ActiveShadowBatchNorm2d:
    """Copies of a batch norm, with its activation, for 1, 2, ... times what it normalises."""
    shadows = ActiveShadowBatchNorm2d(norm.num_features, num_shadows, device='meta')
    for index in range(num_shadows):
        shadow = shadows.shadows[index] = copy.deepcopy(norm)
        statistics = sum_statistics(shadow.running_mean, shadow.running_var, index + 1, norm.eps)
        shadow.running_mean, shadow.running_var = statistics
    return shadows


def _divide_inputs(conv: nn.Module, num_paths: Sequence[int]) -> None:
    """Divide the weights of a convolution by the number of paths that its input sums, per channel group, in place."""
    if set(num_paths) == {1}:
        return
    convs = _convs(conv)
    group_chs = split_channels(sum(c.in_channels for c in convs), len(num_paths))
    counts = torch.cat([torch.full((n,), j) for n, j in zip(group_chs, num_paths)]).to(convs[0].weight)
    start = 0
    for c in convs:
        c.weight.div_(counts[start : start + c.in_channels].view(1, -1, 1, 1))
        start += c.in_channels
