"""What to search for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from ..utils.errors import UsageError
from ..utils.numbers import as_int, as_whole

__all__ = ['LIMITED', 'SearchConfig']


ALGORITHMS = ('nsga2', 'random')

OBJECTIVES = ('error', 'loss', 'macs', 'params', 'latency')

# How good an arch is, by the supernet's weights: one of them is an objective
SCORES = ('error', 'loss')

# What can be limited: two counts, and a time in milliseconds
LIMITED = ('macs', 'params', 'latency')


@dataclass(frozen=True)
class SearchConfig:
    """What to search for and how long.

    A search makes `num_evaluations = population + generations * offspring` evaluations, all of different archs. It
    makes fewer only if it finds no further arch inside the limits.

    Attributes:
        algorithm: 'nsga2' or 'random'.
        population: Archs of generation 0, drawn at random; the size of NSGA-II's population ever after.
        near: Text of an arch near which NSGA-II draws every other arch of generation 0, `'none'` for none: what a
            supernet inherited from a pretrained network it has most of where little is changed. None is for
            `search_checkpoint` to decide, which takes the backbone's own arch where there is one.
        offspring: Archs evaluated in each generation after that.
        generations: Generations after generation 0.
        objectives: What to minimise, {name: weight} or (name, weight) pairs: 'loss', by which archs of equal cost rank
            better (recipes/ranking/README.md), or 'error', the top-1 error, and any of 'macs', 'params' and 'latency',
            which needs a latency table. A weight says how much closeness in this objective counts when NSGA-II thins
            out a crowded front; it does not change which arch dominates which. Only the proportions of the weights
            matter.
        max_macs: Largest MACs an arch may have.
        min_macs: Smallest MACs an arch may have.
        max_params: Largest number of parameters an arch may have.
        min_params: Smallest number of parameters an arch may have.
        max_latency: Largest latency an arch may have, in milliseconds per batch of the latency table.
        min_latency: Smallest latency an arch may have, in milliseconds.
        seed: Seed of everything that is drawn.

    Raises:
        UsageError: A value is out of range, or two contradict each other.
    """

    algorithm: str = 'nsga2'
    population: int = 40
    offspring: int = 20
    generations: int = 20
    objectives: Mapping[str, float] | Sequence[tuple[str, float]] = (('loss', 1.0), ('macs', 1.0), ('params', 1.0))
    max_macs: int | None = None
    min_macs: int | None = None
    max_params: int | None = None
    min_params: int | None = None
    max_latency: float | None = None
    min_latency: float | None = None
    seed: int = 0
    near: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f'unknown algorithm {self.algorithm!r}, known are {", ".join(ALGORITHMS)}')
        if self.near is not None and self.algorithm != 'nsga2':
            raise UsageError(
                f'near={self.near!r} says where nsga2 begins, and {self.algorithm} draws all archs alike; leave it out'
            )
        for name, least in (('population', 1), ('offspring', 1), ('generations', 0), ('seed', 0)):
            value = self._set_number(name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f'{name}={value!r} is not an integer of at least {least}')
        for metric in LIMITED:
            for name in (f'max_{metric}', f'min_{metric}'):
                value = self._set_number(name, whole=metric != 'latency')
                types, what = ((int, float), 'a number') if metric == 'latency' else (int, 'an integer')
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, types) or not 0 <= value < math.inf:
                    raise UsageError(f'{name}={value!r} is not {what} of at least 0')
            low, high = self.limits(metric)
            if low > high:
                raise UsageError(f'min_{metric}={low} is above max_{metric}={high}, no arch can satisfy both')

        # One order and one type, so that equal configurations compare and are saved as equal
        try:
            pairs = list(self.objectives.items() if isinstance(self.objectives, Mapping) else self.objectives)
            weights = {name: float(weight) for name, weight in pairs}
        except (TypeError, ValueError):
            raise UsageError(f'objectives={self.objectives!r} are not pairs of a name and a weight') from None
        for name, weight in weights.items():
            if name not in OBJECTIVES:
                raise UsageError(f'unknown objective {name!r}, known are {", ".join(OBJECTIVES)}')
            if not 0 < weight < math.inf:
                raise UsageError(f'weight {weight} of objective {name!r} must be positive, leave it out instead')
        if sum(name in weights for name in SCORES) != 1 or len(weights) < len(pairs):
            raise UsageError(
                f"objectives={self.objectives!r} must name exactly one of 'error' and 'loss', and each objective once"
            )
        ordered = tuple((name, weights[name]) for name in OBJECTIVES if name in weights)
        object.__setattr__(self, 'objectives', ordered)

    def _set_number(self, name: str, whole: bool = True) -> Any:
        """Make a field a number of Python, where it is one of NumPy or torch, or a whole one such as 15e6."""
        value = as_int(getattr(self, name))
        if isinstance(value, Real) and not isinstance(value, (int, float)):
            value = float(value)
        if whole:
            value = as_whole(value)
        object.__setattr__(self, name, value)
        return value

    @property
    def num_evaluations(self) -> int:
        """Evaluations that the search makes, unless there are fewer archs inside the limits."""
        return self.population + self.generations * self.offspring

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Names of the objectives, in the order of `OBJECTIVES`."""
        return tuple(name for name, _ in self.objectives)

    @property
    def score(self) -> str:
        """What the supernet ranks archs by, 'error' or 'loss'; less is better."""
        return next(name for name in SCORES if name in self.objective_names)

    def limits(self, metric: str) -> tuple[float, float]:
        """Smallest and largest value that an arch may have in a metric of `LIMITED`, infinite without a limit."""
        low, high = getattr(self, f'min_{metric}'), getattr(self, f'max_{metric}')
        return (-math.inf if low is None else low), (math.inf if high is None else high)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `SearchConfig(**config.to_dict()) == config`."""
        content = dict(asdict(self), objectives=dict(self.objectives))
        # Archives of searches without them know nothing of them
        for name in ('max_latency', 'min_latency', 'near'):
            if content[name] is None:
                del content[name]
        return content

    @property
    def needs_latency(self) -> bool:
        """Whether the latency of archs has to be known."""
        return 'latency' in self.objective_names or self.max_latency is not None or self.min_latency is not None
