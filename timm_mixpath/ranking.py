"""Does a supernet rank archs right? Its scores compared with the accuracies that archs reach on their own.

Statistics come with percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13) over the archs: how much they
would change with other archs of the same table. The noise of training the supernet, and the archs, again is not in
them.

This module needs `pip install 'timm-mixpath[rank]'`, but not to be imported.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .accuracy_table import MIN_ARCHS, AccuracyTable
from .archive import Archive, plain_metrics
from .distributed import Ranks
from .errors import RunError, UsageError
from .files import write_text
from .version import __version__

__all__ = [
    'Estimate',
    'RankConfig',
    'RankResult',
    'RankStatistics',
    'RankedArch',
    'evaluate_table',
    'format_ranking',
    'rank_correlation',
    'require_scipy',
    'summarize',
    'tau_difference',
    'write_ranking_csv',
    'write_ranking_json',
]

SCORES = ('top1', 'loss')
# The attributes of `RankedArch` that `evaluate` gives
_METRICS = tuple(f'{name}{suffix}' for suffix in ('', '_recalibrated') for name in SCORES)

# What ranks the archs, and how it is called in a table
LABELS = {
    'trained': 'supernet, BN as trained',
    'recalibrated': 'supernet, BN recalibrated',
    'macs': 'more MACs = better',
    'params': 'more params = better',
}
PARTS = {'all': 'all archs', 'top_half': 'top half by stand-alone accuracy'}

# Bounds the memory of tables of ten thousand archs to a few hundred MB
_RESAMPLES_AT_ONCE = 250
_ROWS_AT_ONCE = 500


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

    Raises:
        UsageError: A value is out of range.
    """

    num_archs: int | None = None
    seed: int = 0
    score: str = 'top1'
    top_k: Sequence[int] = (10, 50)
    num_resamples: int = 1000
    level: float = 0.95

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
        object.__setattr__(self, 'top_k', tuple(sorted(set(self.top_k))))


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap interval; NaN where it is not defined.

    Attributes:
        value: The statistic of all archs.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return a JSON-ready dict, with None for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    def text(self, digits: int) -> str:
        """Return `value [low, high]` with so many decimals."""
        if not math.isfinite(self.value):
            return 'undefined'
        return f'{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]'


@dataclass(frozen=True)
class RankStatistics:
    """How well scores rank archs.

    Attributes:
        n: Number of archs.
        kendall_tau: Kendall's tau-b. NaN if all scores or all accuracies are equal.
        spearman_rho: Spearman's rho. NaN if all scores or all accuracies are equal.
        top_k_overlap: For each k, the share of the k best archs by accuracy that are among the k best by score.
        regret: Accuracy of the best arch less that of the arch with the best score, in percentage points.
        tau_samples: Kendall's tau-b of each bootstrap resample, [num_resamples].
    """

    n: int
    kendall_tau: Estimate
    spearman_rho: Estimate
    top_k_overlap: dict[int, Estimate]
    regret: Estimate
    tau_samples: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, without the samples."""
        return dict(
            n=self.n,
            kendall_tau=self.kendall_tau.to_dict(),
            spearman_rho=self.spearman_rho.to_dict(),
            top_k_overlap={str(k): estimate.to_dict() for k, estimate in self.top_k_overlap.items()},
            regret=self.regret.to_dict(),
        )


def require_scipy() -> None:
    """Check that scipy is installed.

    Raises:
        ImportError: It is not.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as e:
        raise ImportError(f"rank correlations need scipy ({e}): pip install 'timm-mixpath[rank]'") from e


# ---- Statistics -----------------------------------------------------------------------------------------------------


def rank_correlation(
    accuracies: Sequence[float],
    scores: Sequence[float],
    *,
    top_k: Sequence[int] = (10, 50),
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RankStatistics:
    """Return how well scores rank archs, with percentile bootstrap intervals over the archs.

    Ties count as ties in both correlations. In the overlap and the regret they are broken at random, and the expected
    value is reported: where 3 archs share 2 places among the k best, each is there with probability 2/3, so a supernet
    that scores all archs equal has the overlap and the regret of a random order. Ties of the accuracies and of the
    scores are broken independently of each other.

    An arch that a resample holds several times is tied with itself. Where its copies are tied with no other arch in
    either series, the overlap counts as many of them as both tops hold, so a score that ranks right has an overlap of
    1 in every resample. Resamples in which a correlation is not defined are left out of its interval.

    Args:
        accuracies: Stand-alone accuracies of the archs, in percent.
        scores: Scores of the archs, more is better; scores that are not a number come last.
        top_k: Numbers k to report the overlap for; those that are not below the number of archs are left out.
        num_resamples: Bootstrap resamples.
        level: Share of the resamples inside the intervals.
        seed: Seed of the resamples. Calls of as many archs and the same seed draw the same.

    Raises:
        ImportError: scipy is not installed.
        ValueError: There are not as many scores as accuracies, fewer than 2, or an accuracy is not finite.
    """
    require_scipy()
    from scipy import stats

    truth, places, places_by_score = _check_series(accuracies, scores)
    n = len(truth)
    top_k = [k for k in top_k if k < n]
    pairs = _BootstrapPairs(places)
    resampled: dict[Any, list[np.ndarray]] = {name: [] for name in ('tau', 'rho', 'regret', *top_k)}
    for weights in _resamples(n, num_resamples, seed):
        resampled['tau'].append(pairs.tau(places_by_score, weights))
        resampled['rho'].append(_spearman(places, places_by_score, weights))
        resampled['regret'].append(_regret(truth, places_by_score, weights))
        for k in top_k:
            resampled[k].append(_overlap(places, places_by_score, weights, k))
    samples = {name: np.concatenate(values) for name, values in resampled.items()}

    tau = rho = math.nan
    if places.max() > 0 and places_by_score.max() > 0:
        tau = float(stats.kendalltau(places, places_by_score)[0])
        rho = float(stats.spearmanr(places, places_by_score)[0])
    once = np.ones((1, n))
    return RankStatistics(
        n=n,
        kendall_tau=_estimate(tau, samples['tau'], level),
        spearman_rho=_estimate(rho, samples['rho'], level),
        top_k_overlap={
            k: _estimate(float(_overlap(places, places_by_score, once, k)[0]), samples[k], level) for k in top_k
        },
        regret=_estimate(float(_regret(truth, places_by_score, once)[0]), samples['regret'], level),
        tau_samples=samples['tau'],
    )


def tau_difference(first: RankStatistics, second: RankStatistics, *, level: float = 0.95) -> Estimate:
    """Return by how much one Kendall's tau is above another of the same archs.

    Both are taken from the same resamples, so the interval is narrower than those of the two on their own suggest.

    Args:
        first: Statistics of scores of the archs.
        second: Statistics of other scores of the same archs, with the same seed and number of resamples.
        level: Share of the resamples inside the interval.

    Raises:
        ValueError: They are not of as many archs and resamples.
    """
    if (first.n, first.tau_samples.shape) != (second.n, second.tau_samples.shape):
        raise ValueError('a difference needs the same archs and resamples on both sides')
    value = first.kendall_tau.value - second.kendall_tau.value
    return _estimate(value, first.tau_samples - second.tau_samples, level)


def _check_series(accuracies: Sequence[float], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the accuracies, and the places of archs by accuracy and by score, from 0 for the worst, equal for ties."""
    truth, values = np.asarray(accuracies, dtype=float), np.asarray(scores, dtype=float)
    if truth.ndim != 1 or truth.shape != values.shape or len(truth) < 2:
        raise ValueError(f'{truth.shape} accuracies and {values.shape} scores are not one each of two archs or more')
    if not np.isfinite(truth).all():
        raise ValueError('an accuracy is not finite')
    values = np.where(np.isnan(values), -np.inf, values)  # the loss of a network that overflows
    return truth, *(np.unique(v, return_inverse=True)[1] for v in (truth, values))


def _resamples(n: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each arch is in each resample, [num_resamples, n], a part at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=count).astype(float)


def _estimate(value: float, samples: np.ndarray, level: float) -> Estimate:
    samples = samples[np.isfinite(samples)]
    if not len(samples) or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def _tie_weights(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How many archs of a resample are at each place, [num_resamples, num_places]."""
    order = np.argsort(places, kind='stable')
    starts = np.searchsorted(places[order], np.arange(places.max() + 1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


class _BootstrapPairs:
    """Kendall's tau-b of many resamples.

    An arch that is w times in a resample makes w * v pairs with one that is there v times, and ties with itself. So
    concordant less discordant pairs are w' S w, for S the signs of all pairs of the table: one matrix product for all
    resamples, instead of an O(n log n) count for each.

    Args:
        places: Places of the archs by accuracy, [n].
    """

    def __init__(self, places: np.ndarray) -> None:
        self.places = places

    def tau(self, places_by_score: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return tau-b of each resample, NaN where it is not defined.

        Args:
            places_by_score: Places of the archs by score, [n].
            weights: How often each arch is in each resample, [num_resamples, n].
        """
        x, y = self.places, places_by_score
        total = weights.sum(axis=1)  # [num_resamples]
        single = weights.astype(np.float32)  # exact: what is summed up is a whole number of at most n
        balance = np.zeros(len(weights))  # both orders of a pair are counted, here and below
        for start in range(0, len(x), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            signs = np.sign(x[rows, None] - x) * np.sign(y[rows, None] - y)  # [rows, n]
            balance += ((single @ signs.T.astype(np.float32)) * weights[:, rows]).sum(axis=1)
        untied = [total**2 - (_tie_weights(places, weights) ** 2).sum(axis=1) for places in (x, y)]
        with np.errstate(invalid='ignore'):
            return balance / np.sqrt(untied[0] * untied[1])


def _spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rho of each resample: the correlation of ranks, of which ties share the mean."""
    total = weights.sum(axis=1, keepdims=True)
    centred = []
    for places in (x, y):
        ties = _tie_weights(places, weights)
        ranks = (np.cumsum(ties, axis=1) - ties / 2)[:, places]  # [num_resamples, n], up to a constant
        centred.append(ranks - total / 2)
    covariance, *variances = ((weights * a * b).sum(axis=1) for a, b in (centred, centred[:1] * 2, centred[1:] * 2))
    defined = (variances[0] > 0) & (variances[1] > 0)
    return np.divide(covariance, np.sqrt(variances[0] * variances[1]), out=np.full(len(weights), np.nan), where=defined)


def _in_top(places: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Expected copies of each arch among the k best of a resample if ties are broken at random, [num_resamples, n].

    Returns:
        Them, and whether the copies are tied with no other arch, so that their number is certain.
    """
    ties = _tie_weights(places, weights)
    better = weights.sum(axis=1, keepdims=True) - np.cumsum(ties, axis=1)
    free = np.clip(k - better, 0, ties)[:, places]
    ties = ties[:, places]
    return np.divide(weights * free, ties, out=np.zeros_like(ties), where=ties > 0), ties == weights


def _overlap(x: np.ndarray, y: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """Share of the k best by x that are among the k best by y, for each resample.

    Ties among several archs are broken independently for x and y. Copies of one arch are not told apart where they are
    tied with each other alone: at place k, too, the same ones are taken by x and y. Ties among them would be broken as
    independently otherwise, and a resample would have an overlap below 1 although x and y rank all archs the same.
    """
    (in_x, alone_x), (in_y, alone_y) = (_in_top(places, weights, k) for places in (x, y))
    independent = np.divide(in_x * in_y, weights, out=np.zeros_like(weights), where=weights > 0)
    return np.where(alone_x & alone_y, np.minimum(in_x, in_y), independent).sum(axis=1) / k


def _regret(accuracies: np.ndarray, places_by_score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    best = np.where(weights > 0, accuracies, -np.inf).max(axis=1)
    pick = (_in_top(places_by_score, weights, 1)[0] * accuracies).sum(axis=1)
    return np.maximum(best - pick, 0.0)  # a mean of equal accuracies may be an ulp above them


# ---- Evaluation -----------------------------------------------------------------------------------------------------


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
    rank: int = 0,
    world_size: int = 1,
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
        rank: Rank of this process.
        world_size: Number of processes that evaluate, see `search`.

    Returns:
        The scored archs in the order of `chosen`, the same in all ranks.

    Raises:
        UsageError: The archive is of another ranking, or the metrics are not what they should be.
        RunError: The archive does not hold what this ranking would have evaluated, or another rank failed.
    """
    ranks = Ranks(rank, world_size)
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

    def keep(scored: list[RankedArch]) -> None:
        for arch in scored:
            if archive is not None:
                archive.append(_record(arch))
            if progress is not None:
                progress(arch, len(todo))

    try:
        records = ranks.from_first(archive.open) if archive is not None else []
        if len(records) > len(todo):
            raise RunError(_diverged(archive, f'it holds {len(records)} evaluations, this ranking {len(todo)}'))
        done = [_restore(arch, record, archive) for arch, record in zip(todo, records)]
        for start in range(len(done), len(todo), world_size):
            chunk = todo[start : start + world_size]
            metrics = ranks.map(evaluate, [r.arch for r in chunk])
            scored = [_with_metrics(r, m) for r, m in zip(chunk, metrics)]
            ranks.from_first(lambda scored=scored: keep(scored))
            done += scored
    finally:
        if archive is not None:
            archive.close()
    return done


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


# ---- Result ---------------------------------------------------------------------------------------------------------


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
    """

    table: AccuracyTable
    config: RankConfig
    fingerprint: dict[str, Any]
    archs: list[RankedArch]
    statistics: dict[str, dict[str, RankStatistics]] = field(default_factory=dict)
    tau_gains: dict[str, dict[str, Estimate]] = field(default_factory=dict)

    def scores(self, name: str) -> list[float]:
        """Return the scores of the archs by an entry of `statistics`, more is better."""
        if name in ('macs', 'params'):
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
    yardsticks = [name for name in ('macs', 'params') if all(getattr(r, name) is not None for r in archs)]
    for name in (*supernet, *yardsticks):
        scores = np.array(result.scores(name))
        result.statistics[name] = {
            part: rank_correlation(accuracies[inside], scores[inside], top_k=config.top_k, **bootstrap)
            for part, inside in parts.items()
        }
    for name in supernet:
        result.tau_gains[name] = {
            yardstick: tau_difference(
                result.statistics[name]['all'], result.statistics[yardstick]['all'], level=config.level
            )
            for yardstick in yardsticks
        }
    return result


# ---- Outputs --------------------------------------------------------------------------------------------------------


def write_ranking_csv(result: RankResult, path: str | os.PathLike) -> None:
    """Write the scored archs as CSV, whole or not at all.

    Columns are `arch`, `accuracy` (stand-alone, in percent), `top1` and `loss` of the supernet, the same with suffix
    `_recalibrated`, `macs` and `params`; empty where not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    names = ('arch', 'accuracy', 'top1', 'loss', 'top1_recalibrated', 'loss_recalibrated', 'macs', 'params')
    writer.writerow(names)
    for ranked in result.archs:
        writer.writerow(getattr(ranked, name) for name in names)
    write_text(path, text.getvalue())


def write_ranking_json(result: RankResult, path: str | os.PathLike) -> None:
    """Write all statistics as JSON with what they depend on, whole or not at all; null is what is not defined."""
    table = result.table
    content = dict(
        table=dict(
            name=table.path.name,
            arch_column=table.arch_column,
            accuracy_column=table.accuracy_column,
            num_rows=table.num_rows,
            num_usable=len(table),
            left_out=[asdict(left_out) for left_out in table.left_out],
        ),
        config=asdict(result.config),
        fingerprint=result.fingerprint,
        num_archs=len(result.archs),
        statistics={
            name: {part: statistics.to_dict() for part, statistics in parts.items()}
            for name, parts in result.statistics.items()
        },
        tau_gains={
            name: {yardstick: gain.to_dict() for yardstick, gain in gains.items()}
            for name, gains in result.tau_gains.items()
        },
    )
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def format_ranking(result: RankResult) -> str:
    """Return the statistics as tables for the terminal, one for all archs and one for the top half."""
    blocks: list[str] = []
    for part, title in PARTS.items():
        first = result.statistics['trained'][part]
        overlaps = (f'top-{k} overlap' for k in first.top_k_overlap)
        rows = [(f'{title} (n = {first.n})', 'Kendall tau', 'Spearman rho', *overlaps, 'regret (points)')]
        for name, parts in result.statistics.items():
            s = parts[part]
            overlaps = (estimate.text(2) for estimate in s.top_k_overlap.values())
            rows.append((LABELS[name], s.kendall_tau.text(3), s.spearman_rho.text(3), *overlaps, s.regret.text(2)))
        blocks.append(_format_rows(rows))
    gains = {name: by_yardstick for name, by_yardstick in result.tau_gains.items() if by_yardstick}
    if gains:
        rows = [('Kendall tau above that of', *(LABELS[yardstick] for yardstick in next(iter(gains.values()))))]
        for name, by_yardstick in gains.items():
            rows.append((LABELS[name], *(gain.text(3) for gain in by_yardstick.values())))
        blocks.append(_format_rows(rows))
    notes = [
        f'{LABELS[name]} gives all {len(result.archs)} archs the same {result.config.score}, so correlations are '
        'undefined; is the supernet trained?'
        for name in ('trained', 'recalibrated')
        if name in result.statistics and math.isnan(result.statistics[name]['all'].kendall_tau.value)
    ]
    config = result.config
    notes.append(
        f'[low, high]: {100 * config.level:g} % bootstrap interval over the archs, {config.num_resamples} resamples; '
        f'score of the supernet: {config.score}'
    )
    blocks.append('\n'.join(notes))
    return '\n\n'.join(blocks)


def _format_rows(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
