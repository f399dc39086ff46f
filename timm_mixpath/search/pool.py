"""Archs inside the limits of a search that were not taken yet."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..spaces.arch import Arch
from ..spaces.sampling import sample
from ..spaces.space import SearchSpace
from ..utils.errors import UsageError
from .config import LIMITED, SearchConfig

if TYPE_CHECKING:
    from ..models.cost import CostTable

__all__ = ['NUM_MATINGS', 'ArchPool', 'check_limits']


# How hard to look for an arch that is inside the limits and new, before the next and slower way is tried
_NUM_SAMPLES = 200

_NUM_REPAIRS = 50

NUM_MATINGS = 20

_MAX_ENUMERATED = 20_000


def check_limits(config: SearchConfig, cost: 'CostTable') -> None:
    """Check that the space has archs inside each limit.

    Raises:
        UsageError: It has none, or there is no latency table where the latency has to be known.
    """
    if config.needs_latency and 'latency' not in cost.metrics:
        raise UsageError(
            'a search for latency needs a latency table of this space (--latency-table FILE), which `timm-mixpath '
            'latency` measures'
        )
    for metric in LIMITED:
        if metric not in cost.metrics:
            continue
        low, high = config.limits(metric)
        smallest, largest = cost.bounds(metric)
        unit = ' ms' if metric == 'latency' else ''
        shown = [f'{value:.2f} ms' if unit else value for value in (smallest, largest)]
        reach = f'the smallest of the space has {shown[0]} and the largest {shown[1]}'
        if high < smallest:
            raise UsageError(f'max_{metric}={high}{unit} excludes every arch, {reach}')
        if low > largest:
            raise UsageError(f'min_{metric}={low}{unit} excludes every arch, {reach}')


class ArchPool:
    """The archs inside the limits that were not taken yet.

    Drawing ends when nothing is left: spaces of up to `_MAX_ENUMERATED` archs are gone through one by one, larger
    ones along single genes from the archs that were taken, so that no loop can go on for ever.
    """

    def __init__(self, space: SearchSpace, cost: 'CostTable', config: SearchConfig) -> None:
        self.space = space
        self.cost = cost
        self.seed = config.seed
        self.sizes = space.gene_sizes
        self.limits = [
            (metric, *config.limits(metric), np.ptp(cost.bounds(metric)) or 1)
            for metric in LIMITED
            if config.limits(metric) != (-math.inf, math.inf)
        ]
        # An arch is its own canonical text; a dict keeps the order
        self.taken: dict[Arch, None] = {}
        self._step = 0
        # A stream of its own, apart from the algorithm's
        self._random = np.random.default_rng([config.seed, 1])
        self._rest = self._remaining()

    def violation(self, arch: Arch) -> float:
        """How far an arch is outside the limits, in shares of the space's ranges; 0 inside."""
        total = 0.0
        for metric, low, high, span in self.limits:
            value = self.cost.cost(metric, arch)
            total += max(0.0, value - high, low - value) / span
        return total

    def is_new(self, arch: Arch) -> bool:
        return arch not in self.taken and self.violation(arch) == 0

    def take(self, count: int) -> list[Arch]:
        """Draw up to `count` archs, fewer if no more are found."""
        archs: list[Arch] = []
        while len(archs) < count:
            arch = self._draw()
            if arch is None:
                break
            self.taken[arch] = None
            archs.append(arch)
        return archs

    def take_near(self, start: Arch, count: int) -> list[Arch]:
        """Draw up to `count` archs that differ little from one: itself, if it is inside the limits, then others.

        Of each, up to a quarter of the genes are drawn anew, and then as many as it takes to be inside the limits.
        """
        archs: list[Arch] = [start] if self.is_new(start) else []
        self.taken.update(dict.fromkeys(archs))
        vector = self.space.encode(start)
        for _ in range(count * NUM_MATINGS):
            if len(archs) == count:
                break
            genes = list(vector)
            num_changes = self._random.integers(0, len(genes) // 4, endpoint=True)
            for gene in self._random.choice(len(genes), num_changes, replace=False):
                genes[gene] = self._random.integers(self.sizes[gene])
            arch = self.space.decode(self.repair(genes, self._random))
            if self.is_new(arch):
                self.taken[arch] = None
                archs.append(arch)
        return archs

    def _draw(self) -> Arch | None:
        for attempt in range(_NUM_SAMPLES + _NUM_REPAIRS):
            arch = sample(self.space, seed=self.seed, step=self._step)
            self._step += 1
            if attempt >= _NUM_SAMPLES:
                # Samples inside the limits are rare, or most are taken
                arch = self.space.decode(self.repair(self.space.encode(arch), self._random))
            if self.is_new(arch):
                return arch
        return next(self._rest)

    def _remaining(self) -> Iterator[Arch | None]:
        if self.space.size <= _MAX_ENUMERATED:
            for vector in itertools.product(*map(range, self.sizes)):
                if self.is_new(arch := self.space.decode(vector)):
                    yield arch
        else:
            for metric in self.cost.metrics:
                if self.is_new(arch := self.cost.smallest(metric)):
                    yield arch
            position = 0
            while True:
                for start in itertools.islice(list(self.taken), position, None):
                    for vector in self._neighbours(self.space.encode(start)):
                        if self.is_new(arch := self.space.decode(vector)):
                            yield arch
                    position += 1
                if position == len(self.taken):
                    yield None
        while True:
            yield None

    def _neighbours(self, vector: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for gene, size in enumerate(self.sizes):
            for value in range(size):
                if value != vector[gene]:
                    yield (*vector[:gene], value, *vector[gene + 1 :])

    def repair(self, vector: Sequence[int], random_state: np.random.Generator) -> tuple[int, ...]:
        """Redraw genes one by one, in random order, until the vector is inside the limits or no gene brings it closer.

        The first value that brings it closer is taken, in random order: going for the best one would end at the same
        few archs every time.
        """
        vector = tuple(int(v) for v in vector)
        violation = self.violation(self.space.decode(vector))
        closer = True
        while violation > 0 and closer:
            closer = False
            for gene in random_state.permutation(len(self.sizes)):
                for value in random_state.permutation(self.sizes[gene]):
                    changed = (*vector[:gene], int(value), *vector[gene + 1 :])
                    distance = self.violation(self.space.decode(changed))
                    if distance < violation:
                        vector, violation, closer = changed, distance, True
                        break
                if violation == 0:
                    break
        return vector
