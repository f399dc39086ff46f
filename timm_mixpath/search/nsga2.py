"""Who proposes the archs of a search: NSGA-II or chance."""

from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import numpy as np

from ..spaces.arch import Arch
from ..utils.errors import UsageError
from .config import SearchConfig
from .pareto import crowding_distance
from .pool import NUM_MATINGS, ArchPool
from .result import Candidate, objective_values

__all__ = ['propose_nsga2', 'propose_random']


# How the operators of NSGA-II work: nine pairs of parents out of ten are crossed, and on average one gene per child is
# drawn anew, the customary rates for genes that are independent of each other.
_CROSSOVER_PROB = 0.9

_MUTATIONS_PER_CHILD = 1.0

_Proposals = Generator[list[Arch], list[Candidate] | None, None]


def first_generation(pool: ArchPool, config: SearchConfig) -> list[Arch]:
    archs = pool.take(config.population)
    if not archs:
        limits = [f'{n}={v}' for n, v in asdict(config).items() if n[:4] in ('max_', 'min_') and v is not None]
        raise UsageError(f'no arch inside the limits was found ({", ".join(limits)}), widen them')
    return archs


def propose_random(pool: ArchPool, config: SearchConfig) -> _Proposals:
    """Sample as supernet training does, without repetition."""
    yield first_generation(pool, config)
    for _ in range(config.generations):
        yield pool.take(config.offspring)


def propose_nsga2(pool: ArchPool, config: SearchConfig) -> _Proposals:
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

    first = first_generation(pool, config)
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
    algorithm.mating.n_max_iterations = NUM_MATINGS
    problem = Problem(n_var=len(sizes), n_obj=len(config.objectives), xl=0, xu=sizes - 1, vtype=int)
    algorithm.setup(problem, termination=NoTermination())
    for _ in range(config.generations):
        individuals.set('F', objective_values(candidates, config.objective_names))
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
