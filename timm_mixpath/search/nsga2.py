"""Who proposes the archs of a search: NSGA-II or chance."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ..spaces.arch import Arch
from ..utils.errors import UsageError
from .config import SearchConfig
from .pareto import crowding_distance
from .pool import NUM_MATINGS, ArchPool
from .result import Candidate, objective_values

__all__ = ['NSGA2Search', 'RandomSearch']


# How the operators of NSGA-II work: nine pairs of parents out of ten are crossed, and on average one gene per child is
# drawn anew, the customary rates for genes that are independent of each other.
_CROSSOVER_PROB = 0.9

_MUTATIONS_PER_CHILD = 1.0


def first_generation(pool: ArchPool, config: SearchConfig, near: Arch | None = None) -> list[Arch]:
    archs = pool.take_near(near, (config.population + 1) // 2) if near is not None else []
    archs += pool.take(config.population - len(archs))
    if not archs:
        limits = [f'{n}={v}' for n, v in asdict(config).items() if n[:4] in ('max_', 'min_') and v is not None]
        raise UsageError(f'no arch inside the limits was found ({", ".join(limits)}), widen them')
    return archs


class _Algorithm:
    """Who proposes archs, generation by generation.

    Args:
        pool: Archs to take.
        config: What to search for.
    """

    def __init__(self, pool: ArchPool, config: SearchConfig) -> None:
        self._pool = pool
        self._config = config
        self._generation = 0


class RandomSearch(_Algorithm):
    """Samples as the training of a supernet does by default (`sampling='paths'`), without repetition.

    Arguments as in `NSGA2Search`.
    """

    def ask(self) -> list[Arch]:
        """Return the archs of the next generation, none at the end of the search.

        Raises:
            UsageError: No arch is inside the limits.
        """
        generation, self._generation = self._generation, self._generation + 1
        if generation == 0:
            return first_generation(self._pool, self._config)
        return self._pool.take(self._config.offspring) if generation <= self._config.generations else []

    def tell(self, candidates: list[Candidate]) -> None:
        """Take the evaluated archs of the generation; chance learns nothing from them."""


class NSGA2Search(_Algorithm):
    """NSGA-II over categorical genes, with weights in the crowding distance.

    As in MoGA (arXiv 1908.01314) and FairNAS the weights say how much room each objective gets on the front. pymoo's
    own operators for integers move to nearby values, but no kernel subset is nearer to another than a third.

    Args:
        pool: Archs to take.
        config: What to search for.
    """

    def __init__(self, pool: ArchPool, config: SearchConfig) -> None:
        super().__init__(pool, config)
        self._algorithm: Any = None  # made for the first generation, whose archs are told without being asked for
        self._individuals: Any = None

    def ask(self) -> list[Arch]:
        """Return the archs of the next generation, none at the end of the search.

        Raises:
            UsageError: No arch is inside the limits.
        """
        from pymoo.core.population import Population

        generation, self._generation = self._generation, self._generation + 1
        if generation == 0:
            near = None if self._config.near in (None, 'none') else self._pool.space.arch(self._config.near)
            archs = first_generation(self._pool, self._config, near)
            # Told without having been asked for: pymoo's own initialisation would repair and sort out what is in order
            self._individuals = Population.new('X', self._encode(archs))
            self._algorithm = _make_nsga2(self._pool, self._config)
            return archs
        if generation > self._config.generations:
            return []
        individuals = self._algorithm.ask()
        if individuals is None:  # all children were known
            self._algorithm.termination.force_termination = False
            individuals = Population.new('X', np.empty((0, len(self._pool.sizes)), dtype=int))
        archs = [_decode(self._pool, individual) for individual in individuals]
        self._pool.taken.update(dict.fromkeys(archs))
        # Mating gives up where most children are known already; the number of evaluations stays what was asked for
        extra = self._pool.take(self._config.offspring - len(archs))
        if extra:
            individuals = Population.merge(individuals, Population.new('X', self._encode(extra)))
        self._individuals = individuals
        return archs + extra

    def tell(self, candidates: list[Candidate]) -> None:
        """Take the evaluated archs of the generation, in the order in which `ask` gave them."""
        if self._generation > self._config.generations:
            return  # nothing is asked any more
        self._individuals.set('F', objective_values(candidates, self._config.objective_names))
        self._algorithm.tell(infills=self._individuals)

    def _encode(self, archs: list[Arch]) -> np.ndarray:
        return np.array([self._pool.space.encode(arch) for arch in archs])


def _decode(pool: ArchPool, individual: Any) -> Arch:
    return pool.space.decode([int(v) for v in individual.X])


def _make_nsga2(pool: ArchPool, config: SearchConfig) -> Any:
    """Make pymoo's algorithm with this package's operators."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
    from pymoo.operators.survival.rank_and_crowding.metrics import CrowdingDiversity

    sizes = np.array(pool.sizes)
    num_open = max(1, np.count_nonzero(sizes > 1))  # a gene of one value takes no mutation

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
            seen = {_decode(pool, individual) for other in others for individual in other}
            keep: list[int] = []
            for index, individual in enumerate(pop):
                arch = _decode(pool, individual)
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

    algorithm = NSGA2(
        pop_size=config.population,
        n_offsprings=config.offspring,
        crossover=UniformCrossover(prob=_CROSSOVER_PROB),
        mutation=RedrawGenes(),
        repair=IntoLimits(),
        survival=RankAndCrowding(crowding_func=WeightedCrowding()),
        eliminate_duplicates=NeverTwice(),
        seed=config.seed,
    )
    algorithm.mating.n_max_iterations = NUM_MATINGS
    problem = Problem(n_var=len(sizes), n_obj=len(config.objectives), xl=0, xu=sizes - 1, vtype=int)
    algorithm.setup(problem, termination=NoTermination())
    return algorithm
