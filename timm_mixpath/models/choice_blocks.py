"""The searchable multi-path inverted bottleneck, and what a sub-network inherits of it.

Its parameter names are those of the fixed block, below the expansion.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..spaces.arch import BlockChoice
from ..spaces.space import BlockSpec
from .blocks import GroupedPaths, MultiPathResidual, PathSum, branch_name, path_name, spec_kwargs
from .layers import ActiveConv2d, ActiveShadowBatchNorm2d, fuse_conv_bn, set_num_paths, sum_paths

__all__ = ['ActivePathSum', 'ChoiceBlock']


class ActivePathSum(PathSum):
    """A `PathSum` of which only the active paths run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active: tuple[str, ...] = tuple(self)[:1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        return sum_paths([self[name](x) for name in self.active])

    def path_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs [B, C, H / stride, W / stride] of all candidate paths, active or not, see `SumSite`."""
        return {name: path(x) for name, path in self.items()}

    @torch.no_grad()
    def nest(self) -> None:
        """Give every path the weights of the smallest kernel, padded with zeros: all compute the same then."""
        weights = sorted((path.conv.weight for path in self.values()), key=lambda weight: weight.shape[-1])
        for weight in weights[1:]:
            weight.copy_(F.pad(weights[0], [(weight.shape[-1] - weights[0].shape[-1]) // 2] * 4))


class GroupNorms(nn.ModuleList):
    """A norm per channel group.

    Args:
        norms: One per group.
        splits: Channels of each group.
    """

    def __init__(self, norms: Iterable[nn.Module], splits: Sequence[int]) -> None:
        super().__init__(norms)
        self.splits = list(splits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return torch.cat([norm(chunk) for norm, chunk in zip(self, torch.split(x, self.splits, 1))], 1)


class ChoiceBranch(MultiPathResidual):
    """One expansion of a choice block: all candidate paths, of which `forward` runs the active ones.

    Where the paths of the whole block are summed, the shadow batch norms stand behind the projection, as in the
    paper. With channel groups every group has a number of active paths of its own, so its shadows stand behind its
    own sum; the projection mixes the groups.

    Args:
        num_shadows: Number of batch norms behind a sum, a single one shared by all numbers of paths if None.
        **kwargs: See `MultiPathResidual`.

    Raises:
        ValueError: Sums are to be normalised by something else than a batch norm.
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
                norms = [_make_shadows(self.bn2, chs, num_shadows) for chs in self.paths.splits]
                self.bn2 = GroupNorms(norms, self.paths.splits)
        elif num_shadows is not None:
            if not isinstance(self.bn3, nn.BatchNorm2d):
                raise ValueError(
                    f'norm_layer {type(self.bn3).__name__} can not be shadowed; use a batch norm, or sum_norm=bn for '
                    'one norm behind all sums'
                )
            self.bn3 = _make_shadows(self.bn3, self.bn3.num_features, num_shadows)

    def _can_join_norms(self) -> bool:
        return False  # every candidate has statistics of its own

    @property
    def path_sums(self) -> list[ActivePathSum]:
        """The candidate paths, per channel group."""
        return list(self.paths.values()) if isinstance(self.paths, GroupedPaths) else [self.paths]

    def set_paths(self, groups: Sequence[Sequence[int]]) -> None:
        """Activate the paths of these kernels, per channel group."""
        for paths, group in zip(self.path_sums, groups):
            paths.active = tuple(path_name(k) for k in group)
        if isinstance(self.bn2, GroupNorms):
            for norm, group in zip(self.bn2, groups):
                set_num_paths(norm, len(group))
        # With channel groups nothing here counts paths, with a single one its number is that of the block
        for module in (self.conv_pwl, self.bn3):
            set_num_paths(module, len(groups[0]))

    def _fold_projection(self) -> None:
        # One projection per shadow: what a shadow normalises is folded once and serves every arch
        if isinstance(self.bn3, ActiveShadowBatchNorm2d):
            convs = [fuse_conv_bn(self.conv_pwl, bn) for bn in self.bn3.shadows]
            self.conv_pwl = ActiveConv2d(convs, self.bn3.num_paths)
            self.bn3 = nn.Identity()
        else:
            super()._fold_projection()


def _make_shadows(bn: nn.BatchNorm2d, num_features: int, num_shadows: int | None) -> nn.Module:
    """Batch norms like `bn` of another width, a single one if `num_shadows` is None."""
    kwargs = dict(eps=bn.eps, momentum=bn.momentum, track_running_stats=bn.track_running_stats)
    kwargs.update(device=bn.weight.device, dtype=bn.weight.dtype)
    if num_shadows is None:
        return nn.BatchNorm2d(num_features, **kwargs)
    return ActiveShadowBatchNorm2d(num_features, num_shadows, **kwargs)


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
            self.add_module(branch_name(expand_ratio), branch)
        self.active_branch = branch_name(spec.expand_ratios[0])

    def set_choice(self, choice: BlockChoice) -> None:
        """Activate the paths of a choice."""
        self.active_branch = branch_name(choice.expand_ratio)
        self._modules[self.active_branch].set_paths(choice.groups)

    def feature_info(self, location: str) -> dict[str, Any]:
        """Feature tap of the block, the bottleneck in every case: the expansion's width varies."""
        return dict(module='', num_chs=self.out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        return self._modules[self.active_branch](x)

    def inherited(self, choice: BlockChoice, block: MultiPathResidual) -> dict[str, torch.Tensor]:
        """Select from the state dict what the fixed block of a choice inherits.

        Args:
            choice: Choice of the fixed block.
            block: The fixed block. Channel groups that share its convolutions have their weights joined.

        Returns:
            State dict of `block`; tensors that were not joined are those of this block.
        """
        run_names = {group: name.split('.') for name, run in block.run_names.items() for group in run}
        pieces: dict[str, list[torch.Tensor]] = {}
        for key, value in self.state_dict().items():
            branch, *parts = key.split('.')
            if branch != branch_name(choice.expand_ratio):
                continue
            group = 0
            if parts[0] == 'paths':
                if len(choice.groups) > 1:
                    group = int(parts.pop(1)[1:])
                if parts[1] not in map(path_name, choice.groups[group]):
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
