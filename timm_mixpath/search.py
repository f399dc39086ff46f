"""The search of stage 2: which archs of a trained supernet are the best trade-offs of accuracy and cost.

NSGA-II (pymoo) or random search propose archs, `evaluate` scores them in the supernet, and every score goes to an
archive on disk at once. A search is a function of its configuration and of the scores, so a search that was cut off
is run again from its start with the scores of the archive in the place of evaluations, and ends where it would have.

This module needs `pip install 'timm-mixpath[search]'` for NSGA-II and for the hypervolume, but not to be imported.
"""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arch import Arch
from .archive import Archive, plain_metrics
from .distributed import Ranks
from .errors import RunError, UsageError
from .files import write_text
from .sampling import sample
from .space import SearchSpace
from .version import __version__

if TYPE_CHECKING:
    from .cost import CostTable

__all__ = [
    'Candidate',
    'SearchConfig',
    'SearchResult',
    'crowding_distance',
    'format_front',
    'pareto_front',
    'search',
    'write_front_csv',
    'write_front_json',
]

ALGORITHMS = ('nsga2', 'random')
OBJECTIVES = ('error', 'macs', 'params')
LIMITED = ('macs', 'params')

# How the operators of NSGA-II work: nine pairs of parents out of ten are crossed, and on average one gene per child is
# drawn anew, the customary rates for genes that are independent of each other.
_CROSSOVER_PROB = 0.9
_MUTATIONS_PER_CHILD = 1.0

# How hard to look for an arch that is inside the limits and new, before the next and slower way is tried
_NUM_SAMPLES = 200
_NUM_REPAIRS = 50
_NUM_MATINGS = 20
_MAX_ENUMERATED = 20_000


@dataclass(frozen=True)
class SearchConfig:
    """What to search for and how long.

    A search makes `num_evaluations = population + generations * offspring` evaluations, all of different archs. It
    makes fewer only if it finds no further arch inside the limits.

    Attributes:
        algorithm: 'nsga2' or 'random'.
        population: Archs of generation 0, drawn at random; the size of NSGA-II's population ever after.
        offspring: Archs evaluated in each generation after that.
        generations: Generations after generation 0.
        objectives: What to minimise, {name: weight} or (name, weight) pairs of 'error' (which must be there), 'macs'
            and 'params'. A weight says how much closeness in this objective counts when NSGA-II thins out a crowded
            front; it does not change which arch dominates which. Only the proportions of the weights matter.
        max_macs: Largest MACs an arch may have.
        min_macs: Smallest MACs an arch may have.
        max_params: Largest number of parameters an arch may have.
        min_params: Smallest number of parameters an arch may have.
        seed: Seed of everything that is drawn.

    Raises:
        UsageError: A value is out of range, or two contradict each other.
    """

    algorithm: str = 'nsga2'
    population: int = 40
    offspring: int = 20
    generations: int = 20
    objectives: Mapping[str, float] | Sequence[tuple[str, float]] = (('error', 1.0), ('macs', 1.0), ('params', 1.0))
    max_macs: int | None = None
    min_macs: int | None = None
    max_params: int | None = None
    min_params: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f'unknown algorithm {self.algorithm!r}, known are {", ".join(ALGORITHMS)}')
        for name, least in (('population', 1), ('offspring', 1), ('generations', 0), ('seed', 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f'{name}={value!r} is not an integer of at least {least}')
        for metric in LIMITED:
            for name in (f'max_{metric}', f'min_{metric}'):
                value = getattr(self, name)
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                    raise UsageError(f'{name}={value!r} is not an integer of at least 0')
            low, high = self.limits(metric)
            if low > high:
                raise UsageError(f'min_{metric}={low} is above max_{metric}={high}, no arch can satisfy both')

        # One order and one type, so that equal configurations compare and are saved as equal
        pairs = list(self.objectives.items() if isinstance(self.objectives, Mapping) else self.objectives)
        try:
            weights = {name: float(weight) for name, weight in pairs}
        except (TypeError, ValueError):
            raise UsageError(f'objectives={self.objectives!r} are not pairs of a name and a weight') from None
        for name, weight in weights.items():
            if name not in OBJECTIVES:
                raise UsageError(f'unknown objective {name!r}, known are {", ".join(OBJECTIVES)}')
            if not 0 < weight < math.inf:
                raise UsageError(f'weight {weight} of objective {name!r} must be positive, leave it out instead')
        if 'error' not in weights or len(weights) < len(pairs):
            raise UsageError(f"objectives={self.objectives!r} must name 'error', and each objective once")
        ordered = tuple((name, weights[name]) for name in OBJECTIVES if name in weights)
        object.__setattr__(self, 'objectives', ordered)

    @property
    def num_evaluations(self) -> int:
        """Evaluations that the search makes, unless there are fewer archs inside the limits."""
        return self.population + self.generations * self.offspring

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Names of the objectives, in the order of `OBJECTIVES`."""
        return tuple(name for name, _ in self.objectives)

    def limits(self, metric: str) -> tuple[float, float]:
        """Smallest and largest value that an arch may have in 'macs' or 'params', infinite where there is no limit."""
        low, high = getattr(self, f'min_{metric}'), getattr(self, f'max_{metric}')
        return (-math.inf if low is None else low), (math.inf if high is None else high)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `SearchConfig(**config.to_dict()) == config`."""
        return dict(asdict(self), objectives=dict(self.objectives))


@dataclass(frozen=True)
class Candidate:
    """An evaluated arch.

    Attributes:
        arch: The arch.
        top1: Top-1 accuracy on the search split, in percent.
        loss: Loss on the search split, NaN if it was not finite.
        macs: Multiply-adds of one image.
        params: Number of parameters.
        index: Place in the order of evaluation, from 0.
        generation: Generation that proposed it, from 0.
        extra: What else `evaluate` returned.
    """

    arch: Arch
    top1: float
    loss: float
    macs: int
    params: int
    index: int = 0
    generation: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Top-1 error on the search split, in percent."""
        return 100.0 - self.top1


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        space: The space that was searched.
        config: The configuration of the search.
        fingerprint: What the scores depend on, as given to `search`.
        evaluations: All candidates in the order of evaluation.
        front: Those that no other candidate dominates in the objectives, by MACs.
        bounds: Smallest and largest value of each objective in the space, with 0 and 100 for the error.
    """

    space: SearchSpace
    config: SearchConfig
    fingerprint: dict[str, Any]
    evaluations: list[Candidate]
    front: list[Candidate]
    bounds: dict[str, tuple[float, float]]

    @property
    def chosen(self) -> Candidate:
        """The candidate of lowest error; of those with equal error the one with fewest MACs, then parameters."""
        return min(self.front, key=lambda c: (c.error, c.macs, c.params, c.index))

    def hypervolume(self, ref: Sequence[float] | None = None) -> float:
        """Return the hypervolume of the front, larger is better.

        Objectives are normalised first, so that 0 is the best and 1 the worst that the space can have: the error is
        divided by 100 percent, MACs and parameters are mapped from the space's own exact bounds. Volumes of searches
        in the same space with the same objectives can be compared.

        Args:
            ref: Reference point in normalised objectives, in the order of `config.objective_names`; 1 in each if
                None, which makes the volume a share of the whole space, between 0 and 1.

        Raises:
            ImportError: pymoo is not installed.
            ValueError: The reference point has the wrong length.
        """
        names = self.config.objective_names
        ref = [1.0] * len(names) if ref is None else [float(v) for v in ref]
        if len(ref) != len(names):
            raise ValueError(f'the reference point has {len(ref)} entries, the objectives are {", ".join(names)}')
        require_pymoo()
        from pymoo.indicators.hv import HV

        values = _objective_values(self.front, names)  # [num_candidates, num_objectives]
        low = np.array([self.bounds[name][0] for name in names])
        high = np.array([self.bounds[name][1] for name in names])
        # An objective in which all archs of the space are equal has no span
        span = np.where(high > low, high - low, 1.0)
        return float(HV(ref_point=np.array(ref))((values - low) / span))


def search(
    space: SearchSpace,
    cost: 'CostTable',
    evaluate: Callable[[Arch], Mapping[str, Any]],
    config: SearchConfig,
    *,
    archive_path: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    progress: Callable[[Candidate, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> SearchResult:
    """Search a space, or go on with a search that was cut off.

    All random numbers come from `config.seed`; global random states are neither read nor changed. `evaluate` should
    be a function of the arch alone, otherwise a search that was resumed or distributed differs from one that was not.

    Args:
        space: Space to search.
        cost: Costs of the archs of this space.
        evaluate: Returns the metrics of an arch on the search split, at least `top1` in percent and `loss`. Metrics
            are numbers, text or None.
        config: What to search for.
        archive_path: Archive of this search, JSON lines. A search of the same configuration and fingerprint goes on
            with it; `generations` alone may have grown.
        fingerprint: All that the scores depend on (checkpoint, data, ...), JSON-ready.
        progress: Called in rank 0 after every new evaluation, with the candidate and `config.num_evaluations`.
        rank: Rank of this process.
        world_size: Number of processes that evaluate. If there are several, `torch.distributed` is initialised and
            all of them call `search` with the same arguments. Rank 0 proposes and keeps the archive, the others
            evaluate what it hands out.

    Returns:
        The result, the same in all ranks.

    Raises:
        UsageError: The limits exclude every arch, the archive belongs to another search, or the metrics lack `top1`
            or `loss`.
        RunError: The archive does not hold what this search would have evaluated, or another rank failed.
        ImportError: pymoo is not installed.
    """
    if config.algorithm == 'nsga2':
        require_pymoo()
    check_limits(config, cost)
    ranks = Ranks(rank, world_size)
    archive = Archive(
        archive_path,
        'search',
        config=config.to_dict(),
        fingerprint=fingerprint,
        versions=_versions(config),
        grows='generations',
    )
    pool = _Pool(space, cost, config)
    propose = (_propose_nsga2 if config.algorithm == 'nsga2' else _propose_random)(pool, config)

    def next_generation(candidates: list[Candidate] | None) -> list[Arch]:
        try:
            return propose.send(candidates)
        except StopIteration:
            return []

    def keep(found: list[Candidate]) -> None:
        for candidate in found:
            archive.append(_record(candidate))
            if progress is not None:
                progress(candidate, config.num_evaluations)

    evaluations: list[Candidate] = []
    candidates = None
    try:
        records = ranks.from_first(archive.open)
        for generation in itertools.count():
            archs = ranks.from_first(lambda c=candidates: next_generation(c))
            if not archs:
                break
            todo = [
                Candidate(arch, math.nan, math.nan, cost.macs(arch), cost.params(arch), index, generation)
                for index, arch in enumerate(archs, len(evaluations))
            ]
            known = [_restore(c, record, archive.path) for c, record in zip(todo, records[len(evaluations) :])]
            candidates = known
            for start in range(len(known), len(todo), world_size):
                chunk = todo[start : start + world_size]
                metrics = ranks.map(evaluate, [c.arch for c in chunk])
                found = [_with_metrics(c, m) for c, m in zip(chunk, metrics)]
                ranks.from_first(lambda found=found: keep(found))
                candidates = candidates + found
            evaluations += candidates
    finally:
        archive.close()
    if len(evaluations) < len(records):
        raise RunError(_diverged(archive.path, f'it holds {len(records)} evaluations, this search {len(evaluations)}'))

    return SearchResult(
        space=space,
        config=config,
        fingerprint=archive.header['fingerprint'],
        evaluations=evaluations,
        front=_front(evaluations, config.objective_names),
        bounds={'error': (0.0, 100.0), **{metric: cost.bounds(metric) for metric in LIMITED}},
    )


def pareto_front(values: np.ndarray) -> list[int]:
    """Return the indices of the rows that no other row dominates.

    A row dominates another if it is nowhere larger and somewhere smaller. Equal rows do not dominate each other.

    Args:
        values: Objectives to minimise, [num_candidates, num_objectives].
    """
    values = np.asarray(values, dtype=float)
    front: list[int] = []
    for index, row in enumerate(values):
        dominates = (values <= row).all(axis=1) & (values < row).any(axis=1)  # [num_candidates]
        if not dominates.any():
            front.append(index)
    return front


def crowding_distance(values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return NSGA-II's crowding distance with a weight per objective.

    The distance of a row is the mean over objectives, weighted as in MoGA (arXiv 1908.01314), of the gap between its
    two neighbours in that objective, relative to the range of all rows. Both ends of an objective get infinity. Of
    rows that are equal the first is taken, the others get 0.

    Args:
        values: Objectives of one front, [num_candidates, num_objectives].
        weights: Positive weight of each objective.

    Returns:
        Distances, [num_candidates]; finite ones are at most 1.
    """
    unique, first = np.unique(np.asarray(values, dtype=float), axis=0, return_index=True)
    distance = np.zeros(len(unique))
    for column, weight in zip(unique.T, np.asarray(weights, dtype=float) / np.sum(weights)):
        order = np.argsort(column, kind='stable')
        column = column[order]
        if column[-1] > column[0]:
            distance[order[1:-1]] += weight * (column[2:] - column[:-2]) / (column[-1] - column[0])
            distance[order[[0, -1]]] = np.inf
    if len(unique) == 1:
        distance[:] = np.inf
    result = np.zeros(len(values))
    result[first] = distance
    return result


def require_pymoo() -> None:
    """Check that a pymoo is installed that a repeatable search can be made with.

    Raises:
        ImportError: It is not.
    """
    try:
        from pymoo.config import Config

        # pymoo 0.6.1.6 is the first whose operators draw from a random state of the run, not from numpy's global one
        from pymoo.util import default_random_state  # noqa: F401
    except ImportError as e:
        raise ImportError(f"the search needs pymoo 0.6.1.6 or newer ({e}): pip install 'timm-mixpath[search]'") from e
    # pymoo prints a hint to stdout where its compiled modules are missing; nothing used here is among them
    Config.warnings['not_compiled'] = False


def _objective_values(candidates: Sequence[Candidate], names: Sequence[str]) -> np.ndarray:
    """Objectives of candidates, [num_candidates, num_objectives]."""
    return np.array([[getattr(c, name) for name in names] for c in candidates], dtype=float).reshape(-1, len(names))


def _front(evaluations: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    front = [evaluations[i] for i in pareto_front(_objective_values(evaluations, names))]
    return sorted(front, key=lambda c: (c.macs, c.params, c.error, c.index))


# ---- Limits and candidates ------------------------------------------------------------------------------------------


def check_limits(config: SearchConfig, cost: 'CostTable') -> None:
    """Check that the space has archs inside each limit.

    Raises:
        UsageError: It has none.
    """
    for metric in LIMITED:
        low, high = config.limits(metric)
        smallest, largest = cost.bounds(metric)
        if high < smallest:
            raise UsageError(f'max_{metric}={high} excludes every arch, the smallest of the space has {smallest}')
        if low > largest:
            raise UsageError(f'min_{metric}={low} excludes every arch, the largest of the space has {largest}')


class _Pool:
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
            (metric, *config.limits(metric), max(1, np.ptp(cost.bounds(metric))))
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
            for metric in LIMITED:
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


# ---- Algorithms: generators that yield the archs of a generation and are sent the evaluated candidates --------------

_Proposals = Generator[list[Arch], list[Candidate] | None, None]


def _first_generation(pool: _Pool, config: SearchConfig) -> list[Arch]:
    archs = pool.take(config.population)
    if not archs:
        limits = [f'{n}={v}' for n, v in asdict(config).items() if n[:4] in ('max_', 'min_') and v is not None]
        raise UsageError(f'no arch inside the limits was found ({", ".join(limits)}), widen them')
    return archs


def _propose_random(pool: _Pool, config: SearchConfig) -> _Proposals:
    """Sample as supernet training does, without repetition."""
    yield _first_generation(pool, config)
    for _ in range(config.generations):
        yield pool.take(config.offspring)


def _propose_nsga2(pool: _Pool, config: SearchConfig) -> _Proposals:
    """NSGA-II over categorical genes, with weights in the crowding distance.

    As in MoGA (arXiv 1908.01314) and FairNAS the weights say how much room each objective gets on the front. pymoo's
    own operators for integers move to nearby values, but no kernel subset is nearer to another than a third.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.crossover import Crossover
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.core.termination import NoTermination
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
    from pymoo.operators.survival.rank_and_crowding.metrics import CrowdingDiversity

    space, sizes = pool.space, np.array(pool.sizes)
    num_open = max(1, np.count_nonzero(sizes > 1))  # a gene of one value takes no mutation

    class UniformCrossover(Crossover):
        def __init__(self) -> None:
            super().__init__(n_parents=2, n_offsprings=2, prob=_CROSSOVER_PROB)

        def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            swap = random_state.random(X.shape[1:]) < 0.5  # X is [2, num_matings, num_genes]
            return np.where(swap, X[::-1], X)

    class RedrawGenes(Mutation):
        def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            redraw = random_state.random(X.shape) < _MUTATIONS_PER_CHILD / num_open  # [num_children, num_genes]
            # A step of 1 to size - 1, round the end, reaches all other values with equal probability
            steps = random_state.integers(1, np.maximum(sizes, 2), size=X.shape)
            return np.where(redraw, (X + steps) % sizes, X)

    class IntoLimits(Repair):
        def _do(self, problem: Any, X: np.ndarray, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            return np.array([pool.repair(x, random_state) for x in X])

    class NeverTwice(DuplicateElimination):
        """Drops what was evaluated at any time in this run, not only what is in the population, and failed repairs."""

        def do(self, pop: Any, *others: Any, **kwargs: Any) -> Any:
            seen = {decode(individual) for other in others for individual in other}
            keep: list[int] = []
            for index, individual in enumerate(pop):
                arch = decode(individual)
                if arch not in seen and pool.is_new(arch):
                    seen.add(arch)
                    keep.append(index)
            return pop[keep]

    class WeightedCrowding(CrowdingDiversity):
        def _do(self, F: np.ndarray, n_remove: int | None = None) -> np.ndarray:
            distance = crowding_distance(F, [weight for _, weight in config.objectives])
            distance = np.where(np.isinf(distance), 2.0, distance)  # the others are at most 1
            # How numpy's quicksort orders equal values depends on the CPU. Without any, all machines agree.
            order = np.argsort(-distance, kind='stable')
            distance[order] -= 1e-9 * np.arange(len(distance))
            return distance

    def decode(individual: Any) -> Arch:
        return space.decode([int(v) for v in individual.X])

    def encode(archs: list[Arch]) -> np.ndarray:
        return np.array([space.encode(arch) for arch in archs])

    first = _first_generation(pool, config)
    # Told without having been asked for: pymoo's own initialisation would repair and sort out what is in order
    individuals = Population.new('X', encode(first))
    candidates = yield first

    algorithm = NSGA2(
        pop_size=config.population,
        n_offsprings=config.offspring,
        crossover=UniformCrossover(),
        mutation=RedrawGenes(),
        repair=IntoLimits(),
        survival=RankAndCrowding(crowding_func=WeightedCrowding()),
        eliminate_duplicates=NeverTwice(),
        seed=config.seed,
    )
    algorithm.mating.n_max_iterations = _NUM_MATINGS
    problem = Problem(n_var=len(sizes), n_obj=len(config.objectives), xl=0, xu=sizes - 1, vtype=int)
    algorithm.setup(problem, termination=NoTermination())
    for _ in range(config.generations):
        individuals.set('F', _objective_values(candidates, config.objective_names))
        algorithm.tell(infills=individuals)
        individuals = algorithm.ask()
        if individuals is None:  # all children were known
            algorithm.termination.force_termination = False
            individuals = Population.new('X', np.empty((0, len(sizes)), dtype=int))
        archs = [decode(individual) for individual in individuals]
        pool.taken.update(dict.fromkeys(archs))
        # Mating gives up where most children are known already; the number of evaluations stays what was asked for
        extra = pool.take(config.offspring - len(archs))
        if extra:
            individuals = Population.merge(individuals, Population.new('X', encode(extra)))
        candidates = yield archs + extra


# ---- Metrics and records --------------------------------------------------------------------------------------------


def _with_metrics(candidate: Candidate, metrics: Mapping[str, Any]) -> Candidate:
    """Complete a candidate with what `evaluate` returned."""
    values = plain_metrics(metrics, candidate.arch)
    top1, loss = values.pop('top1'), values.pop('loss')
    return Candidate(
        arch=candidate.arch,
        top1=float(top1),
        loss=math.nan if loss is None else float(loss),
        macs=candidate.macs,
        params=candidate.params,
        index=candidate.index,
        generation=candidate.generation,
        extra=values,
    )


def _record(candidate: Candidate) -> dict[str, Any]:
    loss = candidate.loss if math.isfinite(candidate.loss) else None
    return dict(
        index=candidate.index,
        generation=candidate.generation,
        arch=str(candidate.arch),
        macs=candidate.macs,
        params=candidate.params,
        metrics={'top1': candidate.top1, 'loss': loss, **candidate.extra},
    )


def _restore(candidate: Candidate, record: Mapping[str, Any], path: Path) -> Candidate:
    """Complete a candidate with its record in the archive."""
    for name in ('index', 'generation', 'arch', 'macs', 'params'):
        if record.get(name) != (expected := getattr(candidate, name)):
            where = f'evaluation {candidate.index}'
            raise RunError(_diverged(path, f'{where} has {name} {record.get(name)!r}, this search {str(expected)!r}'))
    return _with_metrics(candidate, record['metrics'])


def _diverged(path: Path, how: str) -> str:
    # A search is only repeatable with the same versions of what draws its random numbers
    return (
        f'archive {str(path)!r} does not fit this search although its configuration does: {how}; it may stem from '
        'other versions (see its first line) of numpy, pymoo or timm-mixpath, use those, choose another output, or '
        'delete it'
    )


def _versions(config: SearchConfig) -> dict[str, str]:
    versions = {'timm_mixpath': __version__, 'numpy': np.__version__}
    if config.algorithm == 'nsga2':
        import pymoo

        versions['pymoo'] = pymoo.__version__
    return versions


# ---- Outputs --------------------------------------------------------------------------------------------------------


def write_front_csv(result: SearchResult, path: str | os.PathLike) -> None:
    """Write the front as CSV, whole or not at all.

    Columns are `chosen` (1 or 0), `top1` and `error` in percent, `loss`, `macs`, `params`, `index` and `generation` of
    the evaluation, and `arch`; `latency_ms` behind `chosen` if it was measured.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    names = ('top1', 'error', 'loss', 'macs', 'params', 'index', 'generation', 'arch')
    latency = ('latency_ms',) if _has_latency(result) else ()
    writer.writerow(('chosen', *latency, *names))
    for candidate in result.front:
        row = (candidate.extra.get(name) for name in latency)
        writer.writerow((int(candidate is result.chosen), *row, *(getattr(candidate, name) for name in names)))
    write_text(path, text.getvalue())


def write_front_json(result: SearchResult, path: str | os.PathLike) -> None:
    """Write the front as JSON with all that is known of it, whole or not at all.

    `front` has an entry per candidate: what stands in the archive, the integer `vector` of the arch, its `error` in
    percent, and whether it is the `chosen` one. `hypervolume` is null where pymoo is not installed.
    """
    content = dict(
        space=result.space.name,
        max_paths=result.space.max_paths,
        config=result.config.to_dict(),
        fingerprint=result.fingerprint,
        num_evaluations=len(result.evaluations),
        hypervolume=_hypervolume(result),
        front=[
            dict(
                _record(c),
                vector=list(result.space.encode(c.arch)),
                error=c.error,
                chosen=c is result.chosen,
            )
            for c in result.front
        ],
    )
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def _hypervolume(result: SearchResult) -> float | None:
    try:
        return result.hypervolume()
    except ImportError:
        return None


def _has_latency(result: SearchResult) -> bool:
    return all('latency_ms' in c.extra for c in result.front)


def format_front(result: SearchResult) -> str:
    """Return the front as a table for the terminal, the chosen candidate marked with `*`."""
    latency = _has_latency(result)
    header = ('', 'top-1 (%)', 'error (%)', 'loss', 'MACs (M)', 'params (M)', *(['ms'] * latency), 'arch')
    rows = [
        (
            '*' if c is result.chosen else '',
            f'{c.top1:.2f}',
            f'{c.error:.2f}',
            f'{c.loss:.4f}',
            f'{c.macs / 1e6:.2f}',
            f'{c.params / 1e6:.3f}',
            *([f'{c.extra["latency_ms"]:.2f}'] if latency else []),
            str(c.arch),
        )
        for c in result.front
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    # Numbers to the right, text to the left
    return '\n'.join(
        '  '.join((*(cell.rjust(width) for cell, width in zip(row[:-1], widths)), row[-1])) for row in (header, *rows)
    )
