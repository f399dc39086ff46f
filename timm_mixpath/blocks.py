"""The multi-path inverted bottleneck, as a fixed block and as a choice block of a supernet.

Both use the same parameter names, so that a sub-network's weights are a selection of its supernet's keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, LayerType, create_conv2d, get_norm_act_layer, make_divisible
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .arch import BlockChoice
from .layers import LeanReLU6, ShadowBatchNorm2d
from .space import BlockSpec

__all__ = ['ChoiceBlock', 'MultiPathResidual']


def _path_name(kernel_size: int) -> str:
    return f'k{kernel_size}'


def _branch_name(expand_ratio: int) -> str:
    return f'e{expand_ratio}'


class MultiPathResidual(nn.Module):
    """Inverted bottleneck whose depthwise convolutions run in parallel and are summed.

    1x1 expansion, BN, act; per kernel a depthwise convolution, BN, act; sum; 1x1 projection, BN; residual add when
    the shapes allow. With one kernel it is timm's `InvertedResidual`.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_sizes: Kernels of the parallel paths.
        expand_ratio: Expansion.
        stride: Stride of the depthwise convolutions.
        dilation: Dilation of the depthwise convolutions.
        act_layer: Activation.
        norm_layer: Normalisation.
        drop_path_rate: Stochastic depth rate of the residual branch.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_sizes: Sequence[int],
        expand_ratio: int,
        stride: int = 1,
        dilation: int = 1,
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
        self.conv_pw = create_conv2d(in_chs, mid_chs, 1, **dd)
        self.bn1 = norm_act_layer(mid_chs, inplace=True, **dd)

        # Parallel depth-wise paths
        self.paths = nn.ModuleDict(
            {
                _path_name(k): ConvNormAct(
                    mid_chs,
                    mid_chs,
                    k,
                    stride=stride,
                    dilation=dilation,
                    groups=mid_chs,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    act_kwargs=dict(inplace=True),
                    **dd,
                )
                for k in kernel_sizes
            }
        )

        # Point-wise linear projection
        self.conv_pwl = create_conv2d(mid_chs, out_chs, 1, **dd)
        self.bn3 = norm_act_layer(out_chs, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.folded = False

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
        outputs: list[torch.Tensor] = []
        for path in self.paths.values():
            outputs.append(path(x))
        x = _sum(outputs)
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
        _fold(self, 'conv_pw', 'bn1')
        for path in self.paths.values():
            _fold(path, 'conv', 'bn')
        self._fold_projection()
        self.folded = True

    def _fold_projection(self) -> None:
        _fold(self, 'conv_pwl', 'bn3')


def _fold(parent: nn.Module, conv: str, bn: str) -> None:
    norm = getattr(parent, bn)
    if isinstance(norm, nn.BatchNorm2d):
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), norm))
        setattr(parent, bn, getattr(norm, 'act', nn.Identity()))  # timm's BatchNormAct2d holds the activation


def _sum(outputs: list[torch.Tensor]) -> torch.Tensor:
    x = outputs[0]
    for i, y in enumerate(outputs[1:]):
        # The first sum needs memory of its own, an activation saved its input there; the others can reuse it.
        x = x + y if i == 0 else x.add_(y)
    return x


class ChoiceBranch(MultiPathResidual):
    """One expansion of a choice block: all candidate paths, of which `forward` runs the active ones.

    Args:
        num_shadows: Number of batch norms behind the sum, a single one shared by all numbers of paths if None.
        **kwargs: See `MultiPathResidual`.
    """

    def __init__(self, *args: Any, num_shadows: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if num_shadows is not None:
            bn = self.bn3
            self.bn3 = ShadowBatchNorm2d(
                bn.num_features,
                num_shadows,
                eps=bn.eps,
                momentum=bn.momentum,
                device=bn.weight.device,
                dtype=bn.weight.dtype,
            )
        self.active_paths: tuple[str, ...] = tuple(self.paths)[:1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        if self.folded and self.training:
            raise RuntimeError('the batch norms of this supernet are folded, it can be evaluated but not trained')
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = _sum([self.paths[name](x) for name in self.active_paths])
        num_paths = len(self.active_paths)
        if isinstance(self.conv_pwl, nn.ModuleList):
            x = self.conv_pwl[num_paths - 1](x)
        else:
            x = self.conv_pwl(x)
            x = self.bn3(x, num_paths) if isinstance(self.bn3, ShadowBatchNorm2d) else self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x

    def _fold_projection(self) -> None:
        # One projection per shadow: what a shadow normalises is folded once and serves every arch
        if isinstance(self.bn3, ShadowBatchNorm2d):
            self.conv_pwl = nn.ModuleList([fuse_conv_bn_eval(self.conv_pwl, bn) for bn in self.bn3.shadows])
            self.bn3 = nn.Identity()
        else:
            super()._fold_projection()


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
                in_chs, spec.out_chs, spec.kernel_sizes, expand_ratio, num_shadows=num_shadows, **kwargs
            )
            self.add_module(_branch_name(expand_ratio), branch)
        self.active_branch = _branch_name(spec.expand_ratios[0])

    def set_choice(self, choice: BlockChoice) -> None:
        """Activate the paths of a choice."""
        self.active_branch = _branch_name(choice.expand_ratio)
        self._modules[self.active_branch].active_paths = tuple(_path_name(k) for k in choice.groups[0])

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, the bottleneck in every case: the expansion's width varies."""
        return dict(module='', num_chs=self.out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        return self._modules[self.active_branch](x)


def subnet_key(key: str, choice: BlockChoice) -> str | None:
    """Translate a choice block's state dict key to the fixed block's, None for what the choice leaves out."""
    branch, _, key = key.partition('.')
    if branch != _branch_name(choice.expand_ratio):
        return None
    if key.startswith('paths.'):
        return key if int(key.split('.')[1][1:]) in choice.groups[0] else None
    shadow, prefix = f'bn3.shadows.{choice.num_paths[0] - 1}.', 'bn3.shadows.'
    if key.startswith(prefix):
        return 'bn3.' + key[len(shadow) :] if key.startswith(shadow) else None
    return key
