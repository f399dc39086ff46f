"""Networks and supernets of repeated cells: stem, stages of cells, head."""

from typing import Any, ClassVar

import torch
import torch.nn as nn
from timm.layers import LayerType, create_classifier, get_device_dtype, get_norm_layer
from timm.models import checkpoint_seq

from ..spaces.nasbench import CellArch, CellSpace
from ._timm import feature_take_indices
from .cells import CellNode, CellPath, NB101Cell, NB201Cell
from .layers import ActiveShadowBatchNorm2d
from .supernet import Supernet

__all__ = ['CellNet', 'CellSupernet']


SUM_NORMS = ('sbn', 'bn', 'none')


class CellNet(nn.Module):
    """A network of one repeated cell: stem, three stages of cells, head.

    Args:
        space: Space of the cell.
        arch: Arch or its text, the space's `default_arch` if None.
        width: Channels of the first stage; the next ones have two and four times as many. The benchmark's if None.
        num_cells: Cells per stage, the benchmark's if None.
        sum_norm: What normalises a sum of paths: `'none'` as in the benchmark, or `'bn'`, as what a supernet with a
            norm hands out.
        num_classes: Number of classes.
        in_chans: Input channels.
        norm_layer: Batch norm.
        drop_rate: Dropout in front of the classifier.
        global_pool: Global pooling.

    Raises:
        ValueError: The space does not hold the arch, or a number or `sum_norm` is out of range.
    """

    default_width: ClassVar[int]
    default_num_cells: ClassVar[int]
    _sum_norms: ClassVar[tuple[str, ...]] = ('bn', 'none')
    # A supernet is its network with other nodes and cells
    _node_cls: ClassVar[type[CellNode]] = CellNode
    _cell_cls: ClassVar[type[nn.Module]]

    def __init__(
        self,
        space: CellSpace,
        arch: CellArch | str | None = None,
        width: int | None = None,
        num_cells: int | None = None,
        sum_norm: str = 'none',
        num_classes: int = 1000,
        in_chans: int = 3,
        norm_layer: LayerType | None = None,
        drop_rate: float = 0.0,
        global_pool: str = 'avg',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        width = self.default_width if width is None else width
        num_cells = self.default_num_cells if num_cells is None else num_cells
        for name, value in (('width', width), ('num_cells', num_cells)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name}={value!r} is not a positive integer')
        if sum_norm not in self._sum_norms:
            raise ValueError(f'unknown sum_norm {sum_norm!r}, known are {", ".join(self._sum_norms)}')
        self._set_space(space, arch)
        self.width = width
        self.num_cells = num_cells
        self.sum_norm = sum_norm
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._norm_layer = get_norm_layer(norm_layer or nn.BatchNorm2d)
        dd = {'device': device, 'dtype': dtype}

        self.stem = self._make_stem(in_chans, width, **dd)
        stages = []
        self.feature_info = []
        in_chs = width
        for stage in range(3):
            chs = width * 2**stage
            blocks = [self._make_reduction(in_chs, chs, **dd)] if stage else []
            for index in range(num_cells):
                chs_to_cell = self._cell_in_chs(in_chs, chs) if index == 0 else chs
                blocks.append(self._make_cell(chs_to_cell, chs, **dd))
            in_chs = chs
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(module=f'stages.{stage}', num_chs=chs, reduction=2**stage))
        self.stages = nn.ModuleList(stages)
        self.num_features = in_chs
        self.norm = self._make_final_norm(in_chs, **dd)
        self.global_pool, self.fc = create_classifier(in_chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = in_chs * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    # What the benchmarks differ in

    def _make_stem(self, in_chans: int, chs: int, **dd) -> nn.Module:
        raise NotImplementedError

    def _make_reduction(self, in_chs: int, out_chs: int, **dd) -> nn.Module:
        raise NotImplementedError

    def _cell_in_chs(self, in_chs: int, chs: int) -> int:
        """Channels that reach the first cell of a stage."""
        raise NotImplementedError

    def _make_cell(self, in_chs: int, chs: int, **dd) -> nn.Module:
        raise NotImplementedError

    def _make_final_norm(self, chs: int, **dd) -> nn.Module:
        raise NotImplementedError

    def _set_space(self, space: CellSpace, arch: CellArch | str | None) -> None:
        # m bounds the search, not what a stand-alone network may be made of
        self.space = space.with_max_paths(space.max_paths_limit)
        self.arch = self.space.arch(arch) if arch is not None else self.space.default_arch

    def _make_node(self, paths: dict[str, CellPath], chs: int, max_paths: int, **dd) -> CellNode:
        """Make a node with `sum_norm` behind it; `max_paths` of its paths may be active at once."""
        if self.sum_norm == 'sbn':
            if not issubclass(getattr(self._norm_layer, 'func', self._norm_layer), nn.BatchNorm2d):
                raise ValueError(
                    'norm_layer is no batch norm and has no shadows; use a batch norm, or another sum_norm'
                )
            norm = ActiveShadowBatchNorm2d(chs, max_paths, **self._bn_kwargs(), **dd)
        elif self.sum_norm == 'bn':
            norm = self._norm_layer(chs, **dd)
        else:
            norm = nn.Identity()
        return self._node_cls(paths, norm)

    def _bn_kwargs(self) -> dict[str, Any]:
        # eps and momentum that timm binds to the norm layer are those of the shadows too
        return dict(getattr(self._norm_layer, 'keywords', {}))

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay, see `timm.models.group_parameters`."""
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None),
                    (r'^norm', (99999,))])  # fmt: skip

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of a stage's cells in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless that is None, see timm."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        dd = get_device_dtype(self)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs of stages, and the final features unless `intermediates_only`, see timm."""
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt {output_fmt} is not NCHW')
        intermediates: list[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108, TorchScript can not slice
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        last = len(self.stages) - 1
        for index, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108, TorchScript wants the statement
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what is not needed for these stages, see timm."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_norm or max_index < len(self.stages) - 1:  # the norm is as wide as the last stage
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, H, W] -> [B, 4 * width, H / 4, W / 4]."""
        x = self.stem(x)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108, TorchScript wants the statement
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to class logits [B, num_classes], or to pooled features."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = nn.functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class CellSupernet(Supernet):
    """What the supernets of cell spaces share, as a mixin in front of the network. See `Supernet` for what one does.

    Args:
        space: Search space.
        arch: The arch that eval mode runs at first, the space's `default_arch` if None.
        m: Largest number of active paths per sum, the space's own if None.
        sum_norm: What normalises a sum of paths: `'sbn'`, Shadow Batch Normalization; `'bn'`, one batch norm for all
            numbers of paths; `'none'`. All else is equal.
        seed: Seed of the sampled sequence.
        sampling: How archs are drawn, see `timm_mixpath.sample`.
        **kwargs: See `CellNet`.

    Raises:
        ValueError: m or a number is out of range, the space does not hold the arch, or a name is unknown.
    """

    _sum_norms: ClassVar[tuple[str, ...]] = SUM_NORMS
    _supernet_args: ClassVar[tuple[str, ...]] = (*Supernet._supernet_args, 'sum_norm')
    _sum_args = ('sum_norm',)

    def __init__(
        self,
        space: CellSpace,
        arch: CellArch | str | None = None,
        m: int | None = None,
        sum_norm: str = 'sbn',
        seed: int = 0,
        sampling: str = 'paths',
        **kwargs: Any,
    ) -> None:
        super().__init__(space.with_max_paths(m), arch, sum_norm=sum_norm, **kwargs)
        self._network_kwargs = {key: value for key, value in kwargs.items() if key not in ('device', 'dtype')}
        self._network_kwargs['sum_norm'] = 'none' if sum_norm == 'none' else 'bn'  # one norm of the shadows
        self._cells = list(self.get_cells().values())
        self._init_sampling(seed, sampling, kwargs.get('device'))

    def _set_space(self, space: CellSpace, arch: CellArch | str | None) -> None:
        self.space = space
        self._active_arch = space.arch(arch) if arch is not None else space.default_arch

    def get_cells(self) -> dict[str, nn.Module]:
        """Return the cells by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, (NB101Cell, NB201Cell))}

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """See `CellNet`."""
        take_indices = super().prune_intermediate_layers(*args, **kwargs)
        self._cells = list(self.get_cells().values())
        return take_indices

    def cell_parts(self, arch: CellArch | str) -> list[str]:
        """Return the names of the modules of a cell that are part of the sub-network of an arch."""
        raise NotImplementedError

    def _prune_like_this(self, model: CellNet) -> None:
        if len(self.stages) < len(model.stages):
            model.prune_intermediate_layers([len(self.stages) - 1], prune_head=False)
        if isinstance(self.norm, nn.Identity):
            model.norm = nn.Identity()

    def _subnet_state_dict(self, model: CellNet) -> dict[str, torch.Tensor]:
        own = self.state_dict()
        inherited: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            is_node = isinstance(module, CellNode)
            for key in module.state_dict(prefix=f'{name}.' if name else '') if is_node else ():
                source = key
                if self.sum_norm == 'sbn':
                    source = key.replace(f'{name}.norm.', f'{name}.norm.shadows.{len(module.paths) - 1}.')
                inherited[key] = own[source]
        return {key: inherited[key] if key in inherited else own[key] for key in model.state_dict()}
