"""The multi-path inverted bottleneck of a stand-alone network."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from timm.layers import ConvNormAct, DropPath, LayerType, create_conv2d, get_norm_act_layer, make_divisible
from torch import nn

from ..spaces.space import BlockSpec
from ._timm import DepthwiseSeparableConv, SqueezeExcite
from .layers import fold_bn, saves_its_output, sum_paths

__all__ = [
    'DepthwiseSeparable',
    'GroupedPaths',
    'MultiPathResidual',
    'PathSum',
    'branch_name',
    'group_name',
    'path_name',
    'spec_kwargs',
    'split_channels',
]


def path_name(kernel_size: int) -> str:
    return f'k{kernel_size}'


def branch_name(expand_ratio: int | float) -> str:
    return f'e{expand_ratio}'.replace('.', '_')  # a module's name holds no dot


def group_name(group: int) -> str:
    return f'g{group}'


def split_channels(channels: int, num_groups: int) -> list[int]:
    """Return the channels of each group; what does not divide goes to the first, as in timm's MixedConv2d."""
    group_chs = channels // num_groups
    return [channels - group_chs * (num_groups - 1), *[group_chs] * (num_groups - 1)]


class PathSum(nn.ModuleDict):
    """Depthwise convolutions in parallel, each with its norm and activation, summed.

    Args:
        paths: By `path_name`; modules [B, C, H, W] -> [B, C, H / stride, W / stride] with a convolution `conv`.
    """

    def __init__(self, paths: Mapping[str, nn.Module]) -> None:
        super().__init__(paths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        outputs: list[torch.Tensor] = []
        for path in self.values():
            outputs.append(path(x))
        return sum_paths(outputs)


class GroupedPaths(nn.ModuleDict):
    """Channels in groups, each with paths of its own: the mixed depthwise convolution of MixNet, with sums.

    Args:
        groups: Paths by `group_name`, in the order of the channels.
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
        inplace = saves_its_output(act_layer)
        mid_chs = make_divisible(in_chs * expand_ratio)
        self.has_skip = stride == 1 and in_chs == out_chs

        # Point-wise expansion
        self.conv_pw = create_conv2d(in_chs, mid_chs, 1, groups=exp_groups, **dd)
        self.bn1 = norm_act_layer(mid_chs, inplace=inplace, **dd)

        # Parallel depth-wise paths
        self.group_chs = split_channels(mid_chs, len(groups))
        runs = self._make_runs(groups)
        splits = [sum(self.group_chs[i] for i in run) for run in runs]
        # Where nothing is summed, one norm and activation behind all groups does what one in every path would
        is_sum_free = all(len(group) == 1 for group in groups) and not norm_sums
        self.joint_norm = len(runs) > 1 and is_sum_free and self._can_join_norms()
        make_path = partial(
            ConvNormAct,
            stride=stride,
            dilation=dilation,
            norm_layer=norm_layer,
            act_layer=act_layer,
            act_kwargs=dict(inplace=inplace),
            apply_norm=not self.joint_norm,
            apply_act=not self.joint_norm,
            **dd,
        )
        path_sums = [
            self._path_sum_cls({path_name(k): make_path(chs, chs, k, groups=chs) for k in groups[run[0]]})
            for run, chs in zip(runs, splits)
        ]
        if len(runs) == 1:
            self.paths = path_sums[0]
            self.run_names = {'paths': runs[0]}
        else:
            names = [group_name(run[0]) for run in runs]
            self.paths = GroupedPaths(dict(zip(names, path_sums)), splits)
            self.run_names = {f'paths.{name}': run for name, run in zip(names, runs)}
        if self.joint_norm:
            self.bn2 = norm_act_layer(mid_chs, inplace=inplace, **dd)
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
        # One wide convolution is faster than several narrow ones of the same kernels: a forward pass of 8 images of
        # 128x128 pixels takes 80.6 ms in place of 91.4 in S3's default network, 93.1 in place of 97.1 in mixpath_a
        # (one core, median of 8). The joint norm saves launches on a GPU and nothing on a CPU.
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


def spec_kwargs(spec: BlockSpec) -> dict[str, Any]:
    """The arguments of `MultiPathResidual` that a space fixes."""
    return dict(exp_groups=spec.exp_groups, pwl_groups=spec.pwl_groups, se_ratio=spec.se_ratio)
