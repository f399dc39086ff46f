"""Measuring a latency table: what is drawn, that it goes on, and that a machine's change of speed is taken out."""

import json
import math
import random
from pathlib import Path

import pytest
import timm

from timm_mixpath import sample
from timm_mixpath.analysis import latency
from timm_mixpath.analysis.latency import LatencyConfig, compare_prediction, measure_table, spread_archs
from timm_mixpath.models.cost import cost_table
from timm_mixpath.models.latency import measure_side_by_side
from timm_mixpath.models.latency_table import LatencyTable
from timm_mixpath.utils.errors import UsageError

QUICK = LatencyConfig(num_archs=30, test_archs=10, rounds=1, visit_ms=1, threads=1)


@pytest.fixture
def supernet():
    return timm.create_model('mixpath_nano_supernet', num_classes=4, width_mult=0.25)


def test_visits_are_shuffled() -> None:
    visits: list[int] = []
    runners = [lambda i=i: visits.append(i) for i in range(5)]
    times = measure_side_by_side(runners, num_threads=1, rounds=4, min_visit_s=1e-6)
    assert len(times) == 5 and all(t > 0 for t in times)
    # without repetitions: who came after whom
    order = [v for v, before in zip(visits, [None, *visits]) if v != before]
    rounds = [order[-20:][i : i + 5] for i in range(0, 20, 5)]
    assert len({tuple(r) for r in rounds}) > 1


def test_spread_archs_reach_further_than_samples(supernet) -> None:
    cost = cost_table(supernet)
    archs = spread_archs(cost, 60, seed=3)
    assert len(set(archs)) == 60 and archs == spread_archs(cost, 60, seed=3) != spread_archs(cost, 60, seed=4)
    low, high = cost.bounds('macs')

    def reach(archs: list[str]) -> float:
        macs = [cost.macs(a) for a in archs]
        return (max(macs) - min(macs)) / (high - low)

    assert reach(archs) > 0.85 > reach([sample(cost.space, seed=3, step=i) for i in range(60)])


@pytest.mark.parametrize(('name', 'num_fits'), [('nb101', 68), ('nb201', 150), ('s3', 150)])
def test_unseen_archs_are_unseen(name: str, num_fits: int) -> None:
    cost = cost_table(timm.create_model(f'mixpath_{name}_supernet', device='meta'))
    fits, tests = latency._draw(cost, LatencyConfig())
    assert len(fits) == num_fits and 5 <= len(tests) <= 50 and not {*fits} & {*tests}
    assert len({*tests}) == len(tests)


def test_real_measurement(supernet, tmp_path: Path) -> None:
    table = measure_table(supernet, tmp_path / 't.json', QUICK, input_size=(3, 16, 16), progress=False)
    assert table == LatencyTable.load(tmp_path / 't.json')
    assert (table.space, table.input_size, table.num_classes, table.threads) == ('nano', (3, 16, 16), 4, 1)
    assert table.versions['torch'] and table.device_name and table.protocol['drift'] >= 1
    assert sorted(row['use'] for row in table.measured) == ['fit'] * 30 + ['test'] * 10
    assert all(row['latency_ms'] > 0 for row in table.measured)
    assert table.test['num_archs'] == 10 and -1 <= table.test['tau'] <= 1
    assert 0 <= table.test['mean_error'] <= table.test['max_error']
    assert table.test['repeats']['mean_error'] > 0 and -1 <= table.test['repeats']['tau'] <= 1
    assert len({row['arch'] for row in table.measured}) == 40


@pytest.mark.slow
def test_goes_on_where_it_was_cut_off(supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def cut_off(self, archs):
        calls.append(archs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [float(len(a)) for a in map(str, archs)], [1.0, 2.0, 4.0]

    with monkeypatch.context() as patch:
        patch.setattr(latency._Meter, '__call__', cut_off)
        with pytest.raises(KeyboardInterrupt):
            measure_table(supernet, tmp_path / 't.json', QUICK, progress=False)
    assert not (tmp_path / 't.json').exists()
    kept = (tmp_path / 't.json.jsonl').read_text()
    assert len(kept.splitlines()) == 2

    with monkeypatch.context() as patch:
        patch.setattr(latency._Meter, '__call__', lambda *_: pytest.fail('another configuration was measured'))
        with pytest.raises(UsageError, match="config entry 'seed' was 0 in the archive and is 1 now"):
            measure_table(supernet, tmp_path / 't.json', LatencyConfig(**{**vars(QUICK), 'seed': 1}), progress=False)
    table = measure_table(supernet, tmp_path / 't.json', QUICK, progress=False)
    assert (tmp_path / 't.json.jsonl').read_text().startswith(kept)
    assert len(table.measured) == 40

    # What is whole is not measured again
    with monkeypatch.context() as patch:
        patch.setattr(latency._Meter, '__call__', lambda *_: pytest.fail('it was measured again'))
        assert measure_table(supernet, tmp_path / 't.json', QUICK, progress=False) == table


def test_drift_is_taken_out() -> None:
    """Networks measured while the machine was slow, small ones more so, end where they belong."""
    draw = random.Random(0)
    truth = {f'a{i}': draw.uniform(2, 20) for i in range(200)}
    records = []
    for start in range(0, 200, 20):
        small, large = draw.uniform(0.8, 1.3), draw.uniform(0.95, 1.1)

        def slow(ms: float, small: float = small, large: float = large) -> float:
            return ms * small * (large / small) ** (math.log(ms) / math.log(32))

        archs = list(truth)[start : start + 20]
        records.append(
            dict(
                archs=archs,
                metrics=dict(latency_ms=[slow(truth[a]) for a in archs], references_ms=[slow(m) for m in (1, 6, 32)]),
            )
        )
    found = latency._without_drift(records)
    ratios = [found[a][0] / truth[a] for a in truth]
    assert max(ratios) / min(ratios) < 1.02
    raw = [ms / truth[a] for r in records for a, ms in zip(r['archs'], r['metrics']['latency_ms'])]
    assert max(raw) / min(raw) > 1.3 and latency._drift(records) > 1.1


def test_comparison() -> None:
    found = compare_prediction([1.0, 2.0, 3.3, 4.0], [1.0, 2.0, 3.0, 5.0])
    assert found == dict(num_archs=4, tau=1.0, mean_error=pytest.approx(0.075), max_error=pytest.approx(0.2))
    assert compare_prediction([1, 2, 3], [3, 2, 1])['tau'] == -1
    assert compare_prediction([1, 1, 1], [3, 2, 1])['tau'] == 0


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(batch_size=0), 'batch_size=0 must be at least 1'),
        (dict(num_archs=3), 'num_archs=3 must be at least 10'),
        (dict(threads=0), 'threads=0 must be at least 1'),
        (dict(rounds=0), 'rounds=0 must be at least 1'),
        (dict(visit_ms=-1.0), r'visit_ms=-1.0 must be positive'),
    ],
)
def test_bad_configurations(kwargs: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LatencyConfig(**kwargs)


def test_nothing_is_overwritten(supernet, tmp_path: Path) -> None:
    (tmp_path / 'mine.json').write_text('{"mine": 1}')
    with pytest.raises(UsageError, match='is not overwritten'):
        measure_table(supernet, tmp_path / 'mine.json', QUICK)
    with pytest.raises(UsageError, match='is a folder'):
        measure_table(supernet, tmp_path, QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.json']
    assert (tmp_path / 'mine.json').read_text() == '{"mine": 1}'


def test_unknown_runtime(supernet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'tflite'"):
        measure_table(supernet, tmp_path / 't.json', LatencyConfig(runtime='tflite'))
    assert not list(tmp_path.iterdir())


def test_table_is_json_without_code(supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        latency._Meter, '__call__', lambda _, archs: ([float(len(a)) for a in map(str, archs)], [1.0, 2.0, 4.0])
    )
    measure_table(supernet, tmp_path / 't.json', QUICK, progress=False)
    content = json.loads((tmp_path / 't.json').read_text())
    assert content['format'] == 'timm-mixpath latency table' and content['version'] == 1
