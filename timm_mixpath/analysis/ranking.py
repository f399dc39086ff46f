"""Does a supernet rank archs right? Its scores compared with the accuracies that archs reach on their own."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..search.archive import Archive, evaluate_all, plain_metrics
from ..utils.distributed import Ranks
from ..utils.errors import RunError, UsageError
from ..version import __version__
from .accuracy_table import MIN_ARCHS, AccuracyTable
from .rank_statistics import (
    BandTau,
    Estimate,
    RankStatistics,
    SeedAgreement,
    partial_tau,
    rank_correlation,
    seed_agreement,
    tau_at_equal_cost,
    tau_difference,
)

__all__ = ['RankConfig', 'RankResult', 'RankedArch', 'evaluate_table', 'summarize']


SCORES = ('top1', 'loss')

# Costs that an order of archs is compared with
YARDSTICKS = ('macs', 'params')

# The attributes of `RankedArch` that `evaluate` gives
_METRICS = tuple(f'{name}{suffix}' for suffix in ('', '_recalibrated') for name in SCORES)


@dataclass(frozen=True)
class RankConfig:
    """What to rank and what to report.

    Attributes:
        num_archs: Archs to draw from the table, all of it if None.
        seed: Seed of the draw and of the bootstrap.
        score: What the supernet ranks archs by: 'top1', or 'loss', of which less is better.
        top_k: Numbers k to report the overlap of the k best archs for; those that are not below the number of archs
            are left out.
        num_resamples: Bootstrap resamples behind an interval.
        level: Share of the resamples inside an interval.
        band: A cost, 'macs' or 'params', and the share up to which two costs count as equal, for Kendall's tau over
            the pairs of archs of equal cost; none if None.

    Raises:
        UsageError: A value is out of range.
    """

    num_archs: int | None = None
    seed: int = 0
    score: str = 'top1'
    top_k: Sequence[int] = (10, 50)
    num_resamples: int = 1000
    level: float = 0.95
    band: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        for name, least in (('num_archs', MIN_ARCHS), ('seed', 0), ('num_resamples', 1)):
            value = getattr(self, name)
            if value is None and name == 'num_archs':
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f'{name}={value!r} is not an integer of at least {least}')
        if self.score not in SCORES:
            raise UsageError(f'unknown score {self.score!r}, known are {", ".join(SCORES)}')
        for k in self.top_k:
            if isinstance(k, bool) or not isinstance(k, int) or k < 1:
                raise UsageError(f'top_k={k!r} is not an integer of at least 1')
        if not 0 < self.level < 1:
            raise UsageError(f'level={self.level!r} of the intervals is not a share between 0 and 1')
        if self.band is not None:
            name, share = self.band
            if name not in YARDSTICKS:
                raise UsageError(f'unknown cost {name!r} of a band, known are {", ".join(YARDSTICKS)}')
            if not 0 <= share < 1:
                raise UsageError(f'band {share!r} is not a share between 0 and 1, such as 0.03 or 3%')
        object.__setattr__(self, 'top_k', tuple(sorted(set(self.top_k))))


@dataclass(frozen=True)
class RankedArch:
    """An arch of the table with its scores in the supernet.

    Attributes:
        arch: The arch.
        accuracy: Its stand-alone accuracy, in percent.
        top1: Top-1 accuracy with the batch norm statistics of the training, in percent.
        loss: Loss with them, NaN if it was not finite.
        top1_recalibrated: Top-1 accuracy with recalibrated batch norms, None if that was switched off.
        loss_recalibrated: Loss with them.
        macs: Multiply-adds of one image, None if not known.
        params: Number of parameters, None if not known.
        index: Place in the order of evaluation, from 0.
    """

    arch: str
    accuracy: float
    top1: float = math.nan
    loss: float = math.nan
    top1_recalibrated: float | None = None
    loss_recalibrated: float | None = None
    macs: int | None = None
    params: int | None = None
    index: int = 0


def evaluate_table(
    chosen: Sequence[tuple[str, float]],
    evaluate: Callable[[str], Mapping[str, Any]],
    config: RankConfig,
    *,
    archive_path: str | os.PathLike | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Callable[[RankedArch, int], None] | None = None,
    ranks: Ranks | None = None,
) -> list[RankedArch]:
    """Score archs with the weights of a supernet, or go on with that where it was cut off.

    Args:
        chosen: Archs and their stand-alone accuracies, see `AccuracyTable.choose`.
        evaluate: Returns `top1` (percent) and `loss` of an arch, and both with the suffix `_recalibrated` if batch
            norms are recalibrated. Other metrics are left out.
        config: Its seed is part of the archive.
        archive_path: Archive to keep the scores in, JSON lines; nothing is kept if None. One of fewer archs can be
            gone on with.
        fingerprint: All that the scores depend on (checkpoint, data, table, ...), JSON-ready.
        progress: Called in rank 0 after every new evaluation, with the arch and the number of archs.
        ranks: Processes that share the evaluations, this one alone if None; see `search`.

    Returns:
        The scored archs in the order of `chosen`, the same in all ranks.

    Raises:
        UsageError: The archive is of another ranking, or the metrics are not what they should be.
        RunError: The archive does not hold what this ranking would have evaluated, or another rank failed.
    """
    ranks = ranks or Ranks(0, 1)
    archive = None
    if archive_path is not None:
        archive = Archive(
            archive_path,
            'ranking',
            config=dict(seed=config.seed, num_archs=len(chosen)),
            fingerprint=fingerprint or {},
            versions={'timm_mixpath': __version__, 'torch': torch.__version__},
            grows='num_archs',
        )
    todo = [RankedArch(arch, accuracy, index=index) for index, (arch, accuracy) in enumerate(chosen)]

    def keep(scored: RankedArch) -> None:
        if archive is not None:
            archive.append(_record(scored))
        if progress is not None:
            progress(scored, len(todo))

    try:
        records = ranks.from_first(archive.open) if archive is not None else []
        if len(records) > len(todo):
            raise RunError(_diverged(archive, f'it holds {len(records)} evaluations, this ranking {len(todo)}'))
        return evaluate_all(
            todo,
            evaluate,
            records=records,
            restore=lambda ranked, record: _restore(ranked, record, archive),
            complete=_with_metrics,
            keep=keep,
            ranks=ranks,
        )
    finally:
        if archive is not None:
            archive.close()


def _with_metrics(ranked: RankedArch, metrics: Mapping[str, Any]) -> RankedArch:
    values = plain_metrics(metrics, ranked.arch)
    values = {name: values[name] for name in _METRICS if name in values}
    return replace(ranked, **{name: math.nan if value is None else float(value) for name, value in values.items()})


def _metrics(ranked: RankedArch) -> dict[str, float | None]:
    """Scores as JSON has them, without NaN and without those that were not measured."""
    values = {name: getattr(ranked, name) for name in _METRICS}
    return {name: v if math.isfinite(v) else None for name, v in values.items() if v is not None}


def _record(ranked: RankedArch) -> dict[str, Any]:
    return dict(index=ranked.index, arch=str(ranked.arch), accuracy=ranked.accuracy, metrics=_metrics(ranked))


def _restore(ranked: RankedArch, record: Mapping[str, Any], archive: Archive) -> RankedArch:
    for name in ('index', 'arch', 'accuracy'):
        if record.get(name) != (expected := getattr(ranked, name)):
            where = f'evaluation {ranked.index}'
            raise RunError(
                _diverged(archive, f'{where} has {name} {record.get(name)!r}, this ranking {str(expected)!r}')
            )
    return _with_metrics(ranked, record['metrics'])


def _diverged(archive: Archive, how: str) -> str:
    return (
        f'archive {str(archive.path)!r} does not fit this ranking although its configuration does: {how}; it may stem '
        'from another version of timm-mixpath (see its first line), use that, choose another output, or delete it'
    )


@dataclass(frozen=True)
class RankResult:
    """How well a supernet ranks the archs of a table.

    Attributes:
        table: The table.
        config: What was asked for.
        fingerprint: What the scores depend on.
        archs: The scored archs in the order of evaluation.
        statistics: {what ranks: {part: statistics}}. 'trained' and 'recalibrated' are the supernet with the batch norm
            statistics of the training and with recalibrated ones. 'macs' and 'params' are the yardsticks, larger is
            taken for better. Parts are 'all' archs and the 'top_half' of those whose stand-alone accuracy is not below
            the median.
        tau_gains: {'trained' or 'recalibrated': {yardstick: how much higher Kendall's tau of the supernet is}}, over
            all archs.
        partial_taus: {'trained' or 'recalibrated': {yardstick: Kendall's partial tau given it}}, over all archs.
        equal_cost: {what ranks: tau over the pairs of archs of equal cost}, empty without a band.
        seeds: {'all': how well the seeds of the table agree, 'equal_cost': the same over the pairs of equal cost},
            without the latter without a band, empty if the table has one seed.
    """

    table: AccuracyTable
    config: RankConfig
    fingerprint: dict[str, Any]
    archs: list[RankedArch]
    statistics: dict[str, dict[str, RankStatistics]] = field(default_factory=dict)
    tau_gains: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    partial_taus: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    equal_cost: dict[str, BandTau] = field(default_factory=dict)
    seeds: dict[str, SeedAgreement] = field(default_factory=dict)

    def scores(self, name: str) -> list[float]:
        """Return the scores of the archs by an entry of `statistics`, more is better."""
        if name in YARDSTICKS:
            return [float(getattr(r, name)) for r in self.archs]
        values = [getattr(r, self.score_name(name)) for r in self.archs]
        return [-v for v in values] if self.config.score == 'loss' else values

    def score_name(self, name: str) -> str:
        """Return the attribute of `RankedArch` that holds the score of the supernet, 'top1_recalibrated' for one."""
        return self.config.score + ('_recalibrated' if name == 'recalibrated' else '')


def summarize(
    table: AccuracyTable, config: RankConfig, fingerprint: Mapping[str, Any], archs: Sequence[RankedArch]
) -> RankResult:
    """Compute all statistics of scored archs.

    Args:
        table: Table that the archs are from.
        config: What to report.
        fingerprint: What the scores depend on.
        archs: Scored archs.

    Raises:
        ImportError: scipy is not installed.
    """
    result = RankResult(table, config, dict(fingerprint), list(archs))
    bootstrap = dict(num_resamples=config.num_resamples, level=config.level, seed=config.seed)
    accuracies = np.array([r.accuracy for r in archs])
    parts = {'all': np.full(len(archs), True), 'top_half': accuracies >= np.median(accuracies)}
    supernet = ['trained', *(['recalibrated'] if all(r.top1_recalibrated is not None for r in archs) else [])]
    yardsticks = [name for name in YARDSTICKS if all(getattr(r, name) is not None for r in archs)]
    for name in (*supernet, *yardsticks):
        scores = np.array(result.scores(name))
        result.statistics[name] = {
            part: rank_correlation(accuracies[inside], scores[inside], top_k=config.top_k, **bootstrap)
            for part, inside in parts.items()
        }
    if config.band is not None:
        cost, tolerance = config.band
        if cost not in yardsticks:
            raise UsageError(f'the {cost} of the archs are not known, so there is no band of them')
        costs = result.scores(cost)
        for name in (*supernet, *yardsticks):
            result.equal_cost[name] = tau_at_equal_cost(
                accuracies, result.scores(name), costs, tolerance=tolerance, **bootstrap
            )
    if by_seed := table.series([r.arch for r in archs]):
        result.seeds['all'] = seed_agreement(by_seed)
        if config.band is not None:
            result.seeds['equal_cost'] = seed_agreement(by_seed, costs, tolerance=tolerance)
    for name in supernet:
        result.partial_taus[name] = {
            yardstick: partial_tau(
                result.statistics[name]['all'],
                result.statistics[yardstick]['all'],
                rank_correlation(result.scores(yardstick), result.scores(name), top_k=(), **bootstrap),
                level=config.level,
            )
            for yardstick in yardsticks
        }
        result.tau_gains[name] = {
            yardstick: tau_difference(
                result.statistics[name]['all'], result.statistics[yardstick]['all'], level=config.level
            )
            for yardstick in yardsticks
        }
    return result
