"""The cell spaces of NAS-Bench-201 and of MixPath's NAS-Bench-101 sub-space, whose archs have published accuracies.

As data only: which archs there are, their text, how they are drawn and encoded. The networks are in
`models/nasbench.py`.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations_with_replacement, product
from typing import Any

from .arch import check_vector
from .space import Space

__all__ = ['CellArch', 'CellSpace', 'NB101Space', 'NB201Space']


class CellArch(str):
    """An arch of a cell space, its own canonical text.

    Spaces make them, see `CellSpace.arch`.

    Attributes:
        ops: Operations, in the order of the text.
    """

    ops: tuple[str, ...]

    def __new__(cls, text: str, ops: Sequence[str]) -> 'CellArch':
        arch = str.__new__(cls, text)
        arch.ops = tuple(ops)
        return arch

    def __getnewargs__(self) -> tuple[str, tuple[str, ...]]:
        return str(self), self.ops

    def __str__(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f'CellArch({str(self)!r})'


@dataclass(frozen=True)
class CellSpace(Space):
    """A space of networks that repeat one cell; all cells of a network have the same arch.

    Attributes:
        name: Short name; the models are `mixpath_<name>` and `mixpath_<name>_supernet`.
        max_paths: m of the paper, the largest number of paths that may be active where paths are summed.
        input_size: Default input as (channels, height, width), in pixels.
        num_classes: Default number of classes.
        description: One line for listings.

    Raises:
        ValueError: `max_paths` is out of range.
    """

    name: str
    max_paths: int
    input_size: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    description: str = field(default='', compare=False)

    def __post_init__(self) -> None:
        self._check_max_paths()

    @abstractmethod
    def covering_archs(self) -> list[CellArch]:
        """Return as few archs as show every operation in every place; they may have more than m paths."""


@dataclass(frozen=True)
class NB201Space(CellSpace):
    """The cell of NAS-Bench-201 (arXiv 2001.00326): nodes 1 to 3 sum their incoming edges, one operation each.

    An arch is the benchmark's own cell string: `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...~0|...~1|...~2|`, where
    `op~i` is the operation on the edge from node i. The number of active paths of a node is the number of its edges
    that are not `none`.
    """

    name: str = 'nb201'
    max_paths: int = 3
    description: str = field(
        default='NAS-Bench-201: a cell of 3 nodes, 6 edges of 5 operations, 15,625 archs', compare=False
    )

    OPS = ('none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3')
    NUM_NODES = 3

    @property
    def max_paths_limit(self) -> int:
        """Edges that lead to the last node."""
        return self.NUM_NODES

    @cached_property
    def _node_choices(self) -> list[list[tuple[str, ...]]]:
        """Per node what its edges may be, at most m of them not `none`."""
        return [
            [ops for ops in product(self.OPS, repeat=node) if node - ops.count('none') <= self.max_paths]
            for node in range(1, self.NUM_NODES + 1)
        ]

    @property
    def gene_sizes(self) -> tuple[int, ...]:
        """One entry per edge, its operation; with m < 3 one entry per node, the operations of its edges."""
        if self.max_paths == self.max_paths_limit:
            return (len(self.OPS),) * sum(range(self.NUM_NODES + 1))
        return tuple(map(len, self._node_choices))

    @property
    def default_arch(self) -> CellArch:
        """3x3 convolutions on all edges but a skip connection from the input to the output, as far as m allows."""
        if self.max_paths == 1:
            return self._make([['nor_conv_3x3'], ['none', 'nor_conv_3x3'], ['none', 'none', 'nor_conv_3x3']])
        last = ['skip_connect', 'nor_conv_3x3', 'nor_conv_3x3']
        if self.max_paths == 2:
            last[1] = 'none'
        return self._make([['nor_conv_3x3'], ['nor_conv_3x3', 'nor_conv_3x3'], last])

    @classmethod
    def _make(cls, nodes: Sequence[Sequence[str]]) -> CellArch:
        text = '+'.join('|' + ''.join(f'{op}~{i}|' for i, op in enumerate(ops)) for ops in nodes)
        return CellArch(text, [op for ops in nodes for op in ops])

    def nodes(self, arch: str) -> list[tuple[str, ...]]:
        """Return the operations of an arch per node, by the node that the edge comes from."""
        ops = self.arch(arch).ops
        return [ops[node * (node - 1) // 2 : node * (node + 1) // 2] for node in range(1, self.NUM_NODES + 1)]

    def live_edges(self, arch: str) -> list[list[tuple[int, str]]]:
        """Return per node the (from, operation) of its edges on a way from the input of the cell to its output.

        The others carry nothing, or lead nowhere: supernet and sub-network leave them out. What NAS-Bench-201 trained
        has them, so its counts of parameters and FLOPs differ for such archs.
        """
        nodes = self.nodes(arch)
        reached = {0}
        for node, ops in enumerate(nodes, 1):
            if any(op != 'none' and i in reached for i, op in enumerate(ops)):
                reached.add(node)
        used = {self.NUM_NODES}
        for node in range(self.NUM_NODES, 0, -1):
            if node in used:
                used |= {i for i, op in enumerate(nodes[node - 1]) if op != 'none'}
        return [
            [(i, op) for i, op in enumerate(ops) if op != 'none' and i in reached] if node in used else []
            for node, ops in enumerate(nodes, 1)
        ]

    def arch(self, arch: str) -> CellArch:
        nodes = _split(arch.ops) if isinstance(arch, CellArch) and len(arch.ops) == 6 else self._parse(arch)
        for node, ops in enumerate(nodes, 1):
            if (num_paths := node - ops.count('none')) > self.max_paths:
                raise ValueError(
                    f'arch {str(arch)!r} is not in space {self.name!r}: node {node} has {num_paths} inputs that are '
                    f'not none, at most m={self.max_paths} may be active'
                )
        return self._make(nodes)

    def _parse(self, text: Any) -> list[list[str]]:
        example = f'a cell of NAS-Bench-201 looks like {str(self._make([["none"] * n for n in (1, 2, 3)]))!r}'
        if not isinstance(text, str):
            raise ValueError(f'an arch is text, not {type(text).__name__}; {example}')
        parts = text.strip().split('+')
        if len(parts) != self.NUM_NODES:
            raise ValueError(f'arch {text!r} has {len(parts)} nodes joined by +, needed are 3; {example}')
        nodes: list[list[str]] = []
        for node, part in enumerate(parts, 1):
            edges = part.strip().split('|')
            if len(edges) < 3 or edges[0] or edges[-1]:
                raise ValueError(f'node {node} of arch {text!r} is {part!r}, not edges between |; {example}')
            ops: dict[str, str] = {}
            for edge in edges[1:-1]:
                op, _, source = edge.partition('~')
                if op not in self.OPS:
                    raise ValueError(f'operation {op!r} of arch {text!r} is not one of {", ".join(self.OPS)}')
                if source in ops:
                    raise ValueError(f'node {node} of arch {text!r} has two edges from node {source}')
                ops[source] = op
            wanted = [str(i) for i in range(node)]
            if sorted(ops) != wanted:
                raise ValueError(
                    f'node {node} of arch {text!r} has edges from {", ".join(sorted(ops))}, needed is one from each of '
                    f'{", ".join(wanted)}; {example}'
                )
            nodes.append([ops[source] for source in wanted])
        return nodes

    def encode(self, arch: str) -> tuple[int, ...]:
        """Return the integer vector of an arch: indices into `OPS` per edge, or into a node's choices with m < 3."""
        arch = self.arch(arch)
        if self.max_paths == self.max_paths_limit:
            return tuple(self.OPS.index(op) for op in arch.ops)
        return tuple(choices.index(tuple(ops)) for choices, ops in zip(self._node_choices, _split(arch.ops)))

    def decode(self, vector: Sequence[int]) -> CellArch:
        check_vector(vector, self.gene_sizes, self.name)
        if self.max_paths == self.max_paths_limit:
            return self._make(_split([self.OPS[v] for v in vector]))
        return self._make([choices[v] for choices, v in zip(self._node_choices, vector)])

    def sample(self, draw: Callable[[], float]) -> CellArch:
        nodes: list[list[str]] = []
        for node in range(1, self.NUM_NODES + 1):
            num_paths = 1 + int(draw() * min(node, self.max_paths))
            sources = list(range(node))
            ops = ['none'] * node
            for _ in range(num_paths):
                ops[sources.pop(int(draw() * len(sources)))] = self.OPS[1 + int(draw() * (len(self.OPS) - 1))]
            nodes.append(ops)
        return self._make(nodes)

    def covering_archs(self) -> list[CellArch]:
        return [self._make([[op] * node for node in range(1, self.NUM_NODES + 1)]) for op in self.OPS[1:]]


def _split(ops: Sequence[str]) -> list[list[str]]:
    return [list(ops[:1]), list(ops[1:3]), list(ops[3:])]


@dataclass(frozen=True)
class NB101Space(CellSpace):
    """MixPath's sub-space of NAS-Bench-101 (arXiv 1902.09635): 1 to 4 parallel nodes, summed into one more node.

    An arch is the benchmark's list of the cell's operations, joined by `|`: `input|conv3x3-bn-relu|maxpool3x3|
    conv1x1-bn-relu|output` has two parallel nodes and a 1x1 convolution behind their sum. The parallel nodes are
    interchangeable; the text has them in the order of `OPS`, and they take the first nodes of the supernet. There are
    34 ways to fill them and 3 operations behind the sum. The released code of MixPath fixes the latter to the 1x1
    convolution; the table of the benchmark has all three.
    """

    name: str = 'nb101'
    max_paths: int = 4
    description: str = field(
        default='Sub-space of NAS-Bench-101: up to 4 parallel operations of 3, summed into another one, 102 archs',
        compare=False,
    )

    OPS = ('conv1x1-bn-relu', 'conv3x3-bn-relu', 'maxpool3x3')

    @property
    def max_paths_limit(self) -> int:
        """Parallel nodes of the cell."""
        return 4

    @cached_property
    def _parallel_choices(self) -> list[tuple[str, ...]]:
        return [ops for k in range(1, self.max_paths + 1) for ops in combinations_with_replacement(self.OPS, k)]

    @property
    def gene_sizes(self) -> tuple[int, ...]:
        """What the parallel nodes are, and the operation behind their sum."""
        return len(self._parallel_choices), len(self.OPS)

    @property
    def default_arch(self) -> CellArch:
        """A 3x3 convolution in each of the m parallel nodes, and a 1x1 convolution behind them."""
        return self._make(['conv3x3-bn-relu'] * self.max_paths, 'conv1x1-bn-relu')

    @classmethod
    def _make(cls, parallel: Sequence[str], behind: str) -> CellArch:
        ops = (*sorted(parallel, key=cls.OPS.index), behind)
        return CellArch('|'.join(('input', *ops, 'output')), ops)

    def arch(self, arch: str) -> CellArch:
        example = f'a cell looks like {str(self._make(self.OPS[1:], self.OPS[0]))!r}'
        if not isinstance(arch, str):
            raise ValueError(f'an arch is text, not {type(arch).__name__}; {example}')
        words = arch.strip().split('|')
        if len(words) < 4 or words[0] != 'input' or words[-1] != 'output':
            raise ValueError(
                f'arch {str(arch)!r} is not input, parallel operations, the operation behind their sum, and output '
                f'joined by |; {example}'
            )
        for op in words[1:-1]:
            if op not in self.OPS:
                raise ValueError(f'operation {op!r} of arch {str(arch)!r} is not one of {", ".join(self.OPS)}')
        if (num_paths := len(words) - 3) > self.max_paths:
            raise ValueError(
                f'arch {str(arch)!r} is not in space {self.name!r}: it has {num_paths} parallel operations, at most '
                f'm={self.max_paths} may be active'
            )
        return self._make(words[1:-2], words[-2])

    def encode(self, arch: str) -> tuple[int, ...]:
        ops = self.arch(arch).ops
        return self._parallel_choices.index(ops[:-1]), self.OPS.index(ops[-1])

    def decode(self, vector: Sequence[int]) -> CellArch:
        check_vector(vector, self.gene_sizes, self.name)
        return self._make(self._parallel_choices[vector[0]], self.OPS[vector[1]])

    def sample(self, draw: Callable[[], float]) -> CellArch:
        num_paths = 1 + int(draw() * self.max_paths)
        parallel = [self.OPS[int(draw() * len(self.OPS))] for _ in range(num_paths)]
        return self._make(parallel, self.OPS[int(draw() * len(self.OPS))])

    def covering_archs(self) -> list[CellArch]:
        return [self._make([op] * self.max_paths_limit, op) for op in self.OPS]
