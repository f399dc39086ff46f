"""How well scores rank: Kendall tau, Spearman rho, overlap of the best, regret, each with an interval.

Intervals are percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13) over the archs: how much the
statistics would change with other archs of the same table. The noise of training the supernet, and the archs, again is
not in them. Kendall tau and Spearman rho need `pip install 'timm-mixpath[rank]'`; to import this module does not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from ..utils.errors import needs

__all__ = [
    'BandTau',
    'Estimate',
    'RankStatistics',
    'SeedAgreement',
    'partial_tau',
    'rank_correlation',
    'require_scipy',
    'seed_agreement',
    'tau_at_equal_cost',
    'tau_difference',
]


# Bounds the memory of tables of ten thousand archs to a few hundred MB
_RESAMPLES_AT_ONCE = 250


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


@dataclass(frozen=True)
class BandTau:
    """How well scores rank archs of equal cost.

    Attributes:
        num_pairs: Pairs of archs whose costs are equal up to the tolerance.
        tau: Kendall's tau-b over these pairs. NaN if all of them are tied.
        samples: That of each bootstrap resample, [num_resamples].
    """

    num_pairs: int
    tau: Estimate
    samples: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, without the samples."""
        return dict(num_pairs=self.num_pairs, tau=self.tau.to_dict())


@dataclass(frozen=True)
class SeedAgreement:
    """How well two trainings of the same archs agree, and what their noise leaves of a ranking.

    Attributes:
        num_seeds: Trainings of every arch, whose mean accuracy is what scores are compared with.
        tau: Kendall's tau-b between the accuracies of two seeds, the mean over pairs of seeds. NaN if a seed ties all.
        ceiling: Kendall's tau that scores without any error would have with the mean over the seeds, estimated.
    """

    num_seeds: int
    tau: float
    ceiling: float

    def to_dict(self) -> dict[str, float | None]:
        """Return a JSON-ready dict, with None for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def require_scipy() -> None:
    """Check that scipy is installed.

    Raises:
        ImportError: It is not.
    """
    with needs('rank correlations need scipy', 'rank'):
        import scipy.stats  # noqa: F401


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
    resampled: dict[Any, list[np.ndarray]] = {name: [] for name in ('tau', 'rho', 'regret', *top_k)}
    for weights in _resamples(n, num_resamples, seed):
        resampled['tau'].append(_kendall(places, places_by_score, weights))
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


def tau_at_equal_cost(
    accuracies: Sequence[float],
    scores: Sequence[float],
    costs: Sequence[float],
    *,
    tolerance: float = 0.03,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BandTau:
    """Return Kendall's tau-b over all pairs of archs of equal cost: which of two archs of the same cost is better?

    That is what a search under a budget asks. Pairs of all costs count alike, so nothing depends on where a band of
    costs begins.

    Args:
        accuracies: Stand-alone accuracies of the archs.
        scores: Scores of the archs, more is better; scores that are not a number come last.
        costs: Costs of the archs, positive.
        tolerance: Two costs are equal if the larger one is at most this share above the smaller one.
        num_resamples: Bootstrap resamples of the archs. Copies of an arch make no pair.
        level: Share of the resamples inside the interval.
        seed: Seed of the resamples, see `rank_correlation`.

    Raises:
        ValueError: The three are not of the same archs, a cost is not positive, or the tolerance negative.
    """
    _, places, places_by_score = _check_series(accuracies, scores)
    costs = np.asarray(costs, dtype=float)
    if costs.shape != places.shape or not (costs > 0).all() or not tolerance >= 0:
        raise ValueError('costs have to be positive, one of each arch, and the tolerance at least 0')
    first, second = _pairs_of_equal_cost(costs, tolerance)
    x, y = (np.sign(p[first] - p[second]) for p in (places, places_by_score))
    products = np.stack([x * y, x * x, y * y], axis=1).astype(float)  # [pairs, 3]

    def tau(weights: np.ndarray) -> float:
        # Sums over pairs of how often both are drawn
        both, of_x, of_y = (weights[first] * weights[second]) @ products
        return float(both / math.sqrt(of_x * of_y)) if of_x > 0 and of_y > 0 else math.nan

    drawn = (weights for part in _resamples(len(places), num_resamples, seed) for weights in part)
    samples = np.array([tau(weights) for weights in drawn])
    return BandTau(len(first), _estimate(tau(np.ones(len(places))), samples, level), samples)


def _pairs_of_equal_cost(costs: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The indices of both archs of every pair, each pair once: a table of 15,000 archs has no room for a matrix."""
    order = np.argsort(costs, kind='stable')
    ordered = costs[order]
    numbers = np.arange(len(costs))
    counts = np.searchsorted(ordered, ordered * (1 + tolerance), side='right') - numbers - 1
    first = np.repeat(numbers, counts)
    starts = np.cumsum(counts) - counts
    second = first + 1 + np.arange(counts.sum()) - np.repeat(starts, counts)
    return order[first], order[second]


def seed_agreement(
    by_seed: Sequence[Sequence[float]], costs: Sequence[float] | None = None, *, tolerance: float = 0.03
) -> SeedAgreement:
    """Return how well the accuracies of two seeds rank alike, and what no ranking of their mean can exceed by much.

    The ceiling takes accuracies for normal and the noise of the seeds for independent. Then Kendall's tau of two seeds
    stands for their correlation, r = sin(pi tau / 2) (Greiner 1909); the mean over S seeds has the reliability
    R = S r / (1 + (S - 1) r) (Spearman 1910, Brown 1910), and scores without error the correlation sqrt(R) with it.

    Args:
        by_seed: Accuracies of the archs, one series per seed, at least two.
        costs: Costs of the archs, to look only at the pairs of equal cost, as `tau_at_equal_cost` does; None for all.
        tolerance: Share up to which two costs are equal.

    Raises:
        ImportError: scipy is not installed.
        ValueError: There are fewer than two seeds, or as `tau_at_equal_cost`.
    """
    if len(by_seed) < 2:
        raise ValueError(f'{len(by_seed)} seeds agree with nothing, two or more are needed')
    require_scipy()
    from scipy.stats import kendalltau

    def tau(first: Sequence[float], second: Sequence[float]) -> float:
        if costs is not None:
            return tau_at_equal_cost(first, second, costs, tolerance=tolerance, num_resamples=0).tau.value
        tied = min(np.ptp(first), np.ptp(second)) == 0  # of which scipy warns
        return math.nan if tied else float(kendalltau(first, second).statistic)

    mean = float(np.mean([tau(first, second) for first, second in combinations(by_seed, 2)]))
    r = max(math.sin(math.pi / 2 * mean), 0.0) if math.isfinite(mean) else math.nan
    reliability = len(by_seed) * r / (1 + (len(by_seed) - 1) * r)
    return SeedAgreement(len(by_seed), mean, 2 / math.pi * math.asin(math.sqrt(reliability)))


def partial_tau(
    with_scores: RankStatistics, with_cost: RankStatistics, of_scores: RankStatistics, *, level: float = 0.95
) -> Estimate:
    """Return Kendall's partial tau of accuracies and scores given the cost (Kendall 1942).

    What is left of a ranking when the part that counting costs explains is taken out. Scores that know the cost up to
    some noise and nothing else end near 0, not at it; `tau_at_equal_cost` asks the sharper question.

    Args:
        with_scores: Statistics of accuracies and scores.
        with_cost: Statistics of accuracies and costs, with the same seed and number of resamples.
        of_scores: Statistics of costs (as accuracies) and scores, likewise.
        level: Share of the resamples inside the interval.

    Raises:
        ValueError: They are not of as many archs and resamples.
    """
    given = (with_scores, with_cost, of_scores)
    if len({(s.n, s.tau_samples.shape) for s in given}) > 1:
        raise ValueError('a partial correlation needs the same archs and resamples on all sides')

    def partial(xy: np.ndarray, xz: np.ndarray, yz: np.ndarray) -> np.ndarray:
        rest = (1 - xz**2) * (1 - yz**2)
        return np.divide(xy - xz * yz, np.sqrt(rest), out=np.full(xy.shape, np.nan), where=rest > 1e-12)

    value = partial(*(np.array([s.kendall_tau.value]) for s in given))[0]
    return _estimate(float(value), partial(*(s.tau_samples for s in given)), level)


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


def _kendall(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each resample, NaN where it is not defined; an arch ties with its copies.

    Args:
        x: Places of the archs by accuracy, [n].
        y: Places of the archs by score, [n].
        weights: How often each arch is in each resample, [num_resamples, n].
    """
    from scipy import stats

    def tau(counts: np.ndarray) -> float:
        drawn = np.repeat(np.arange(len(x)), counts)
        # scipy warns of what is constant
        return math.nan if np.ptp(x[drawn]) == 0 or np.ptp(y[drawn]) == 0 else stats.kendalltau(x[drawn], y[drawn])[0]

    return np.array([tau(counts) for counts in weights.astype(int)])


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
