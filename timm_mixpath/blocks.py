"""The multi-path inverted bottleneck, as a fixed block and as a choice block of a supernet.

Both use the same parameter names, so that a sub-network's weights are a selection of its supernet's keys.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, LayerType, create_conv2d, get_norm_act_layer, make_divisible
from timm.layers.mixed_conv2d import _split_channels
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, SqueezeExcite
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .arch import BlockChoice
from .layers import LeanReLU6, ShadowBatchNorm2d
from .space import BlockSpec

__all__ = ['ChoiceBlock', 'DepthwiseSeparable', 'MultiPathResidual']


def _path_name(kernel_size: int) -> str:
    return f'k{kernel_size}'


def _group_name(group: int) -> str:
    return f'g{group}'


def _branch_name(expand_ratio: int) -> str:
    return f'e{expand_ratio}'


class PathSum(nn.ModuleDict):
    """Depthwise convolutions in parallel, each with its norm and activation, summed.

    Args:
        channels: Input and output channels.
        kernel_sizes: Kernels of the paths.
        **kwargs: Arguments of `timm.layers.ConvNormAct`.
    """

    def __init__(self, channels: int, kernel_sizes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(
            {_path_name(k): ConvNormAct(channels, channels, k, groups=channels, **kwargs) for k in kernel_sizes}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        outputs: list[torch.Tensor] = []
        for path in self.values():
            outputs.append(path(x))
        return sum_paths(outputs)


class ActivePathSum(PathSum):
    """A `PathSum` of which only the active paths run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active: tuple[str, ...] = tuple(self)[:1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        return sum_paths([self[name](x) for name in self.active])

    def path_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs [B, C, H / stride, W / stride] of all candidate paths, active or not, see `stats.SumSite`."""
        return {name: path(x) for name, path in self.items()}

    @torch.no_grad()
    def nest(self) -> None:
        """Give every path the weights of the smallest kernel, padded with zeros: all compute the same then."""
        weights = sorted((path.conv.weight for path in self.values()), key=lambda weight: weight.shape[-1])
        for weight in weights[1:]:
            weight.copy_(F.pad(weights[0], [(weight.shape[-1] - weights[0].shape[-1]) // 2] * 4))


class GroupedPaths(nn.ModuleDict):
    """Channels in groups, each with paths of its own: the mixed depthwise convolution of MixNet, with sums.

    Args:
        groups: Paths by name, in the order of the channels.
        splits: Channels of each.
    """

    def __init__(self, groups: dict[str, PathSum], splits: Sequence[int]) -> None:
        super().__init__(groups)
        self.splits = list(splits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        x_split = torch.split(x, self.splits, 1)
        outputs: list[torch.Tensor] = []
        for i, paths in enumerate(self.values()):
            outputs.append(paths(x_split[i]))
        return torch.cat(outputs, 1)


class MultiPathResidual(nn.Module):
    """Inverted bottleneck whose depthwise convolutions run in parallel and are summed, per channel group.

    1x1 expansion, BN, act; per channel group and kernel a depthwise convolution, BN, act; sum; squeeze-and-excite;
    1x1 projection, BN; residual add when the shapes allow. With one kernel it is timm's `InvertedResidual`, with
    several groups of one kernel each it is the block of MixNet.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        groups: Kernels of the parallel paths, per channel group.
        expand_ratio: Expansion.
        stride: Stride of the depthwise convolutions.
        dilation: Dilation of the depthwise convolutions.
        exp_groups: Convolution groups of the expansion.
        pwl_groups: Convolution groups of the projection.
        se_ratio: Squeeze-and-excite channels relative to `in_chs`, 0 for none.
        norm_sums: Put a batch norm behind the sums too. A supernet whose channel groups sum different numbers of
            paths needs it, since the projection mixes the groups and one number no longer describes its output.
        act_layer: Activation.
        norm_layer: Normalisation.
        drop_path_rate: Stochastic depth rate of the residual branch.

    Attributes:
        group_chs: Channels of every channel group.
        joint_norm: The channel groups have one norm and activation behind them, instead of one in every path.
        run_names: Channel groups that share convolutions, neighbours with equal kernels: their indices by the name of
            the `PathSum` that holds the convolutions.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        groups: Sequence[Sequence[int]],
        expand_ratio: int,
        stride: int = 1,
        dilation: int = 1,
        exp_groups: int = 1,
        pwl_groups: int = 1,
        se_ratio: float = 0.0,
        norm_sums: bool = False,
        act_layer: LayerType = nn.ReLU6,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        mid_chs = make_divisible(in_chs * expand_ratio)
        self.has_skip = stride == 1 and in_chs == out_chs

        # Point-wise expansion
        self.conv_pw = create_conv2d(in_chs, mid_chs, 1, groups=exp_groups, **dd)
        self.bn1 = norm_act_layer(mid_chs, inplace=True, **dd)

        # Parallel depth-wise paths
        self.group_chs = _split_channels(mid_chs, len(groups))
        runs = self._make_runs(groups)
        splits = [sum(self.group_chs[i] for i in run) for run in runs]
        # Where nothing is summed, one norm and activation behind all groups does what one in every path would
        is_sum_free = all(len(group) == 1 for group in groups) and not norm_sums
        self.joint_norm = len(runs) > 1 and is_sum_free and self._can_join_norms()
        path_sums = [
            self._path_sum_cls(
                chs,
                groups[run[0]],
                stride=stride,
                dilation=dilation,
                norm_layer=norm_layer,
                act_layer=act_layer,
                act_kwargs=dict(inplace=True),
                apply_norm=not self.joint_norm,
                apply_act=not self.joint_norm,
                **dd,
            )
            for run, chs in zip(runs, splits)
        ]
        if len(runs) == 1:
            self.paths = path_sums[0]
            self.run_names = {'paths': runs[0]}
        else:
            names = [_group_name(run[0]) for run in runs]
            self.paths = GroupedPaths(dict(zip(names, path_sums)), splits)
            self.run_names = {f'paths.{name}': run for name, run in zip(names, runs)}
        if self.joint_norm:
            self.bn2 = norm_act_layer(mid_chs, inplace=True, **dd)
        else:
            self.bn2 = norm_act_layer(mid_chs, apply_act=False, **dd) if norm_sums else nn.Identity()

        # Squeeze-and-excite
        if se_ratio:
            self.se = SqueezeExcite(mid_chs, rd_ratio=se_ratio / expand_ratio, act_layer=act_layer, **dd)
        else:
            self.se = nn.Identity()

        # Point-wise linear projection
        self.conv_pwl = create_conv2d(mid_chs, out_chs, 1, groups=pwl_groups, **dd)
        self.bn3 = norm_act_layer(out_chs, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.folded = False

    _path_sum_cls: ClassVar[type[PathSum]] = PathSum

    def _make_runs(self, groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        # One wide convolution is faster than several narrow ones of the same kernels
        if not self._can_join_norms():
            return tuple((i,) for i in range(len(groups)))
        runs = groupby(range(len(groups)), key=lambda i: sorted(groups[i]))
        return tuple(tuple(run) for _, run in runs)

    def _can_join_norms(self) -> bool:
        # What does not work channel by channel, such as group norm or a learned activation, gives other outputs
        return isinstance(self.bn1, nn.BatchNorm2d) and not any(True for _ in self.bn1.act.parameters())

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, see timm's `InvertedResidual`."""
        if location == 'expansion':  # input to the projection
            return dict(module='conv_pwl', hook_type='forward_pre', num_chs=self.conv_pwl.in_channels)
        return dict(module='', num_chs=self.conv_pwl.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        shortcut = x
        x = self.conv_pw(x)
        x = self.bn1(x)
        x = self.paths(x)
        x = self.bn2(x)
        x = self.se(x)
        x = self.conv_pwl(x)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions, in place and for good: for inference in eval mode.

        `timm.utils.reparameterize_model` calls it.
        """
        if self.folded:
            return
        fold_bn(self, 'conv_pw', 'bn1')
        if self.joint_norm:
            self._fold_joint_norm()
        for module in self.paths.modules():
            if isinstance(module, ConvNormAct):
                fold_bn(module, 'conv', 'bn')
        self._fold_projection()
        self.folded = True

    def _fold_joint_norm(self) -> None:
        start = 0
        for name in self.run_names:
            (path,) = self.get_submodule(name).values()
            end = start + path.conv.out_channels
            part = nn.BatchNorm2d(end - start, eps=self.bn2.eps).to(self.bn2.weight)
            part.load_state_dict({k: v[start:end] if v.ndim else v for k, v in self.bn2.state_dict().items()})
            path.bn = part
            start = end
        self.bn2 = self.bn2.act

    def _fold_projection(self) -> None:
        fold_bn(self, 'conv_pwl', 'bn3')


class DepthwiseSeparable(DepthwiseSeparableConv):
    """timm's depthwise-separable block, whose batch norms can be folded."""

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions, see `MultiPathResidual.reparameterize`."""
        fold_bn(self, 'conv_dw', 'bn1')
        fold_bn(self, 'conv_pw', 'bn2')


def fold_bn(parent: nn.Module, conv: str, bn: str) -> None:
    """Fold the batch norm `bn` of a module into its convolution `conv`; another kind of norm is left alone."""
    norm = getattr(parent, bn)
    if isinstance(norm, nn.BatchNorm2d):
        setattr(parent, conv, _fuse(getattr(parent, conv), norm))
        setattr(parent, bn, getattr(norm, 'act', nn.Identity()))  # timm's BatchNormAct2d holds the activation


def _fuse(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    # torch wants both in eval mode, but timm's scripts fold before they call eval()
    training = conv.training
    fused = fuse_conv_bn_eval(conv.eval(), bn.eval())
    for module in (conv, bn, fused):
        module.train(training)
    return fused


def sum_paths(outputs: list[torch.Tensor]) -> torch.Tensor:
    x = outputs[0]
    for i, y in enumerate(outputs[1:]):
        # The first sum needs memory of its own, an activation saved its input there; the others can reuse it.
        x = x + y if i == 0 else x.add_(y)
    return x


class ChoiceBranch(MultiPathResidual):
    """One expansion of a choice block: all candidate paths, of which `forward` runs the active ones.

    Where the paths of the whole block are summed, the shadow batch norms stand behind the projection, as in the
    paper. With channel groups every group has a number of active paths of its own, so its shadows stand behind its
    own sum; the projection mixes the groups.

    Args:
        num_shadows: Number of batch norms behind a sum, a single one shared by all numbers of paths if None.
        **kwargs: See `MultiPathResidual`.

    Raises:
        ValueError: Sums are to be normalised per channel group, by something else than a batch norm.
    """

    _path_sum_cls = ActivePathSum

    def __init__(self, *args: Any, num_shadows: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.paths, GroupedPaths):
            if not isinstance(self.bn2, nn.Identity):
                if not isinstance(self.bn2, nn.BatchNorm2d):
                    raise ValueError(
                        f'norm_layer {type(self.bn2).__name__} can not normalise the sums of channel groups; '
                        'use a batch norm, or m=1'
                    )
                self.bn2 = nn.ModuleList([_make_shadows(self.bn2, chs, num_shadows) for chs in self.paths.splits])
        elif num_shadows is not None:
            self.bn3 = _make_shadows(self.bn3, self.bn3.num_features, num_shadows)

    def _can_join_norms(self) -> bool:
        return False  # every candidate has statistics of its own

    @property
    def path_sums(self) -> list[ActivePathSum]:
        """The candidate paths, per channel group."""
        return list(self.paths.values()) if isinstance(self.paths, GroupedPaths) else [self.paths]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        if self.folded and self.training:
            raise RuntimeError('the batch norms of this supernet are folded, it can be evaluated but not trained')
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self._normalised_groups(x) if isinstance(self.bn2, nn.ModuleList) else self.paths(x)
        x = self.se(x)
        if isinstance(self.bn3, ShadowBatchNorm2d):
            x = self.bn3(self.conv_pwl(x), len(self.paths.active))
        elif isinstance(self.conv_pwl, nn.ModuleList):
            x = self.conv_pwl[len(self.paths.active) - 1](x)
        else:
            x = self.bn3(self.conv_pwl(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x

    def _normalised_groups(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        for chunk, paths, bn in zip(torch.split(x, self.paths.splits, 1), self.path_sums, self.bn2):
            y = paths(chunk)
            outputs.append(bn(y, len(paths.active)) if isinstance(bn, ShadowBatchNorm2d) else bn(y))
        return torch.cat(outputs, 1)

    def _fold_projection(self) -> None:
        # One projection per shadow: what a shadow normalises is folded once and serves every arch
        if isinstance(self.bn3, ShadowBatchNorm2d):
            self.conv_pwl = nn.ModuleList([_fuse(self.conv_pwl, bn) for bn in self.bn3.shadows])
            self.bn3 = nn.Identity()
        else:
            super()._fold_projection()


def _make_shadows(bn: nn.BatchNorm2d, num_features: int, num_shadows: int | None) -> nn.Module:
    """Batch norms like `bn` of another width, a single one if `num_shadows` is None."""
    kwargs = dict(eps=bn.eps, momentum=bn.momentum, device=bn.weight.device, dtype=bn.weight.dtype)
    if num_shadows is None:
        return nn.BatchNorm2d(num_features, **kwargs)
    return ShadowBatchNorm2d(num_features, num_shadows, **kwargs)


class ChoiceBlock(nn.Module):
    """A searchable position of a supernet: one `ChoiceBranch` per expansion, one of which is active.

    Args:
        in_chs: Input channels.
        spec: What the block may choose from.
        num_shadows: See `ChoiceBranch`.
        **kwargs: Common arguments of the branches, see `MultiPathResidual`.
    """

    def __init__(self, in_chs: int, spec: BlockSpec, num_shadows: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        if kwargs.get('act_layer') is nn.ReLU6:
            kwargs['act_layer'] = LeanReLU6
        self.out_chs = spec.out_chs
        for expand_ratio in spec.expand_ratios:
            branch = ChoiceBranch(
                in_chs,
                spec.out_chs,
                (spec.kernel_sizes,) * spec.num_groups,
                expand_ratio,
                num_shadows=num_shadows,
                **spec_kwargs(spec),
                **kwargs,
            )
            self.add_module(_branch_name(expand_ratio), branch)
        self.active_branch = _branch_name(spec.expand_ratios[0])

    def set_choice(self, choice: BlockChoice) -> None:
        """Activate the paths of a choice."""
        self.active_branch = _branch_name(choice.expand_ratio)
        for paths, group in zip(self._modules[self.active_branch].path_sums, choice.groups):
            paths.active = tuple(_path_name(k) for k in group)

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, the bottleneck in every case: the expansion's width varies."""
        return dict(module='', num_chs=self.out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        return self._modules[self.active_branch](x)


def spec_kwargs(spec: BlockSpec) -> dict[str, Any]:
    """The arguments of `MultiPathResidual` that a space fixes."""
    return dict(exp_groups=spec.exp_groups, pwl_groups=spec.pwl_groups, se_ratio=spec.se_ratio)


def subnet_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    choice: BlockChoice,
    block: MultiPathResidual,
) -> dict[str, torch.Tensor]:
    """Select from a choice block's state dict what the fixed block of a choice inherits.

    Args:
        state_dict: State dict of a `ChoiceBlock`.
        choice: Choice of the fixed block.
        block: The fixed block. Channel groups that share its convolutions have their weights joined.

    Returns:
        State dict of `block`; tensors that were not joined are those of `state_dict`.
    """
    run_names = {group: name.split('.') for name, run in block.run_names.items() for group in run}
    pieces: dict[str, list[torch.Tensor]] = {}
    for key, value in state_dict.items():
        branch, *parts = key.split('.')
        if branch != _branch_name(choice.expand_ratio):
            continue
        group = 0
        if parts[0] == 'paths':
            if len(choice.groups) > 1:
                group = int(parts.pop(1)[1:])
            if parts[1] not in map(_path_name, choice.groups[group]):
                continue
            parts[:1] = run_names[group]
            if block.joint_norm and 'bn' in parts:
                parts = ['bn2', parts[-1]]
        elif parts[0] == 'bn2':
            group = int(parts.pop(1))
        if parts[1] == 'shadows':
            if int(parts[2]) != len(choice.groups[group]) - 1:
                continue
            del parts[1:3]
        pieces.setdefault('.'.join(parts), []).append(value)
    # The channel groups come in order; what is not per channel, such as num_batches_tracked, is the same in all
    return {key: torch.cat(p) if len(p) > 1 and p[0].ndim else p[0] for key, p in pieces.items()}
