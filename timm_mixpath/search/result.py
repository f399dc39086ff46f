"""Evaluated archs, the result of a search, and their records in an archive."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..spaces.arch import Arch
from ..spaces.space import SearchSpace
from ..utils.errors import RunError, UsageError
from .archive import plain_metrics
from .config import SearchConfig
from .pareto import pareto_front, require_pymoo

__all__ = [
    'Candidate',
    'SearchResult',
    'has_latency',
    'hypervolume',
    'is_diverged',
    'is_predicted',
    'make_front',
    'make_record',
    'objective_values',
    'restore',
    'with_metrics',
]


@dataclass(frozen=True)
class Candidate:
    """An evaluated arch.

    Attributes:
        arch: The arch.
        top1: Top-1 accuracy on the search split, in percent.
        loss: Loss on the search split, NaN if it was not finite.
        macs: Multiply-adds of one image.
        params: Number of parameters.
        latency: Predicted latency of a batch in milliseconds, None without a latency table.
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
    latency: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Top-1 error on the search split, in percent."""
        return round(100.0 - self.top1, 10)  # 6.8, not 6.799999999999997


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        space: The space that was searched.
        config: The configuration of the search.
        fingerprint: What the scores depend on, as given to `search`.
        evaluations: All candidates in the order of evaluation.
        front: Those that no other candidate dominates in the objectives, by latency if it is one, else by MACs.
        bounds: Smallest and largest value of each objective in the space, as `objective_values` has it: 0 and 100 for
            the error, 0 and 1 for the loss.
    """

    space: SearchSpace
    config: SearchConfig
    fingerprint: dict[str, Any]
    evaluations: list[Candidate]
    front: list[Candidate]
    bounds: dict[str, tuple[float, float]]

    @property
    def chosen(self) -> Candidate:
        """The candidate of lowest error, or loss if that is the objective; of equal ones that of the lowest costs.

        Costs are compared one by one: the latency if it is known, MACs, then parameters.
        """
        score = self.config.score
        return min(self.front, key=lambda c: (_value(c, score), c.latency or 0, c.macs, c.params, c.index))

    def hypervolume(self, ref: Sequence[float] | None = None) -> float:
        """Return the hypervolume of the front, larger is better.

        Objectives are normalised first, so that 0 is the best and 1 the worst that the space can have: the error is
        divided by 100 percent, a loss l is l / (1 + l), the others are mapped from the space's own exact bounds.
        Volumes of searches in the same space with the same objectives can be compared.

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

        values = objective_values(self.front, names)  # [num_candidates, num_objectives]
        low = np.array([self.bounds[name][0] for name in names])
        high = np.array([self.bounds[name][1] for name in names])
        # An objective in which all archs of the space are equal has no span
        span = np.where(high > low, high - low, 1.0)
        return float(HV(ref_point=np.array(ref))((values - low) / span))


def objective_values(candidates: Sequence[Candidate], names: Sequence[str]) -> np.ndarray:
    """Objectives of candidates, [num_candidates, num_objectives].

    A loss l is l / (1 + l), which orders archs alike and is between 0 and 1 for all of them: 1 where it was not finite.

    Raises:
        UsageError: A loss is an objective and negative.
    """
    return np.array([[_value(c, name) for name in names] for c in candidates], dtype=float).reshape(-1, len(names))


def _value(candidate: Candidate, name: str) -> float:
    value = getattr(candidate, name)
    if name != 'loss':
        return value
    if value < 0:
        raise UsageError(f'the loss of arch {candidate.arch} is {value}: to be an objective it must not be negative')
    return value / (1 + value) if math.isfinite(value) else 1.0


def make_front(evaluations: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    # An arch whose loss was not finite is no trade-off, however little it costs
    evaluations = [c for c in evaluations if 'loss' not in names or math.isfinite(c.loss)]
    front = [evaluations[i] for i in pareto_front(objective_values(evaluations, names))]
    first = 'latency' if 'latency' in names else 'macs'
    return sorted(front, key=lambda c: (getattr(c, first), c.macs, c.params, c.error, c.index))


def with_metrics(candidate: Candidate, metrics: Mapping[str, Any]) -> Candidate:
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
        latency=candidate.latency,
        extra=values,
    )


def make_record(candidate: Candidate) -> dict[str, Any]:
    loss = candidate.loss if math.isfinite(candidate.loss) else None
    latency = {} if candidate.latency is None else dict(latency=candidate.latency)
    return dict(
        index=candidate.index,
        generation=candidate.generation,
        arch=str(candidate.arch),
        macs=candidate.macs,
        params=candidate.params,
        **latency,
        metrics={'top1': candidate.top1, 'loss': loss, **candidate.extra},
    )


def restore(candidate: Candidate, record: Mapping[str, Any], path: Path) -> Candidate:
    """Complete a candidate with its record in the archive."""
    for name in ('index', 'generation', 'arch', 'macs', 'params', 'latency'):
        if record.get(name) != (expected := getattr(candidate, name)):
            where = f'evaluation {candidate.index}'
            raise RunError(is_diverged(path, f'{where} has {name} {record.get(name)!r}, this search {str(expected)!r}'))
    return with_metrics(candidate, record['metrics'])


def is_diverged(path: Path, how: str) -> str:
    # A search is only repeatable with the same versions of what draws its random numbers
    return (
        f'archive {str(path)!r} does not fit this search although its configuration does: {how}; it may stem from '
        'other versions (see its first line) of numpy, pymoo or timm-mixpath, use those, choose another output, or '
        'delete it'
    )


def hypervolume(result: SearchResult) -> float | None:
    try:
        return result.hypervolume()
    except ImportError:
        return None


def has_latency(result: SearchResult) -> bool:
    """Whether the latency of the front was measured."""
    return all('latency_ms' in c.extra for c in result.front)


def is_predicted(result: SearchResult) -> bool:
    """Whether the latency of the front is known from a table."""
    return all(c.latency is not None for c in result.front)
