"""Rank statistics against slow references written from their formulas, and what comes of odd input."""

import csv
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import make_result

from timm_mixpath.analysis.rank_statistics import (
    Estimate,
    _kendall,
    _overlap,
    _regret,
    _resamples,
    _spearman,
    partial_tau,
    rank_correlation,
    seed_agreement,
    tau_at_equal_cost,
    tau_difference,
)
from timm_mixpath.analysis.ranking import RankConfig, evaluate_table, summarize
from timm_mixpath.analysis.ranking_report import format_ranking, write_ranking_csv, write_ranking_json
from timm_mixpath.utils.errors import UsageError

# ---- Slow references


def slow_tau(x: list, y: list) -> float:
    """Kendall's tau-b: (C - D) / sqrt((n0 - n1) (n0 - n2)) over pairs, n1 and n2 those that are tied."""
    concordant = discordant = untied_x = untied_y = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y), 2):
        untied_x += a != c
        untied_y += b != d
        concordant += (a < c and b < d) or (a > c and b > d)
        discordant += (a < c and b > d) or (a > c and b < d)
    if not untied_x or not untied_y:
        return math.nan
    return (concordant - discordant) / math.sqrt(untied_x * untied_y)


def slow_rho(x: list, y: list) -> float:
    """Spearman's rho: Pearson's correlation of ranks, ties share the mean of theirs."""

    def ranks(values: list) -> list:
        return [Fraction(2 * sum(v < w for v in values) + sum(v == w for v in values) + 1, 2) for w in values]

    a, b = ranks(x), ranks(y)
    mean = Fraction(len(x) + 1, 2)
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b))
    variances = sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)
    return float(covariance) / math.sqrt(variances) if variances else math.nan


def slow_tops(values: list, k: int) -> list:
    """The places in the list of the k best, for all ways to break ties."""
    cut = sorted(values, reverse=True)[k - 1]
    sure = {i for i, v in enumerate(values) if v > cut}
    tied = [i for i, v in enumerate(values) if v == cut]
    return [sure | set(rest) for rest in itertools.combinations(tied, k - len(sure))]


def slow_overlap(x: list, y: list, k: int) -> float:
    """Mean over all ways to break the ties of both."""
    pairs = [len(a & b) / k for a in slow_tops(x, k) for b in slow_tops(y, k)]
    return sum(pairs) / len(pairs)


def slow_overlap_of_copies(x: list, y: list, copies: list, k: int) -> float:
    """The same for archs that are there several times, whose copies are one and the same if tied with no other arch."""
    archs = [arch for arch, count in enumerate(copies) for _ in range(count)]
    held = {arch: {i for i, a in enumerate(archs) if a == arch} for arch in archs}
    alone = {a: all(x[a] != x[b] and y[a] != y[b] for b in held if b != a) for a in held}
    found = []
    for a, b in itertools.product(*(slow_tops([values[arch] for arch in archs], k) for values in (x, y))):
        counts = [min(len(a & own), len(b & own)) if alone[arch] else len(a & b & own) for arch, own in held.items()]
        found.append(sum(counts) / k)
    return sum(found) / len(found)


def slow_regret(accuracies: list, scores: list) -> float:
    picks = [a for a, s in zip(accuracies, scores) if s == max(scores)]
    return max(accuracies) - sum(picks) / len(picks)


def same(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


small = st.integers(2, 7).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2)
)  # fmt: skip


@given(small)
@settings(max_examples=60, deadline=None)
def test_statistics_equal_slow_references(series: tuple[list, list]) -> None:
    x, y = series
    top_k = range(1, len(x))
    found = rank_correlation(x, y, top_k=top_k, num_resamples=5)
    assert found.n == len(x)
    assert same(found.kendall_tau.value, slow_tau(x, y))
    assert same(found.spearman_rho.value, slow_rho(x, y))
    assert same(found.regret.value, slow_regret(x, y))
    assert list(found.top_k_overlap) == list(top_k)
    for k in top_k:
        assert same(found.top_k_overlap[k].value, slow_overlap(x, y, k))


@given(small, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_resamples_equal_slow_references(series: tuple[list, list], seed: int) -> None:
    """What the bootstrap computes for many resamples at once is what the resampled archs have."""
    x, y = map(np.array, series)
    places_x, places_y = (np.unique(v, return_inverse=True)[1] for v in (x, y))
    (weights,) = _resamples(len(x), 4, seed)
    assert (weights.sum(axis=1) == len(x)).all()
    taus = _kendall(places_x, places_y, weights)
    rhos = _spearman(places_x, places_y, weights)
    regrets = _regret(x.astype(float), places_y, weights)
    for row, tau, rho, regret in zip(weights, taus, rhos, regrets):
        a, b = (np.repeat(v, row.astype(int)).tolist() for v in (x, y))
        assert same(tau, slow_tau(a, b)) and same(rho, slow_rho(a, b)) and same(regret, slow_regret(a, b))
    for k in range(1, len(x)):
        for row, overlap in zip(weights, _overlap(places_x, places_y, weights, k)):
            assert same(overlap, slow_overlap_of_copies(x.tolist(), y.tolist(), row.astype(int).tolist(), k))


def test_matrix_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, (2, 73))
    whole = rank_correlation(x, y, num_resamples=50)
    monkeypatch.setattr('timm_mixpath.analysis.rank_statistics._RESAMPLES_AT_ONCE', 7)
    assert rank_correlation(x, y, num_resamples=50) == whole


def test_perfect_reverse_and_random() -> None:
    x = np.arange(100.0)
    for y, sign in ((x**3, 1), (-x, -1)):
        found = rank_correlation(x, y, num_resamples=200)
        for e in (found.kendall_tau, found.spearman_rho):
            assert (e.value, e.low, e.high) == pytest.approx((sign, sign, sign))
        assert found.top_k_overlap[10].value == (sign + 1) / 2
        assert found.regret.value == (0 if sign == 1 else 99)
    found = rank_correlation(x, x, top_k=(1, 5, 10, 50), num_resamples=200)
    assert found.regret == Estimate(0, 0, 0)
    # Nor do copies of one arch at place k make a resample of a perfect ranking worse
    assert set(found.top_k_overlap.values()) == {Estimate(1, 1, 1)}
    assert list(rank_correlation(x[:50], x[:50]).top_k_overlap) == [10]


def test_interval_covers_the_true_tau() -> None:
    """Of a bivariate normal with correlation r Kendall's tau is 2/pi asin(r) (Greiner's relation)."""
    rng, true = np.random.default_rng(1), 2 / math.pi * math.asin(0.7)
    hits = 0
    for seed in range(40):
        x = rng.normal(size=100)
        y = 0.7 * x + math.sqrt(1 - 0.7**2) * rng.normal(size=100)
        tau = rank_correlation(x, y, top_k=(), num_resamples=200, seed=seed).kendall_tau
        hits += tau.low <= true <= tau.high
        assert tau.low < tau.value < tau.high
    assert 33 <= hits <= 40  # 95 % of 40 are 38


def test_bootstrap_repeats_itself_and_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    y = x + rng.normal(size=500)
    start = time.process_time()
    rank_correlation(x, y)
    assert time.process_time() - start < 5  # 0.3 s on one core
    x, y = x[:100], y[:100]
    first = rank_correlation(x, y)
    assert first == rank_correlation(x, y)
    assert first != rank_correlation(x, y, seed=1)
    narrow, wide = rank_correlation(x, y, level=0.5).kendall_tau, first.kendall_tau
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_equal_scores_are_undefined_and_as_good_as_random() -> None:
    x = np.arange(40.0)
    found = rank_correlation(x, np.ones(40))
    assert all(math.isnan(v) for e in (found.kendall_tau, found.spearman_rho) for v in (e.value, e.low, e.high))
    assert found.kendall_tau.text(3) == 'undefined'
    assert found.kendall_tau.to_dict() == dict(value=None, low=None, high=None)
    assert found.top_k_overlap[10].value == pytest.approx(10 / 40)
    assert found.regret.value == pytest.approx(39 - x.mean())


def test_resamples_without_a_correlation_are_left_out() -> None:
    found = rank_correlation([1, 2, 3, 4], [1, 1, 1, 2], num_resamples=200)
    # a third of the resamples lacks the last arch
    assert math.isfinite(found.kendall_tau.low) and found.kendall_tau.low <= found.kendall_tau.high <= 1


def test_scores_that_are_no_number_come_last() -> None:
    x = np.arange(20.0)
    y = x.copy()
    y[[3, 7]] = np.nan, -np.inf
    expected = np.where(np.isin(x, [3, 7]), -1, x)
    assert rank_correlation(x, y) == rank_correlation(x, expected)


@pytest.mark.parametrize('series', [([1], [1]), ([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2]), ([[1, 2]], [[1, 2]])])
def test_malformed_series(series: tuple) -> None:
    with pytest.raises(ValueError):
        rank_correlation(*series)


def test_tau_difference() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + 0.5 * rng.normal(size=200)
    z = y + 0.3 * rng.normal(size=200)
    first, second = (rank_correlation(x, scores, num_resamples=200) for scores in (y, z))
    difference = tau_difference(first, second)
    a, b = first.kendall_tau, second.kendall_tau
    assert difference.value == pytest.approx(a.value - b.value)
    assert difference.low < difference.value < difference.high
    assert difference.high - difference.low < a.high - a.low  # y and z err alike
    assert tau_difference(first, first) == Estimate(0, 0, 0)
    with pytest.raises(ValueError, match='the same archs and resamples'):
        tau_difference(first, rank_correlation(x[:100], y[:100], num_resamples=200))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition('.')[0] == 'scipy']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'scipy', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-mixpath\[rank\]'"):
        rank_correlation([1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_archs=9), 'num_archs=9 is not an integer of at least 10'),
        (dict(seed=-1), 'seed=-1 is not an integer of at least 0'),
        (dict(score='top5'), "unknown score 'top5', known are top1, loss"),
        (dict(top_k=(10, 0)), 'top_k=0 is not an integer of at least 1'),
        (dict(num_resamples=0), 'num_resamples=0 is not an integer of at least 1'),
        (dict(level=95), 'level=95 of the intervals is not a share between 0 and 1'),
    ],
)
def test_config_errors(kwargs: dict, message: str) -> None:
    with pytest.raises(UsageError) as e:
        RankConfig(**kwargs)
    assert str(e.value) == message


# ---- Evaluation


def test_scores_are_taken_from_all_metrics(tmp_path: Path) -> None:
    """An evaluator may measure more than a ranking needs."""
    chosen = [(f'a{i}', 50.0 + i) for i in range(10)]

    def evaluate(arch: str) -> dict:
        return dict(top1=float(arch[1:]), top5=99.0, loss=math.inf, device='cpu', top1_recalibrated=7)

    archive = tmp_path / 'archive.jsonl'
    found = evaluate_table(chosen, evaluate, RankConfig(), archive_path=archive)
    assert [(r.arch, r.accuracy, r.top1, r.top1_recalibrated) for r in found] == [
        (arch, accuracy, index, 7) for index, (arch, accuracy) in enumerate(chosen)
    ]
    assert all(math.isnan(r.loss) and r.loss_recalibrated is None for r in found)
    lines = [json.loads(line) for line in archive.read_text().splitlines()[1:]]
    assert lines[3]['metrics'] == dict(top1=3, loss=None, top1_recalibrated=7)
    restored = evaluate_table(chosen, lambda arch: {}, RankConfig(), archive_path=archive)
    assert repr(restored) == repr(found)  # NaN equals nothing


# ---- Result and outputs


def test_summary() -> None:
    result = make_result()
    assert list(result.statistics) == ['trained', 'recalibrated', 'macs', 'params']
    accuracies = [r.accuracy for r in result.archs]
    tau = result.statistics['trained']['all'].kendall_tau.value
    assert tau == pytest.approx(slow_tau(accuracies, [r.top1 for r in result.archs]))
    half = [r for r in result.archs if r.accuracy >= np.median(accuracies)]
    found = result.statistics['params']['top_half']
    assert found.n == len(half) == 20 and list(found.top_k_overlap) == [10]
    assert found.kendall_tau.value == pytest.approx(slow_tau([r.accuracy for r in half], [r.params for r in half]))
    gain = result.tau_gains['trained']['macs']
    assert gain.value == pytest.approx(tau - result.statistics['macs']['all'].kendall_tau.value)

    losses = make_result(score='loss')
    assert losses.statistics['recalibrated']['all'].kendall_tau.value == pytest.approx(1)
    assert list(make_result(recalibrated=False).statistics) == ['trained', 'macs', 'params']


def test_outputs(tmp_path: Path) -> None:
    result = make_result()
    write_ranking_csv(result, tmp_path / 'r.csv')
    with open(tmp_path / 'r.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [r['arch'] for r in rows] == [r.arch for r in result.archs]
    assert [float(r['top1_recalibrated']) for r in rows] == [r.top1_recalibrated for r in result.archs]
    assert [int(r['macs']) for r in rows] == [r.macs for r in result.archs]
    write_ranking_csv(make_result(recalibrated=False), tmp_path / 'r.csv')
    with open(tmp_path / 'r.csv', newline='') as f:
        assert {r['loss_recalibrated'] for r in csv.DictReader(f)} == {''}

    write_ranking_json(result, tmp_path / 'r.json')
    content = json.loads((tmp_path / 'r.json').read_text())
    assert content['statistics']['trained']['all'] == json.loads(
        json.dumps(result.statistics['trained']['all'].to_dict())
    )
    assert content['num_archs'] == content['statistics']['macs']['all']['n'] == 40
    assert content['config']['top_k'] == [10, 30] and content['fingerprint']['split'] == 'train'
    assert set(content['statistics']['trained']['all']['kendall_tau']) == {'value', 'low', 'high'}

    text = format_ranking(result)
    trained = result.statistics['trained']['all'].kendall_tau
    assert f'{trained.value:.3f} [{trained.low:.3f}, {trained.high:.3f}]' in text
    for words in ('all archs (n = 40)', 'top half by stand-alone accuracy (n = 20)', 'more params = better',
                  'top-30 overlap', 'regret (points)', '95 % bootstrap interval', '50 resamples'):  # fmt: skip
        assert words in text


def test_outputs_of_an_untrained_supernet(tmp_path: Path) -> None:
    result = make_result(equal=True)
    text = format_ranking(result)
    assert 'supernet, BN as trained gives all 40 archs the same top1, so correlations are undefined' in text
    write_ranking_json(result, tmp_path / 'r.json')
    content = json.loads((tmp_path / 'r.json').read_text())
    assert content['statistics']['trained']['all']['kendall_tau']['value'] is None


# ---- Equal cost


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(1, 2)), min_size=2, max_size=12),
    st.sampled_from([0.0, 0.03, 0.2, 0.9]),
)
def test_tau_at_equal_cost_equals_a_loop_over_pairs(archs: list, tolerance: float) -> None:
    agree = of_x = of_y = pairs = 0
    for (x1, y1, c1), (x2, y2, c2) in itertools.combinations(archs, 2):
        if max(c1, c2) <= min(c1, c2) * (1 + tolerance):
            pairs += 1
            dx, dy = (x1 > x2) - (x1 < x2), (y1 > y2) - (y1 < y2)
            agree, of_x, of_y = agree + dx * dy, of_x + abs(dx), of_y + abs(dy)
    found = tau_at_equal_cost(*zip(*archs), tolerance=tolerance, num_resamples=5)
    assert found.num_pairs == pairs
    assert same(found.tau.value, agree / math.sqrt(of_x * of_y) if of_x and of_y else math.nan)


def test_tau_at_equal_cost_is_tau_where_all_cost_the_same() -> None:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 8, 60)
    y = x + rng.integers(0, 6, 60)
    same_cost = tau_at_equal_cost(x, y, np.full(60, 5.0), num_resamples=200, seed=4)
    plain = rank_correlation(x, y, num_resamples=200, seed=4)
    assert same_cost.tau.value == pytest.approx(plain.kendall_tau.value)
    # Each copy of an arch ties with itself in the one and is no pair in the other, which is the same
    assert np.allclose(same_cost.samples, plain.tau_samples)


def test_cost_alone_says_nothing_at_equal_cost() -> None:
    """Accuracy follows the cost; the scores know the cost and nothing else."""
    rng = np.random.default_rng(0)
    costs = rng.uniform(1, 2, 400)
    accuracies = 50 + 20 * costs + rng.normal(0, 1, 400)
    scores = costs + rng.normal(0, 0.01, 400)
    everywhere = rank_correlation(accuracies, scores, num_resamples=100)
    at_equal_cost = tau_at_equal_cost(accuracies, scores, costs, tolerance=0.01, num_resamples=100)
    assert everywhere.kendall_tau.value > 0.8
    assert (
        abs(at_equal_cost.tau.value) < 0.2 and at_equal_cost.tau.low < at_equal_cost.tau.value < at_equal_cost.tau.high
    )
    of_cost = rank_correlation(accuracies, costs, num_resamples=100)
    both = rank_correlation(costs, scores, num_resamples=100)
    given = partial_tau(everywhere, of_cost, both)
    assert abs(given.value) < 0.25 < everywhere.kendall_tau.value and given.low < given.value < given.high
    # and knowledge beside the cost shows
    knows = scores + 0.05 * (accuracies - 20 * costs)
    rest = partial_tau(
        rank_correlation(accuracies, knows, num_resamples=100),
        of_cost,
        rank_correlation(costs, knows, num_resamples=100),
    )
    assert rest.low > given.high


def test_partial_tau_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    x, y, z = rng.normal(size=(3, 30))
    xy, xz, yz = (rank_correlation(a, b, num_resamples=10) for a, b in ((x, y), (x, z), (z, y)))
    a, b, c = (slow_tau(list(p), list(q)) for p, q in ((x, y), (x, z), (z, y)))
    found = partial_tau(xy, xz, yz)
    assert found.value == pytest.approx((a - b * c) / math.sqrt((1 - b * b) * (1 - c * c)))
    with pytest.raises(ValueError, match='the same archs and resamples'):
        partial_tau(xy, xz, rank_correlation(x, y, num_resamples=9))


def test_costs_have_to_be_costs() -> None:
    for costs in ([1.0, 0.0], [1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match='costs have to be positive'):
            tau_at_equal_cost([1, 2], [1, 2], costs)


@pytest.mark.parametrize('num_seeds', [2, 3, 5])
@pytest.mark.parametrize('noise', [0.3, 1.0, 2.0])
def test_ceiling_is_what_the_truth_reaches(num_seeds: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=1500)
    by_seed = [truth + noise * rng.normal(size=1500) for _ in range(num_seeds)]
    found = seed_agreement(by_seed)
    reached = rank_correlation(np.mean(by_seed, axis=0), truth, num_resamples=5).kendall_tau.value
    assert found.tau < found.ceiling == pytest.approx(reached, abs=0.05)
    # Where costs explain everything else, so do pairs of equal cost
    costs = rng.uniform(1, 2, 1500)
    classes = costs // 0.02
    band = seed_agreement([series + 1000 * classes for series in by_seed], classes, tolerance=0.0)
    assert band.tau == pytest.approx(found.tau, abs=0.05)


def test_seeds_that_agree_on_nothing() -> None:
    assert seed_agreement([[1, 2, 3, 4], [1, 2, 3, 4]]).ceiling == pytest.approx(1)
    assert seed_agreement([[1, 2, 3, 4], [4, 3, 2, 1]]).ceiling == 0
    assert math.isnan(seed_agreement([[1, 2, 3], [5, 5, 5]]).ceiling)
    with pytest.raises(ValueError, match='1 seeds agree with nothing'):
        seed_agreement([[1, 2]])


@pytest.mark.parametrize(
    ('band', 'message'),
    [(('flops', 0.03), "unknown cost 'flops' of a band, known are macs, params"), (('macs', 3.0), 'band 3.0 is not')],
)
def test_bad_bands(band: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RankConfig(band=band)


def test_band_and_seeds_are_reported(tmp_path: Path) -> None:
    result = make_result()
    assert not result.seeds and not result.equal_cost
    config = replace(result.config, band=('macs', 0.03))
    rng = np.random.default_rng(0)
    by_seed = tuple((a + rng.normal(0, 5), a + rng.normal(0, 5)) for a in result.table.accuracies)
    table = replace(result.table, by_seed=by_seed)
    result = summarize(table, config, result.fingerprint, result.archs)
    assert {*result.equal_cost} == {*result.statistics}
    macs = [r.macs for r in result.archs]
    expected = sum(max(a, b) <= 1.03 * min(a, b) for a, b in itertools.combinations(macs, 2))
    assert all(band.num_pairs == expected for band in result.equal_cost.values())
    assert result.seeds['all'].tau == pytest.approx(slow_tau(*map(list, zip(*by_seed))))
    at_equal_cost = tau_at_equal_cost(*zip(*by_seed), macs, num_resamples=5).tau.value
    assert result.seeds['equal_cost'].tau == pytest.approx(at_equal_cost)
    write_ranking_json(result, tmp_path / 'r.json')
    content = json.loads((tmp_path / 'r.json').read_text())
    assert (
        content['equal_cost']['trained']['num_pairs'] == expected
        and content['seeds']['all']['tau'] == result.seeds['all'].tau
    )
    assert content['partial_taus']['trained'].keys() == {'macs', 'params'}
    text = format_ranking(result)
    assert f'{expected} pairs of archs within 0.03' in text and 'partial Kendall tau given' in text
    assert 'between single seeds of the table: ' in text and 'single seeds of the table, at equal cost: ' in text
