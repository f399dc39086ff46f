"""Latency is predicted from parts: against planted costs, and against going through a small space one by one."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from small_space import TINY
from tables import table_for

from timm_mixpath import sample
from timm_mixpath.models.cost import CostTable, cost_table
from timm_mixpath.models.latency_table import LatencyTable, fit_latency, layers_digest
from timm_mixpath.utils.errors import UsageError


def all_archs(space):
    return [space.decode(vector) for vector in itertools.product(*map(range, space.gene_sizes))]


def planted(cost, seed: int, departure: float) -> tuple[float, dict]:
    """A device on which every kind of part has its price, and every part departs from it a little."""
    draw = random.Random(seed)
    kinds = dict.fromkeys(map(cost.part_kind, cost.part_costs('macs')))
    prices = {kind: (draw.uniform(0.01, 0.1), draw.uniform(1e-8, 1e-7)) for kind in kinds}
    parts = {}
    for part, macs in cost.part_costs('macs').items():
        piece, per_mac = prices[cost.part_kind(part)]
        parts[part] = (piece + per_mac * macs) * (1 + departure * draw.uniform(-1, 1))
    return 0.5, parts


@pytest.mark.parametrize('name', ['mixpath_nano_supernet', 'mixpath_s3_supernet', 'mixpath_nb201_supernet'])
@pytest.mark.parametrize(('departure', 'largest'), [(0.0, 1e-3), (0.3, 0.05)])
def test_fit_finds_planted_costs(name: str, departure: float, largest: float) -> None:
    cost = cost_table(timm.create_model(name, device='meta'))
    base, parts = planted(cost, 3, departure)

    def latency(arch: str) -> float:
        return base + sum(parts[part] for part in cost.parts(arch))

    archs = [sample(cost.space, seed=0, step=i) for i in range(200)]
    cost.add_metric('latency', *fit_latency(cost, archs, list(map(latency, archs))))
    unseen = [sample(cost.space, seed=1, step=i) for i in range(50)]
    assert max(abs(cost.cost('latency', a) / latency(a) - 1) for a in unseen) < largest


def test_noise_of_measurements_is_averaged() -> None:
    cost = cost_table(timm.create_model('mixpath_nano_supernet', device='meta'))
    base, parts = planted(cost, 5, 0.1)
    draw = random.Random(0)
    truth = {}
    for seed, n in ((0, 150), (1, 50)):
        for i in range(n):
            arch = sample(cost.space, seed=seed, step=i)
            truth[arch] = base + sum(parts[part] for part in cost.parts(arch))
    archs = list(truth)
    noisy = [truth[a] * (1 + draw.gauss(0, 0.05)) for a in archs[:150]]
    cost.add_metric('latency', *fit_latency(cost, archs[:150], noisy))
    errors = [abs(cost.cost('latency', a) / truth[a] - 1) for a in archs[150:]]
    noise = [abs(a / truth[b] - 1) for a, b in zip(noisy, archs)]
    assert sum(errors) / len(errors) < 0.6 * sum(noise) / len(noise)


def test_latency_is_a_metric_like_the_others() -> None:
    cost = CostTable(TINY)
    base, parts = planted(cost, 1, 0.5)
    table_for(cost, base, parts).add_to(cost)
    assert cost.metrics == ('macs', 'params', 'latency')
    times = {arch: base + sum(parts[part] for part in cost.parts(arch)) for arch in all_archs(TINY)}
    assert len(set(times.values())) > 100
    for arch, ms in times.items():
        assert cost.cost('latency', arch) == pytest.approx(ms)
    assert cost.bounds('latency') == pytest.approx((min(times.values()), max(times.values())))
    assert cost.cost('latency', cost.smallest('latency')) == pytest.approx(min(times.values()))
    # and the others are what they were
    assert cost.bounds('macs') == CostTable(TINY).bounds('macs')


def test_too_few_measurements() -> None:
    cost = CostTable(TINY)
    with pytest.raises(ValueError, match='2 measured archs are too few'):
        fit_latency(cost, all_archs(TINY)[:2], [1.0, 2.0])


def test_file_round_trip(tmp_path: Path) -> None:
    cost = CostTable(TINY)
    table = table_for(cost, *planted(cost, 1, 0.5))
    table.save(tmp_path / 't.json')
    read = LatencyTable.load(tmp_path / 't.json')
    assert read == table and read.fingerprint() == table.fingerprint()
    first, second = CostTable(TINY), CostTable(TINY)
    table.add_to(first)
    read.add_to(second)
    assert [first.cost('latency', a) for a in all_archs(TINY)] == [second.cost('latency', a) for a in all_archs(TINY)]
    assert 'torch on a device of tests, 2 threads, batches of 1' in read.describe()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, 'can not be read: No such file'),
        ('{', 'it is not JSON'),
        ('[1]', 'is no latency table'),
        ('{"format": "else"}', 'is no latency table'),
        ('{"format": "timm-mixpath latency table", "version": 9}', 'format version 9, this is 1'),
        ('{"format": "timm-mixpath latency table", "version": 1}', 'is damaged'),
    ],
)
def test_bad_files(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / 't.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        LatencyTable.load(path)


@pytest.mark.parametrize('change', [dict(base=math.nan), dict(parts=[[0, 1, 'x']]), dict(parts=5), dict(extra=1)])
def test_damaged_tables(change: dict, tmp_path: Path) -> None:
    cost = CostTable(TINY)
    table_for(cost, *planted(cost, 1, 0.5)).save(tmp_path / 't.json')
    content = {**json.loads((tmp_path / 't.json').read_text()), **change}
    (tmp_path / 't.json').write_text(json.dumps(content))
    with pytest.raises(UsageError, match='is damaged, measure it again'):
        LatencyTable.load(tmp_path / 't.json')


def test_tables_of_others_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    cost = CostTable(TINY)
    table = table_for(cost, *planted(cost, 1, 0.5))
    with pytest.raises(UsageError, match='of space other, this'):
        replace(table, space='other').add_to(CostTable(TINY))
    with pytest.raises(UsageError, match=r'input size \[3, 8, 8\], this .* of \[3, 16, 16\]'):
        table.add_to(CostTable(TINY, input_size=(3, 16, 16)))
    with pytest.raises(UsageError, match='another variant of space'):
        table.add_to(CostTable(TINY.scaled(2.0)))
    table.add_to(CostTable(TINY, num_classes=5))  # the classifier is a small part
    assert not caplog.records
    replace(table, max_paths=1).add_to(CostTable(TINY))
    assert 'with sums of up to 1 path(s), and those of this space have up to 2' in caplog.text


@pytest.mark.parametrize(
    ('name', 'kwargs', 'others', 'same'),
    [
        ('nano', {}, dict(act_layer='silu'), dict(num_classes=0, drop_path_rate=0.1, drop_rate=0.2, sum_norm='bn')),
        ('nano', dict(sum_norm='bn'), dict(norm_layer='groupnorm1'), {}),
        ('supernet', dict(backbone='mobilenetv3_small_050'), dict(act_layer='relu'), {}),
        ('nb201', {}, dict(global_pool='max'), dict(sum_norm='bn', num_classes=3)),
    ],
)
def test_table_of_other_activations_is_refused(name: str, kwargs: dict, others: dict, same: dict) -> None:
    name = 'mixpath_supernet' if name == 'supernet' else f'mixpath_{name}_supernet'

    def cost_of(**more):
        return cost_table(timm.create_model(name, device='meta', **{**kwargs, **more}), (3, 32, 32))

    cost = cost_of()
    table = table_for(cost, *planted(cost, 1, 0.5), layers=layers_digest(cost))
    other = cost_of(**others)
    with pytest.raises(UsageError, match=r'another variant of space .*activations, gates, norms or pooling differ'):
        table.add_to(other)
    replace(table, layers=None).add_to(other)  # measured before this was kept
    if same:
        table.add_to(cost_of(**same))
