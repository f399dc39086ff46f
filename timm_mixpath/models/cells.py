"""Operations, nodes and cells of the NAS-Bench networks, fixed and searchable."""

from itertools import combinations, product

import torch
import torch.nn as nn
from timm.layers import ConvNormAct, LayerType, create_conv2d

from .layers import fold_bn, set_num_paths, sum_paths

__all__ = [
    'ActConvNorm',
    'CellNode',
    'CellPath',
    'ChoiceNode',
    'FoldableConvNormAct',
    'NB101Cell',
    'NB101ChoiceCell',
    'NB201Cell',
    'NB201ChoiceCell',
    'NB201ChoiceNode',
    'NB201Reduction',
    'path_name',
]


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
        self.active: tuple[str, ...] = tuple(paths)[:1]

    def set_paths(self, names: tuple[str, ...]) -> None:
        """Activate the paths of these names."""
        self.active = names
        set_num_paths(self.norm, len(names))

    def forward(self, xs: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Outputs of the sources, each [B, C, H, W] -> [B, C, H, W]; None stands for one that has none."""
        if not self.active:
            return None
        return self.norm(sum_paths([self.paths[name](xs) for name in self.active]))


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
        # As the benchmark's where the size is even; where it is odd, as large as what the convolution leaves
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.downsample = nn.Sequential(pool, create_conv2d(in_chs, out_chs, 1, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 2 * C, H / 2, W / 2], rounded up."""
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


def path_name(op: str, source: int) -> str:
    """Name of a path's module, which TorchScript can take for an attribute."""
    return f'{op}_{source}'.replace('-', '_')
