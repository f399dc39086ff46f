"""Networks and supernets of the benchmark cell spaces, NAS-Bench-201 and MixPath's sub-space of NAS-Bench-101.

With `sum_norm='none'`, the default of the stand-alone networks, they have the layers and parameters of the benchmarks'
networks; initialisation and training are timm's. The supernets add what MixPath adds: a batch norm behind every sum of
paths, one per number of active paths (SBN). Where exactly it stands in these cells is a reconstruction: the released
code of MixPath builds it for NAS-Bench-101, but never applies it.
"""

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, ClassVar

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    LayerType,
    create_classifier,
    create_conv2d,
    get_device_dtype,
    get_norm_act_layer,
    get_norm_layer,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq

from .blocks import fold_bn, sum_paths
from .layers import ShadowBatchNorm2d
from .nasbench import CellArch, CellSpace
from .pretrained import add_weights, build_model, check_state_dict
from .sampling import shuffled
from .space import get_space
from .supernet import Supernet

__all__ = ['CellNet', 'CellSupernet', 'NB101Net', 'NB101Supernet', 'NB201Net', 'NB201Supernet']

SUM_NORMS = ('sbn', 'bn', 'none')


class ActConvNorm(nn.Module):
    """ReLU, convolution, batch norm: the order of NAS-Bench-201."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, norm_layer: LayerType = nn.BatchNorm2d, **dd
    ) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.conv = create_conv2d(in_chs, out_chs, kernel_size, stride=stride, padding='', **dd)
        self.bn = norm_layer(out_chs, **dd)
        self.folded = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        return self.bn(self.conv(self.act(x)))

    def reparameterize(self) -> None:
        """Fold the batch norm into the convolution, see `MultiPathResidual.reparameterize`."""
        fold_bn(self, 'conv', 'bn')
        self.folded = True


class FoldableConvNormAct(ConvNormAct):
    """timm's convolution, batch norm, ReLU, the order of NAS-Bench-101; the norm can be folded."""

    folded = False

    def reparameterize(self) -> None:
        """Fold the batch norm into the convolution, see `MultiPathResidual.reparameterize`."""
        fold_bn(self, 'conv', 'bn')
        self.folded = True


class CellPath(nn.Module):
    """One path into a node: an operation on the output of another node.

    Args:
        source: Index of the node that the path comes from.
        op: Operation.
    """

    def __init__(self, source: int, op: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.op = op

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        """Outputs of the nodes so far, each [B, C, H, W] -> [B, C, H, W]."""
        return self.op(xs[self.source])


class CellNode(nn.Module):
    """A node of a fixed cell: the sum of all its paths, and what normalises the sum.

    Args:
        paths: Paths by name; none for a node that nothing reaches.
        norm: Behind the sum.
    """

    def __init__(self, paths: dict[str, CellPath], norm: nn.Module) -> None:
        super().__init__()
        self.paths = nn.ModuleDict(paths)
        self.norm = norm if paths else nn.Identity()

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        """Outputs of the nodes so far, each [B, C, H, W] -> [B, C, H, W], zeros if there are no paths."""
        outputs: list[torch.Tensor] = []
        for path in self.paths.values():
            outputs.append(path(xs))
        if len(outputs) == 0:
            return torch.zeros_like(xs[0])
        x = outputs[0]
        for i in range(1, len(outputs)):
            x = x + outputs[i]
        return self.norm(x)


class ChoiceNode(CellNode):
    """A node of a supernet's cell: all candidate paths, of which `forward` sums the active ones."""

    def __init__(self, paths: dict[str, CellPath], norm: nn.Module) -> None:
        super().__init__(paths, norm)
        self.active = tuple(paths)[:1]

    def forward(self, xs: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Outputs of the sources, each [B, C, H, W] -> [B, C, H, W]; None stands for one that has none."""
        if not self.active:
            return None
        x = sum_paths([self.paths[name](xs) for name in self.active])
        return self.norm(x, len(self.active)) if isinstance(self.norm, ShadowBatchNorm2d) else self.norm(x)


class NB201ChoiceNode(ChoiceNode):
    """A node of a NAS-Bench-201 supernet, see `ChoiceNode`.

    Attributes:
        max_paths: Number of paths that may be active at once.
    """

    max_paths: int

    def path_outputs(self, xs: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Return the output of every candidate path, active or not; nothing if a source has none.

        Args:
            xs: What `forward` takes.
        """
        return {} if any(x is None for x in xs) else {name: path(xs) for name, path in self.paths.items()}

    def path_sets(self) -> list[tuple[str, ...]]:
        """Return the sets of paths that can be active at once: an edge has one operation."""
        return one_per_source(self.paths, self.max_paths)


def one_per_source(paths: nn.ModuleDict, max_paths: int) -> list[tuple[str, ...]]:
    """Return the names of all sets of 1 to `max_paths` paths from different sources."""
    sources: dict[int, list[str]] = {}
    for name, path in paths.items():
        sources.setdefault(path.source, []).append(name)
    sizes = range(1, max_paths + 1)
    return [names for k in sizes for chosen in combinations(sources.values(), k) for names in product(*chosen)]


class NB201Cell(nn.Module):
    """Cell of NAS-Bench-201: node 0 is the input, nodes 1 to 3 sum their incoming edges, node 3 is the output."""

    def __init__(self, nodes: list[CellNode]) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        xs = [x]
        for node in self.nodes:
            xs.append(node(xs))
        return xs[-1]


class NB201ChoiceCell(NB201Cell):
    """Cell of a NAS-Bench-201 supernet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x_out = super().forward(x)
        return torch.zeros_like(x) if x_out is None else x_out


class NB201Reduction(nn.Module):
    """Between the stages of NAS-Bench-201: a residual block of stride 2 that doubles the channels."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: LayerType, **dd) -> None:
        super().__init__()
        self.conv_a = ActConvNorm(in_chs, out_chs, 3, stride=2, norm_layer=norm_layer, **dd)
        self.conv_b = ActConvNorm(out_chs, out_chs, 3, norm_layer=norm_layer, **dd)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), create_conv2d(in_chs, out_chs, 1, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 2 * C, H / 2, W / 2]."""
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class NB101Cell(nn.Module):
    """Cell of the NAS-Bench-101 sub-space.

    Every parallel node has its own 1x1 projection of the input of the cell; their outputs are summed, and one more
    operation stands behind the sum.

    Args:
        projections: One per parallel node.
        node: Sums the parallel nodes.
        behind: The operation behind the sum by name, or all candidates.
    """

    def __init__(self, projections: list[nn.Module], node: CellNode, behind: dict[str, nn.Module]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projections)
        self.node = node
        self.behind = nn.ModuleDict(behind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C, H, W]."""
        xs: list[torch.Tensor] = []
        for projection in self.projections:
            xs.append(projection(x))
        x = self.node(xs)
        for op in self.behind.values():
            x = op(x)
        return x


class NB101ChoiceCell(NB101Cell):
    """Cell of a NAS-Bench-101 supernet.

    Attributes:
        active: The operation behind the sum.
        active_nodes: The parallel nodes that the active paths are in.
    """

    active: str
    active_nodes: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C, H, W]."""
        xs = [p(x) if i in self.active_nodes else None for i, p in enumerate(self.projections)]
        return self.behind[self.active](self.node(xs))

    def path_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of every candidate path in front of the sum, active or not.

        Args:
            x: What `forward` takes.
        """
        xs = [projection(x) for projection in self.projections]
        return {name: path(xs) for name, path in self.node.paths.items()}

    def path_sets(self) -> list[tuple[str, ...]]:
        """Return the sets of paths that can be active at once: a parallel node has one operation."""
        return one_per_source(self.node.paths, len(self.projections))


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
    _node_cls: ClassVar[type[CellNode]] = CellNode

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
            norm = ShadowBatchNorm2d(chs, max_paths, **self._bn_kwargs(), **dd)
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


class NB201Net(CellNet):
    """Network of NAS-Bench-201 (arXiv 2001.00326): 16 channels and 5 cells per stage. See `CellNet` for arguments."""

    default_width = 16
    default_num_cells = 5

    def _make_stem(self, in_chans: int, chs: int, **dd) -> nn.Module:
        return nn.Sequential(create_conv2d(in_chans, chs, 3, padding='', **dd), self._norm_layer(chs, **dd))

    def _make_reduction(self, in_chs: int, out_chs: int, **dd) -> nn.Module:
        return NB201Reduction(in_chs, out_chs, self._norm_layer, **dd)

    def _cell_in_chs(self, in_chs: int, chs: int) -> int:
        return chs  # the reduction has doubled them

    def _make_final_norm(self, chs: int, **dd) -> nn.Module:
        return get_norm_act_layer(self._norm_layer, nn.ReLU)(chs, **dd)

    def _make_cell(self, in_chs: int, chs: int, **dd) -> nn.Module:
        nodes = [self._make_nb201_node(edges, node, chs, **dd) for node, edges in enumerate(self._edges(), 1)]
        return (NB201ChoiceCell if isinstance(self, Supernet) else NB201Cell)(nodes)

    def _make_nb201_node(self, edges: list[tuple[int, str]], node: int, chs: int, **dd) -> CellNode:
        paths = {path_name(op, i): CellPath(i, self._make_op(op, chs, **dd)) for i, op in edges}
        max_paths = min(node, self.space.max_paths)
        made = self._make_node(paths, chs, max_paths, **dd)
        made.max_paths = max_paths
        return made

    def _edges(self) -> list[list[tuple[int, str]]]:
        return self.space.live_edges(self.arch)

    def _make_op(self, op: str, chs: int, **dd) -> nn.Module:
        if op == 'skip_connect':
            return nn.Identity()
        if op == 'avg_pool_3x3':
            return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        return ActConvNorm(chs, chs, {'nor_conv_1x1': 1, 'nor_conv_3x3': 3}[op], norm_layer=self._norm_layer, **dd)


class NB101Net(CellNet):
    """Network of the NAS-Bench-101 sub-space (arXiv 1902.09635): 128 channels and 3 cells per stage. See `CellNet`."""

    default_width = 128
    default_num_cells = 3

    def _conv(self, in_chs: int, out_chs: int, kernel_size: int, **dd) -> nn.Module:
        return FoldableConvNormAct(in_chs, out_chs, kernel_size, norm_layer=self._norm_layer, act_layer=nn.ReLU, **dd)

    def _make_stem(self, in_chans: int, chs: int, **dd) -> nn.Module:
        return self._conv(in_chans, chs, 3, **dd)

    def _make_reduction(self, in_chs: int, out_chs: int, **dd) -> nn.Module:
        return nn.MaxPool2d(2)

    def _cell_in_chs(self, in_chs: int, chs: int) -> int:
        return in_chs  # the projections of the first cell double them

    def _make_final_norm(self, chs: int, **dd) -> nn.Module:
        return nn.Identity()

    def _make_cell(self, in_chs: int, chs: int, **dd) -> nn.Module:
        parallel, behind = self._ops()
        paths = {
            path_name(op, i): CellPath(i, self._make_op(op, chs, **dd)) for i, ops in enumerate(parallel) for op in ops
        }
        return (NB101ChoiceCell if isinstance(self, Supernet) else NB101Cell)(
            [self._conv(in_chs, chs, 1, **dd) for _ in parallel],
            self._make_node(paths, chs, self.space.max_paths, **dd),
            {op: self._make_op(op, chs, **dd) for op in behind},
        )

    def _ops(self) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        """Operations that each parallel node, and what stands behind the sum, is made of."""
        return [(op,) for op in self.arch.ops[:-1]], self.arch.ops[-1:]

    def _make_op(self, op: str, chs: int, **dd) -> nn.Module:
        if op == 'maxpool3x3':
            return nn.MaxPool2d(3, stride=1, padding=1)
        return self._conv(chs, chs, {'conv1x1-bn-relu': 1, 'conv3x3-bn-relu': 3}[op], **dd)


def path_name(op: str, source: int) -> str:
    """Name of a path's module, which TorchScript can take for an attribute."""
    return f'{op}_{source}'.replace('-', '_')


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
        # What a sub-network must be built with to fit this supernet
        self._subnet_kwargs = {k: v for k, v in kwargs.items() if k != 'num_classes'}
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

    def train(self, mode: bool = True) -> 'CellSupernet':
        if mode and any(getattr(module, 'folded', False) for module in self.modules()):
            raise RuntimeError('the batch norms of this supernet are folded, it can be evaluated but not trained')
        return super().train(mode)

    def _subnet_overrides(self) -> dict[str, Any]:
        return {} if self.sum_norm == 'none' else {'sum_norm': 'bn'}

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


class NB201Supernet(CellSupernet, NB201Net):
    """Supernet of NAS-Bench-201. See `CellSupernet` for arguments."""

    _node_cls = NB201ChoiceNode

    def _edges(self) -> list[list[tuple[int, str]]]:
        return [[(i, op) for i in range(node) for op in self.space.OPS[1:]] for node in (1, 2, 3)]

    def _activate(self, arch: CellArch) -> None:
        names = [tuple(path_name(op, i) for i, op in edges) for edges in self.space.live_edges(arch)]
        for cell in self._cells:
            for node, active in zip(cell.nodes, names):
                node.active = active

    def cell_parts(self, arch: CellArch | str) -> list[str]:
        parts: list[str] = []
        for index, edges in enumerate(self.space.live_edges(arch)):
            parts += [f'nodes.{index}.paths.{path_name(op, i)}' for i, op in edges]
            parts += [f'nodes.{index}.norm'] if edges else []
        return parts


class NB101Supernet(CellSupernet, NB101Net):
    """Supernet of the NAS-Bench-101 sub-space. See `CellSupernet` for arguments.

    The parallel nodes of an arch are interchangeable. In training they are put on random nodes of the supernet, as the
    released code of MixPath draws them, so that all weights are trained alike; `active_arch` takes the first nodes.
    """

    _node_cls = ChoiceNode

    def _ops(self) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        return [self.space.OPS] * self.space.max_paths, self.space.OPS

    def _activate(self, arch: CellArch) -> None:
        self._place(arch, range(len(arch.ops) - 1))

    def _sample(self) -> None:
        draw = random.Random(f'{self.seed}/{self._step}/nodes').random
        super()._sample()
        self._place(self.sampled_arch, shuffled(range(self.space.max_paths), draw))

    def _place(self, arch: CellArch, nodes: Sequence[int]) -> None:
        """Activate an arch with its parallel operations on the first of these nodes."""
        *parallel, behind = arch.ops
        active = tuple(path_name(op, node) for op, node in zip(parallel, nodes))
        for cell in self._cells:
            cell.node.active, cell.active, cell.active_nodes = active, behind, tuple(nodes[: len(parallel)])

    def cell_parts(self, arch: CellArch | str) -> list[str]:
        *parallel, behind = self.space.arch(arch).ops
        parts = [f'projections.{i}' for i in range(len(parallel))]
        parts += [f'node.paths.{path_name(op, i)}' for i, op in enumerate(parallel)]
        return [*parts, 'node.norm', f'behind.{behind}']


def _create(model_cls: type[CellNet], variant: str, pretrained: bool, **kwargs: Any) -> CellNet:
    space = get_space(variant.removeprefix('mixpath_').removesuffix('_supernet'))
    return build_model(
        model_cls, variant, pretrained, num_features=3, filter_fn=check_state_dict, space=space, **kwargs
    )


def _cfg(space: CellSpace, **kwargs: Any) -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': space.num_classes,
        'input_size': space.input_size,
        'pool_size': (space.input_size[1] // 4, space.input_size[2] // 4),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    add_weights(
        {
            'mixpath_nb101.untrained': _cfg(get_space('nb101'), first_conv='stem.conv'),
            'mixpath_nb101_supernet.untrained': _cfg(get_space('nb101'), first_conv='stem.conv'),
            'mixpath_nb201.untrained': _cfg(get_space('nb201'), first_conv='stem.0'),
            'mixpath_nb201_supernet.untrained': _cfg(get_space('nb201'), first_conv='stem.0'),
        }
    )
)


@register_model
def mixpath_nb101(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """Network of the NAS-Bench-101 sub-space, as the benchmark trained it, of the given `arch`."""
    return _create(NB101Net, 'mixpath_nb101', pretrained, **kwargs)


@register_model
def mixpath_nb101_supernet(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """Supernet of the NAS-Bench-101 sub-space (m = 4 by default); where its SBN stands is a reconstruction."""
    return _create(NB101Supernet, 'mixpath_nb101_supernet', pretrained, **kwargs)


@register_model
def mixpath_nb201(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """Network of NAS-Bench-201, as the benchmark trained it, of the given `arch`."""
    return _create(NB201Net, 'mixpath_nb201', pretrained, **kwargs)


@register_model
def mixpath_nb201_supernet(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """Supernet of NAS-Bench-201 (m = 3 by default), not a space of the paper."""
    return _create(NB201Supernet, 'mixpath_nb201_supernet', pretrained, **kwargs)
