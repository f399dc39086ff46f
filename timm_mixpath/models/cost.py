"""What an arch costs: multiply-adds and parameters by look-up.

MACs and parameters of a sub-network are sums: a part that all archs share, per block a part that belongs to the
expansion, and one part per active path. The parts are read off a few single-path networks on the meta device, counted
by torch itself, so there is no formula here that could drift from the layers.
"""

import copy
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..spaces.arch import SKIP, Arch, BlockChoice
from ..spaces.nasbench import CellArch
from ..spaces.sampling import sample
from ..spaces.space import BlockSpace, SearchSpace, Space
from ..utils.errors import UsageError, as_usage_error
from ..utils.modes import ShapesOnly
from .backbone import BackboneSupernet
from .cellnet import CellSupernet
from .mixpath import MixPath
from .supernet import Supernet

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on

__all__ = [
    'BackboneCostTable',
    'CellCostTable',
    'CostTable',
    'MetricRange',
    'SpaceProfile',
    'check_input_size',
    'cost_table',
    'count_macs',
    'find_layer_kinds',
    'profile_space',
]


def cost_table(
    supernet: Supernet,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
) -> 'CostTable | BackboneCostTable | CellCostTable':
    """Make the table of what the networks that `supernet.extract` gives cost.

    Args:
        supernet: Supernet, in any mode and on any device.
        input_size: Input as (channels, height, width), in pixels; the supernet's own if None.
        num_classes: Number of classes, the supernet's own if None. Give it where the winner will be trained on
            another data set than the supernet.

    Raises:
        UsageError: `input_size` is malformed or has other channels than the supernet, an input of this size can not
            be run, `num_classes` is negative, or the supernet was cut, by features_only for example.
    """
    if supernet.is_pruned():
        raise UsageError(
            'costs are those of whole networks, and features_only or prune_intermediate_layers has cut this supernet; '
            'timm_mixpath.models.cost.count_macs(supernet.extract(arch), input_size) counts one of its networks'
        )
    if input_size is None:
        cfg = getattr(supernet, 'pretrained_cfg', None) or {}
        # A cfg keeps its channels when a model is created with others
        input_size = (supernet.in_chans, *(cfg.get('input_size') or supernet.space.input_size)[1:])
    num_classes = supernet.num_classes if num_classes is None else num_classes
    if num_classes < 0:
        raise UsageError(f'num_classes={num_classes} must be at least 0')
    with as_usage_error('costs can not be counted'):
        input_size = check_input_size(input_size)
        if input_size[0] != supernet.in_chans:
            raise ValueError(f'input_size {input_size} does not fit a supernet of {supernet.in_chans} input channels')
        if isinstance(supernet, CellSupernet):
            return CellCostTable(supernet, num_classes=num_classes, input_size=input_size)
        if isinstance(supernet, BackboneSupernet):
            return BackboneCostTable(supernet, num_classes=num_classes, input_size=input_size)
        kwargs = supernet.subnet_kwargs(num_classes)
        del kwargs['in_chans']  # they are those of the input
        return CostTable(supernet.space, input_size=input_size, **kwargs)


Part = tuple[str | int | float, ...]


class _Costs:
    """What all kinds of cost tables share: a cost is what all archs share and the sum over the parts of an arch.

    Attributes:
        space: The space.
        num_classes: Number of classes.
        input_size: Input as (channels, height, width), in pixels.
        metrics: Names of what is counted.
        layer_kinds: Kinds of layers without multiply-adds, see `find_layer_kinds`.
    """

    space: Space
    num_classes: int
    input_size: tuple[int, int, int]
    layer_kinds: list[str]

    def __init__(self) -> None:
        self.metrics: tuple[str, ...] = ('macs', 'params')
        self._base: dict[str, float] = {}
        self._costs: dict[str, dict[Part, float]] = {metric: {} for metric in self.metrics}
        self._extremes: dict[str, tuple[str, str]] = {}  # smallest and largest, as they are asked for

    def parts(self, arch: str) -> list[Part]:
        """Return what the network of an arch has beside what all have; its costs are the sums over these.

        Raises:
            ValueError: The space does not hold the arch.
        """
        raise NotImplementedError

    @staticmethod
    def part_kind(part: Part) -> str:
        """Return the name of what a part does, the same wherever it stands in the network."""
        raise NotImplementedError

    def part_costs(self, metric: str) -> dict[Part, float]:
        """Return what each part costs."""
        return self._costs[metric]

    def add_metric(self, name: str, base: float, costs: Mapping[Part, float]) -> None:
        """Add what else an arch costs, as a part that all archs share and one for each of the others."""
        self._base[name], self._costs[name] = base, dict(costs)
        self._extremes.pop(name, None)
        self.metrics = (*dict.fromkeys((*self.metrics, name)),)

    def within(self, space: Space) -> 'Self':
        """Return a table of the same costs whose archs, smallest, largest and bounds are those of a part of the space.

        Args:
            space: The part, such as `BackboneSpace.without_more` makes; with all of it the table itself is returned.
        """
        if space == self.space:
            return self
        table = copy.copy(self)
        table.space, table._extremes = space, {}
        table._base, table._costs = dict(self._base), dict(self._costs)  # of which `add_metric` changes entries
        return table

    def cost(self, metric: str, arch: str) -> float:
        """Return the cost of an arch by the metric's name.

        Args:
            metric: One of `metrics`.
            arch: Arch or its text.

        Raises:
            ValueError: Unknown metric, or the space does not hold the arch.
        """
        self._check_metric(metric)
        costs = self._costs[metric]
        return self._base[metric] + sum(costs[part] for part in self.parts(arch))

    def macs(self, arch: str) -> int:
        """Multiply-adds of one image, of convolutions and linear layers.

        Raises:
            ValueError: The space does not hold the arch.
        """
        return self.cost('macs', arch)

    def params(self, arch: str) -> int:
        """Number of parameters.

        Raises:
            ValueError: The space does not hold the arch.
        """
        return self.cost('params', arch)

    def smallest(self, metric: str) -> str:
        """Return an arch of the smallest cost, the first such in the order of choices or integer vectors.

        Raises:
            ValueError: Unknown metric.
        """
        return self._both_extremes(metric)[0]

    def largest(self, metric: str) -> str:
        """Return an arch of the largest cost within the space's m, the first such, see `smallest`.

        Raises:
            ValueError: Unknown metric.
        """
        return self._both_extremes(metric)[1]

    def bounds(self, metric: str) -> tuple[float, float]:
        """Return the smallest and the largest cost in the space, exact.

        Raises:
            ValueError: Unknown metric.
        """
        return self.cost(metric, self.smallest(metric)), self.cost(metric, self.largest(metric))

    def _both_extremes(self, metric: str) -> tuple[str, str]:
        self._check_metric(metric)
        if metric not in self._extremes:
            self._extremes[metric] = self._extreme(metric, min), self._extreme(metric, max)
        return self._extremes[metric]

    def _extreme(self, metric: str, pick: Callable[..., Any]) -> str:
        raise NotImplementedError

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise ValueError(f'unknown metric {metric!r}, known are {", ".join(self.metrics)}')


class _BlockCosts(_Costs):
    """Costs of networks of blocks: per block a part of the expansion, and one part per path."""

    def __init__(self, space: BlockSpace) -> None:
        super().__init__()
        self.space = space

    def parts(self, arch: Arch | str) -> list[Part]:
        return [part for index, choice in enumerate(self.space.arch(arch).blocks) for part in _parts_of(index, choice)]

    @staticmethod
    def part_kind(part: Part) -> str:
        return 'expansion' if len(part) == 2 else f'kernel {part[-1]}'

    def _extreme(self, metric: str, pick: Callable[..., Any]) -> Arch:
        costs = self._costs[metric]

        # Costs add up over blocks and channel groups, so the extreme of the sum is the sum of the extremes
        def group_cost(index: int, group: int, e: int | float, kernel_sizes: Iterable[int]) -> float:
            return sum(costs[index, e, group, k] for k in kernel_sizes)

        def block_cost(index: int, choice: BlockChoice) -> float:
            return sum(costs[part] for part in _parts_of(index, choice))

        blocks: list[BlockChoice] = []
        for index, spec in enumerate(self.space.blocks):
            choices = [
                BlockChoice(
                    tuple(
                        pick(self.space.subsets(index), key=partial(group_cost, index, group, e))
                        for group in range(spec.num_groups)
                    ),
                    e,
                )
                for e in spec.expand_ratios
            ]
            choices += [SKIP] * spec.can_skip
            blocks.append(pick(choices, key=partial(block_cost, index)))
        return Arch.from_blocks(blocks)


@lru_cache(maxsize=100_000)
def _parts_of(index: int, choice: BlockChoice) -> tuple[Part, ...]:
    """The parts of a block: its expansion, and every path of every channel group."""
    if choice.is_skip:
        return ()
    e = choice.expand_ratio
    return ((index, e), *((index, e, group, k) for group, ks in enumerate(choice.groups) for k in ks))


class CostTable(_BlockCosts):
    """MACs and parameters of any arch of a space, by look-up.

    A look-up takes microseconds and equals what the stand-alone network has: `macs` are the multiply-adds of its
    convolutions and linear layers for one image (half of what `torch.utils.flop_counter` counts), `params` all of its
    parameters, without the running statistics of batch norm.

    Args:
        space: Search space as it is, with its m and its final widths: `supernet.space`, or `space.scaled(width_mult)`.
        num_classes: Number of classes, the space's own if None; 0 for no classifier.
        input_size: Input as (channels, height, width), in pixels; the space's own if None.
        **model_kwargs: Arguments of `MixPath` that change what the network is made of, such as `act_layer`.

    Attributes:
        space: The space.
        num_classes: Number of classes.
        input_size: Input as (channels, height, width), in pixels.

    Raises:
        ValueError: `input_size` is not three positive integers, or `width_mult` is given.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        num_classes: int | None = None,
        input_size: tuple[int, int, int] | None = None,
        **model_kwargs: Any,
    ) -> None:
        if 'width_mult' in model_kwargs:
            # The space of a supernet is scaled already, a second scaling would go unnoticed
            raise ValueError('width_mult belongs to the space: pass space.scaled(width_mult) or supernet.space')
        super().__init__(space)
        self.num_classes = space.num_classes if num_classes is None else num_classes
        self.input_size = check_input_size(space.input_size if input_size is None else input_size)
        # With channel groups the networks of a supernet all have the batch norms that sums of paths need
        model_kwargs.setdefault('norm_sums', space.max_paths > 1)
        for arch in _single_path_archs(space):
            # Neither place nor precision of a supernet matters here
            kwargs = dict(model_kwargs, device='meta', dtype=None)
            model = MixPath(space, arch, num_classes=self.num_classes, in_chans=self.input_size[0], **kwargs)
            # timm's norm layers make the parameters of an activation on the CPU in any case
            self._add(model.to('meta'), arch)
            self.layer_kinds = find_layer_kinds(model)  # the same for all

    def _add(self, model: MixPath, arch: Arch) -> None:
        counts = {
            'macs': count_macs(model.eval(), self.input_size),
            'params': {name: p.numel() for name, p in model.named_parameters()},
        }
        for metric, count in counts.items():
            base = _sum_below(count, '')
            for index, ((name, block), choice) in enumerate(zip(model.get_choice_blocks().items(), arch.blocks)):
                total, paths = _sum_below(count, f'{name}.'), _sum_below(count, f'{name}.paths.')
                e = choice.expand_ratio
                self._costs[metric].setdefault((index, e), total - paths)
                for run_name, run in block.run_names.items():
                    # Groups that share convolutions share the cost by their channels
                    cost, chs = _sum_below(count, f'{name}.{run_name}.'), [block.group_chs[group] for group in run]
                    for group in run:
                        group_cost = cost * block.group_chs[group] // sum(chs)
                        self._costs[metric].setdefault((index, e, group, choice.groups[group][0]), group_cost)
                base -= total
            self._base[metric] = base


class BackboneCostTable(_BlockCosts):
    """MACs and parameters of any arch of a backbone's space, counted as in `CostTable`.

    Args:
        supernet: Supernet, in any mode and on any device.
        num_classes: Number of classes, 0 for no classifier.
        input_size: Input as (channels, height, width), in pixels.

    Attributes:
        space: The space.
        num_classes: Number of classes.
        input_size: Input as (channels, height, width), in pixels.
    """

    def __init__(self, supernet: BackboneSupernet, *, num_classes: int, input_size: tuple[int, int, int]) -> None:
        super().__init__(supernet.space)
        self.num_classes = num_classes
        self.input_size = input_size
        whole = supernet.make_empty(num_classes)
        self.layer_kinds = find_layer_kinds(whole)
        blocks = whole.get_choice_blocks()
        # All paths of a block at once, one expansion after the other
        choices = [
            [BlockChoice((spec.kernel_sizes,) * spec.num_groups, e) for e in spec.expand_ratios]
            for spec in self.space.blocks
        ]
        macs: dict[str, int] = {}
        for i in range(max(map(len, choices))):
            for block, of_block in zip(blocks.values(), choices):
                block.set_choice(of_block[i % len(of_block)])
            macs.update(count_macs(whole, input_size))
        counts = {'macs': macs, 'params': {name: p.numel() for name, p in whole.named_parameters()}}
        for metric, count in counts.items():
            self._base[metric] = _sum_below(count, '')
            for index, (name, block) in enumerate(blocks.items()):
                of_block = {key: n for key, n in count.items() if key.startswith(f'{name}.')}
                self._base[metric] -= sum(of_block.values())
                for choice in choices[index]:
                    expansion, paths = block.parts(choice)
                    total = _sum_below(of_block, f'{name}.{expansion}.')
                    total -= _sum_below(of_block, f'{name}.{expansion}.{block.site.paths}.')
                    self._costs[metric][index, choice.expand_ratio] = total
                    for part, path in zip(_parts_of(index, choice)[1:], paths):
                        self._costs[metric][part] = _sum_below(of_block, f'{name}.{path}.')


class CellCostTable(_Costs):
    """MACs and parameters of any arch of a supernet's cell space, counted as in `CostTable`.

    What all archs share is counted once, an edge or node of the cell for each operation that it may have; edges that
    carry nothing or lead nowhere are not part of a network, and cost nothing.

    Args:
        supernet: Supernet, in any mode and on any device.
        num_classes: Number of classes, 0 for no classifier.
        input_size: Input as (channels, height, width), in pixels.

    Attributes:
        space: The space.
        num_classes: Number of classes.
        input_size: Input as (channels, height, width), in pixels.
    """

    def __init__(self, supernet: CellSupernet, *, num_classes: int, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.space = supernet.space
        self.num_classes = num_classes
        self.input_size = input_size
        space = self.space.with_max_paths(self.space.max_paths_limit)
        whole = type(supernet)(space, **supernet.subnet_kwargs(num_classes), device='meta').eval()
        self.layer_kinds = find_layer_kinds(whole)
        macs: dict[str, int] = {}
        for arch in space.covering_archs():
            whole.active_arch = arch
            macs.update(count_macs(whole, input_size))
        counts = {'macs': macs, 'params': {name: p.numel() for name, p in whole.named_parameters()}}
        parts = {part for arch in space.covering_archs() for part in whole.cell_parts(arch)}
        cells = whole.get_cells()
        # Per part of a cell what it costs in all cells together, and what all archs share
        for metric, count in counts.items():
            costs = {(part,): sum(_sum_below(count, f'{cell}.{part}.') for cell in cells) for part in sorted(parts)}
            self.add_metric(metric, _sum_below(count, '') - sum(costs.values()), costs)
        self._cell_parts = whole.cell_parts

    def parts(self, arch: CellArch | str) -> list[Part]:
        return [(part,) for part in self._cell_parts(self.space.arch(arch))]

    @staticmethod
    def part_kind(part: Part) -> str:
        # Operations carry the number of their place in the cell
        return re.sub(r'[._]\d+(?=\.|$)', '', str(part[0]))

    def _extreme(self, metric: str, pick: Callable[..., Any]) -> CellArch:
        costs, archs = self._costs[metric], self._parts_of_all
        return pick(archs, key=lambda arch: sum(costs[part] for part in archs[arch]))

    def within(self, space: Space) -> 'Self':
        table = super().within(space)
        if table is not self:
            vars(table).pop('_parts_of_all', None)
        return table

    @cached_property
    def _parts_of_all(self) -> dict[CellArch, list[Part]]:
        # Small enough to look at every one: 15,625 and 102
        archs = (self.space.decode(vector) for vector in product(*map(range, self.space.gene_sizes)))
        return {arch: self.parts(arch) for arch in archs}


def check_input_size(input_size: Iterable[int]) -> tuple[int, int, int]:
    size = tuple(input_size)
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f'input_size is (channels, height, width) in pixels, not {size!r}')
    return size


def _single_path_archs(space: BlockSpace) -> list[Arch]:
    """As few archs of one path per channel group as show every path of every block at least once."""
    paths = [
        [BlockChoice(((k,),) * block.num_groups, e) for e in block.expand_ratios for k in block.kernel_sizes]
        for block in space.blocks
    ]
    return [Arch.from_blocks(block[i % len(block)] for block in paths) for i in range(max(map(len, paths)))]


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count the multiply-adds of convolutions and linear layers, and of attention where there is any, for one image.

    Args:
        model: Model in eval mode, on any device; on the meta device nothing is computed.
        input_size: Input as (channels, height, width), in pixels.

    Returns:
        MACs by module name, without those of the modules inside it; '' is the model itself. They sum up to the whole.
    """
    parameter = next(model.parameters())
    x = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(display=False)
    # Fused attention is not counted on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), ShapesOnly(), counter:
        model(x)
    # The counter calls the model by its class, and gives every module what the ones inside it have, too
    root = type(model).__name__
    counts = {
        name[len(root) + 1 :]: sum(ops.values()) // 2
        for name, ops in counter.get_flop_counts().items()
        if name == root or name.startswith(f'{root}.')
    }
    own = dict(counts)
    for name, macs in counts.items():
        parent = name
        while parent:
            parent = parent.rpartition('.')[0]
            if parent in own:  # a container without a forward of its own, such as a ModuleDict, has no count
                own[parent] -= macs
                break
    return own


def find_layer_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of a model's activations, gates, norms and pooling in order, repeated ones in a row once.

    That is what takes time and shows in neither multiply-adds nor the number of parameters.
    """
    kinds: list[str] = []
    for module in model.modules():
        is_layer = not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
        if is_layer and not isinstance(module, _OTHER_LAYERS):
            # The norms of a supernet have other names than those of its networks
            kind = 'BatchNorm' if isinstance(module, nn.modules.batchnorm._BatchNorm) else type(module).__name__
            if kinds[-1:] != [kind]:
                kinds.append(kind)
    return kinds


# Those that multiply-adds are counted of, and those that do nothing in eval mode
_OTHER_LAYERS = (nn.Conv2d, nn.Linear, nn.Identity, nn.Dropout, DropPath, nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _sum_below(counts: dict[str, int], prefix: str) -> int:
    return sum(n for name, n in counts.items() if f'{name}.'.startswith(prefix))


@dataclass(frozen=True)
class MetricRange:
    """Smallest, median and largest value of a metric over a space."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class SpaceProfile:
    """What the archs of a space cost.

    Attributes:
        size: Number of archs in the space.
        num_samples: Number of sampled archs behind the medians.
        macs: Multiply-adds of one image.
        params: Number of parameters.
        latency: Predicted latency in milliseconds, None without a latency table.
    """

    size: int
    num_samples: int
    macs: MetricRange
    params: MetricRange
    latency: MetricRange | None = None


def profile_space(table: CostTable, *, num_samples: int = 10_001, seed: int = 0) -> SpaceProfile:
    """Summarise what the archs of a space cost.

    Minimum and maximum are exact. The median is that of archs drawn with `timm_mixpath.sample`, as in the training of
    a supernet: uniform over expansions and over the number of paths, which is not uniform over archs.

    Args:
        table: Costs of the space.
        num_samples: Number of archs behind the median; for an even number it is the lower of the middle two.
        seed: Seed of the sequence of archs.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f'num_samples={num_samples!r} must be positive')
    archs = [sample(table.space, seed=seed, step=step) for step in range(num_samples)]
    ranges: dict[str, MetricRange] = {}
    for metric in table.metrics:
        smallest, largest = table.bounds(metric)
        median = statistics.median_low(table.cost(metric, arch) for arch in archs)
        ranges[metric] = MetricRange(smallest, median, largest)
    return SpaceProfile(size=table.space.size, num_samples=num_samples, **ranges)
