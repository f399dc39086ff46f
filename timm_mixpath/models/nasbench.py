"""The networks and supernets of NAS-Bench-201 and NAS-Bench-101."""

import random
from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from timm.layers import create_conv2d, get_norm_act_layer
from timm.models import generate_default_cfgs, register_model

from ..spaces.catalog import get_space
from ..spaces.nasbench import CellArch, CellSpace
from ..spaces.sampling import shuffled
from .cellnet import CellNet, CellSupernet
from .cells import (
    ActConvNorm,
    CellNode,
    CellPath,
    ChoiceNode,
    FoldableConvNormAct,
    NB101Cell,
    NB101ChoiceCell,
    NB201Cell,
    NB201ChoiceCell,
    NB201ChoiceNode,
    NB201Reduction,
    path_name,
)
from .pretrained import add_weights, build_model, check_state_dict, space_cfg

__all__ = ['NB101Net', 'NB101Supernet', 'NB201Net', 'NB201Supernet']


class NB201Net(CellNet):
    """Network of NAS-Bench-201 (arXiv 2001.00326): 16 channels and 5 cells per stage. See `CellNet` for arguments."""

    default_width = 16
    default_num_cells = 5
    _cell_cls = NB201Cell

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
        return self._cell_cls(nodes)

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
    _cell_cls = NB101Cell

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
        return self._cell_cls(
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


class NB201Supernet(CellSupernet, NB201Net):
    """Supernet of NAS-Bench-201. See `CellSupernet` for arguments."""

    subnet_cls = NB201Net
    _node_cls = NB201ChoiceNode
    _cell_cls = NB201ChoiceCell

    def _edges(self) -> list[list[tuple[int, str]]]:
        return [[(i, op) for i in range(node) for op in self.space.OPS[1:]] for node in (1, 2, 3)]

    def _activate(self, arch: CellArch) -> None:
        names = [tuple(path_name(op, i) for i, op in edges) for edges in self.space.live_edges(arch)]
        for cell in self._cells:
            for node, active in zip(cell.nodes, names):
                node.set_paths(active)

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

    subnet_cls = NB101Net
    _node_cls = ChoiceNode
    _cell_cls = NB101ChoiceCell

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
            cell.node.set_paths(active)
            cell.active, cell.active_nodes = behind, tuple(nodes[: len(parallel)])

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
    return space_cfg(space, 4, classifier='fc', **kwargs)


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
