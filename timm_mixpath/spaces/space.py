"""Search spaces as data: backbone table, choices per block, bounds.

A space knows which archs it holds, how many, and how they map to integer vectors. It knows nothing of tensors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import TYPE_CHECKING

from timm.layers import make_divisible

from ..utils.numbers import as_int, as_whole
from .arch import SKIP, Arch, BlockChoice, cached_choice, check_expand_ratio, check_vector

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on

__all__ = ['BlockSpace', 'BlockSpec', 'SearchSpace', 'Space']


class Space(ABC):
    """What training, search and ranking ask of a search space. Archs are text (`str`), of which a space knows more.

    Spaces are frozen dataclasses with the attributes below. Their constructors call `_check_max_paths`.

    Attributes:
        name: Short name; the models are `mixpath_<name>` and `mixpath_<name>_supernet`.
        max_paths: m of the paper, the largest number of paths that may be active where paths are summed.
        input_size: Default input as (channels, height, width), in pixels.
        num_classes: Default number of classes.
        description: One line for listings.
    """

    name: str
    max_paths: int
    input_size: tuple[int, int, int]
    num_classes: int
    description: str

    def _check_max_paths(self) -> None:
        m, limit = self.max_paths, self.max_paths_limit
        if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= limit:
            raise ValueError(f'm={m!r} is out of range for space {self.name!r}, allowed are 1 to {limit}')

    @property
    @abstractmethod
    def max_paths_limit(self) -> int:
        """The largest m the space allows."""

    def with_max_paths(self, m: int | None) -> 'Self':
        """Return the space with another m, unchanged if None.

        Raises:
            ValueError: m is out of range.
        """
        return self if m is None else replace(self, max_paths=m)

    @property
    @abstractmethod
    def default_arch(self) -> str:
        """The arch that models have unless another is given."""

    @property
    @abstractmethod
    def gene_sizes(self) -> tuple[int, ...]:
        """Number of values of each entry of an integer vector."""

    @property
    def size(self) -> int:
        """Number of archs in the space."""
        return math.prod(self.gene_sizes)

    @abstractmethod
    def arch(self, arch: str) -> str:
        """Parse an arch and check that the space holds it.

        Args:
            arch: Arch or its text. Text in another order than the canonical one is put in order.

        Returns:
            The arch, its own canonical text.

        Raises:
            ValueError: Malformed text, or an arch that the space does not have; the message names what is wrong and
                what is allowed.
        """

    @abstractmethod
    def encode(self, arch: str) -> tuple[int, ...]:
        """Return the integer vector of an arch.

        Raises:
            ValueError: See `arch`.
        """

    @abstractmethod
    def decode(self, vector: Sequence[int]) -> str:
        """Return the arch of an integer vector, the inverse of `encode`.

        Raises:
            ValueError: Wrong length, or an entry out of range.
        """

    @abstractmethod
    def sample(self, draw: Callable[[], float]) -> str:
        """Draw an arch with the number of paths uniform in 1..m wherever paths are summed, see `sampling.sample`.

        Args:
            draw: Gives numbers in [0, 1), as `random.random` does.
        """

    def sample_uniform(self, draw: Callable[[], float]) -> str:
        """Draw an arch, all of them equally likely.

        Args:
            draw: Gives numbers in [0, 1), as `random.random` does.
        """
        return self.decode([int(draw() * size) for size in self.gene_sizes])


@dataclass(frozen=True)
class BlockSpec:
    """One choice block of a search space.

    Attributes:
        out_chs: Output channels.
        stride: Stride of the depthwise convolutions.
        expand_ratios: Expansions to choose from.
        kernel_sizes: Depthwise kernels to choose from.
        num_groups: Channel groups the expanded channels are split into; each chooses its own kernels.
        exp_groups: Convolution groups of the 1x1 expansion.
        pwl_groups: Convolution groups of the 1x1 projection.
        se_ratio: Squeeze-and-excite channels relative to the input of the block, 0 for none.
        act_layer: Activation, by timm name; the space's if None.
        can_skip: The block may be left out, so that its residual connection remains. Only the space of a backbone has
            such blocks.
    """

    out_chs: int
    stride: int = 1
    expand_ratios: tuple[int | float, ...] = (3, 6)
    kernel_sizes: tuple[int, ...] = (3, 5, 7, 9)
    num_groups: int = 1
    exp_groups: int = 1
    pwl_groups: int = 1
    se_ratio: float = 0.0
    act_layer: str | None = None
    can_skip: bool = False

    def __post_init__(self) -> None:
        # lists are welcome, but a space is hashed and compared
        object.__setattr__(self, 'expand_ratios', tuple(as_whole(as_int(ratio)) for ratio in self.expand_ratios))
        object.__setattr__(self, 'kernel_sizes', tuple(map(as_int, self.kernel_sizes)))
        object.__setattr__(self, 'out_chs', as_int(self.out_chs))
        object.__setattr__(self, 'stride', as_int(self.stride))


class BlockSpace(Space):
    """A space of networks of blocks: every block chooses an expansion and, per channel group, 1 to `max_paths` kernels.

    Attributes:
        blocks: The choice blocks in order.
    """

    blocks: tuple[BlockSpec, ...]

    def _check_blocks(self) -> None:
        object.__setattr__(self, 'blocks', tuple(self.blocks))
        if not self.blocks:
            raise ValueError(f'space {self.name!r} has no blocks')
        for block in self.blocks:
            if not block.expand_ratios or not block.kernel_sizes:
                raise ValueError(f'space {self.name!r}: every block needs at least one expansion and one kernel')
            for field in ('num_groups', 'exp_groups', 'pwl_groups'):
                if type(getattr(block, field)) is not int or getattr(block, field) < 1:
                    raise ValueError(f'space {self.name!r}: {field}={getattr(block, field)!r} must be at least 1')
            if len(set(block.expand_ratios)) < len(block.expand_ratios):
                raise ValueError(f'space {self.name!r}: an expansion of {block.expand_ratios} is given twice')
            try:  # what is wrong with all kernels at once is wrong with a block made of them
                for expand_ratio in block.expand_ratios:
                    BlockChoice((block.kernel_sizes,), check_expand_ratio(expand_ratio))
            except ValueError as e:
                raise ValueError(f'space {self.name!r}: {e}') from None
        self._check_max_paths()

    @property
    def max_paths_limit(self) -> int:
        """The largest m the space allows: the number of kernels of its block with the fewest."""
        return min(len(block.kernel_sizes) for block in self.blocks)

    def subsets(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Kernel subsets that a channel group of block `index` may activate, by size and then by kernel."""
        return _subsets(self.blocks[index].kernel_sizes, self.max_paths)

    def choices(self, index: int) -> list[BlockChoice]:
        """All choices of block `index`; with channel groups there are many, see `num_choices`."""
        block = self.blocks[index]
        choices = [
            BlockChoice(groups, expand_ratio)
            for expand_ratio in block.expand_ratios
            for groups in product(self.subsets(index), repeat=block.num_groups)
        ]
        return choices + [SKIP] * block.can_skip

    def num_choices(self, index: int) -> int:
        """Number of choices of block `index`; 8, 20, 28, 30 in S1 for m = 1..4."""
        block = self.blocks[index]
        return len(block.expand_ratios) * len(self.subsets(index)) ** block.num_groups + block.can_skip

    @property
    def size(self) -> int:
        """Number of archs in the space."""
        return math.prod(self.num_choices(index) for index in range(len(self.blocks)))

    def arch(self, arch: Arch | str) -> Arch:
        """Parse `arch` and check that the space holds it.

        Raises:
            ValueError: Malformed text, or a choice that the space does not have; the message names the block, the
                value and what is allowed.
        """
        arch = Arch(arch)
        if len(arch.blocks) != len(self.blocks):
            raise ValueError(
                f'arch has {len(arch.blocks)} blocks, space {self.name!r} needs {len(self.blocks)}: {str(arch)!r}'
            )
        for index, (choice, spec) in enumerate(zip(arch.blocks, self.blocks)):
            problem = None
            unknown = [k for group in choice.groups for k in group if k not in spec.kernel_sizes]
            if choice.is_skip:
                if not spec.can_skip:
                    problem = 'the block can not be skipped'
            elif len(choice.groups) != spec.num_groups:
                problem = f'{len(choice.groups)} channel groups, the space has {spec.num_groups}'
            elif choice.expand_ratio not in spec.expand_ratios:
                problem = f'expansion {choice.expand_ratio} is not one of {_join(spec.expand_ratios)}'
            elif max(choice.num_paths) > self.max_paths:
                problem = f'{max(choice.num_paths)} paths, at most m={self.max_paths} may be active'
            elif unknown:
                problem = f'kernel {unknown[0]} is not one of {_join(spec.kernel_sizes)}'
            if problem:
                raise ValueError(f'arch block {index} ({str(choice)!r}) is not in space {self.name!r}: {problem}')
        return arch

    @property
    def gene_sizes(self) -> tuple[int, ...]:
        """Number of values of each entry of an integer vector: per block the expansion, then the groups' kernels.

        Where a block can be skipped, that is the last value of its expansion, whatever its kernels say.
        """
        sizes: list[int] = []
        for index, block in enumerate(self.blocks):
            num_expansions = len(block.expand_ratios) + block.can_skip
            sizes += [num_expansions, *[len(self.subsets(index))] * block.num_groups]
        return tuple(sizes)

    def encode(self, arch: Arch | str) -> tuple[int, ...]:
        """Return the integer vector of an arch: entries are indices into expansions and `subsets`."""
        vector: list[int] = []
        for index, choice in enumerate(self.arch(arch).blocks):
            block, subsets = self.blocks[index], self.subsets(index)
            if choice.is_skip:
                vector += [len(block.expand_ratios), *[0] * block.num_groups]
                continue
            vector.append(block.expand_ratios.index(choice.expand_ratio))
            vector += [subsets.index(group) for group in choice.groups]
        return tuple(vector)

    def decode(self, vector: Sequence[int]) -> Arch:
        """Return the arch of an integer vector, the inverse of `encode`.

        Raises:
            ValueError: Wrong length, or an entry out of range.
        """
        check_vector(vector, self.gene_sizes, self.name)
        genes = iter(vector)
        choices: list[BlockChoice] = []
        for index, block in enumerate(self.blocks):
            expansion, subsets = next(genes), self.subsets(index)
            groups = tuple(subsets[next(genes)] for _ in range(block.num_groups))
            if expansion == len(block.expand_ratios):
                choices.append(SKIP)
            else:
                choices.append(cached_choice(groups, block.expand_ratios[expansion]))
        return Arch.from_blocks(choices)

    def sample(self, draw: Callable[[], float]) -> Arch:
        """Draw an arch: per block the expansion is uniform, in every channel group the number of paths in 1..m.

        To skip a block counts as one expansion more.

        Args:
            draw: Gives numbers in [0, 1), as `random.random` does.
        """
        blocks: list[BlockChoice] = []
        for spec in self.blocks:
            expansion = int(draw() * (len(spec.expand_ratios) + spec.can_skip))
            if expansion == len(spec.expand_ratios):
                blocks.append(SKIP)
                continue
            expand_ratio = spec.expand_ratios[expansion]
            groups: list[tuple[int, ...]] = []
            for _ in range(spec.num_groups):
                num_paths = 1 + int(draw() * self.max_paths)
                kernel_sizes = list(spec.kernel_sizes)
                paths = [kernel_sizes.pop(int(draw() * len(kernel_sizes))) for _ in range(num_paths)]
                groups.append(tuple(sorted(paths)))
            blocks.append(cached_choice(tuple(groups), expand_ratio))
        return Arch.from_blocks(blocks)

    def sample_uniform(self, draw: Callable[[], float]) -> Arch:
        vector: list[int] = []
        for index, spec in enumerate(self.blocks):
            # A skipped block is one choice, and stands for as many vectors as its kernels have values
            if spec.can_skip and int(draw() * self.num_choices(index)) == 0:
                vector += [len(spec.expand_ratios), *[0] * spec.num_groups]
                continue
            sizes = len(spec.expand_ratios), *[len(self.subsets(index))] * spec.num_groups
            vector += [int(draw() * size) for size in sizes]
        return self.decode(vector)


@dataclass(frozen=True)
class SearchSpace(BlockSpace):
    """A multi-path search space of inverted bottlenecks.

    Every block chooses one expansion and, in each of its channel groups, 1 to `max_paths` of its kernels, without
    repetition.

    Attributes:
        name: Short name; the models are `mixpath_<name>` and `mixpath_<name>_supernet`.
        blocks: The choice blocks in order. Neighbours with equal `out_chs` form a stage.
        stem_chs: Output channels of the 3x3 stem convolution.
        stem_stride: Stride of the stem.
        num_features: Output channels of the 1x1 head convolution.
        ds_chs: Output channels of a fixed 3x3 depthwise-separable block behind the stem, None for no such block.
        max_paths: m of the paper, the largest number of paths that may be active in a channel group of a block.
        act_layer: Activation, by timm name.
        fix_group_fanout: Initialise depthwise and grouped convolutions as timm does, by the fan out of a group. The
            released code of S1 takes the fan out of all groups.
        input_size: Default input as (channels, height, width), in pixels.
        num_classes: Default number of classes.
        description: One line for listings.

    Raises:
        ValueError: `max_paths` is out of range, there is no block, or a size is no positive integer.
    """

    name: str
    blocks: tuple[BlockSpec, ...]
    stem_chs: int = 32
    stem_stride: int = 1
    num_features: int = 1280
    ds_chs: int | None = None
    max_paths: int = 2
    act_layer: str = 'relu6'
    fix_group_fanout: bool = False
    input_size: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    description: str = ''

    def __post_init__(self) -> None:
        self._check_blocks()
        size = tuple(map(as_int, self.input_size)) if isinstance(self.input_size, Iterable) else (self.input_size,)
        object.__setattr__(self, 'input_size', size)  # a list is welcome, but a space is hashed and compared
        if len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
            raise ValueError(
                f'space {self.name!r}: input_size={size} must be channels, height and width, such as (3, 32, 32)'
            )
        for field, least in (
            ('stem_chs', 1),
            ('stem_stride', 1),
            ('num_features', 1),
            ('ds_chs', 1),
            ('num_classes', 0),
        ):
            value = as_int(getattr(self, field))
            object.__setattr__(self, field, value)
            if not (field == 'ds_chs' and value is None) and (type(value) is not int or value < least):
                raise ValueError(f'space {self.name!r}: {field}={value!r} must be an integer of at least {least}')
        for block in self.blocks:
            if type(block.out_chs) is not int or block.out_chs < 1 or block.stride not in (1, 2):
                raise ValueError(
                    f'space {self.name!r}: out_chs={block.out_chs!r} must be a positive integer, '
                    f'stride={block.stride!r} be 1 or 2'
                )
            if block.can_skip:
                raise ValueError(f'space {self.name!r}: only blocks of a backbone can be skipped, set can_skip=False')

    def scaled(self, width_mult: float) -> 'SearchSpace':
        """Return the space with its channels multiplied and rounded as timm's EfficientNet builder does.

        The head widens above 1 and keeps its width below, as in MobileNetV2.
        """
        if width_mult == 1.0:
            return self
        if not width_mult > 0:
            raise ValueError(f'width_mult={width_mult!r} must be positive')

        def scale(channels: int, multiplier: float = width_mult) -> int:
            return make_divisible(channels * multiplier)

        return replace(
            self,
            stem_chs=scale(self.stem_chs),
            blocks=tuple(replace(b, out_chs=scale(b.out_chs)) for b in self.blocks),
            num_features=scale(self.num_features, max(1.0, width_mult)),
            ds_chs=None if self.ds_chs is None else scale(self.ds_chs),
        )

    @property
    def stages(self) -> list[list[BlockSpec]]:
        """The blocks grouped into stages of equal width."""
        stages: list[list[BlockSpec]] = []
        for block in self.blocks:
            if stages and stages[-1][-1].out_chs == block.out_chs and block.stride == 1:
                stages[-1].append(block)
            else:
                stages.append([block])
        return stages

    @property
    def reduction(self) -> int:
        """Stride of the whole network: input pixels per pixel of its last features."""
        return self.stem_stride * math.prod(block.stride for block in self.blocks)

    @property
    def default_arch(self) -> Arch:
        """The smallest kernel alone at the largest expansion in every block, the plain MobileNetV2 block."""
        return Arch.from_blocks(
            BlockChoice(((min(b.kernel_sizes),),) * b.num_groups, max(b.expand_ratios)) for b in self.blocks
        )


@cache  # a search decodes every vector that it considers
def _subsets(kernel_sizes: tuple[int, ...], max_paths: int) -> tuple[tuple[int, ...], ...]:
    return tuple(s for k in range(1, max_paths + 1) for s in combinations(sorted(kernel_sizes), k))


def _join(values: Sequence[int]) -> str:
    return ', '.join(str(v) for v in values)
