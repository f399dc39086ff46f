"""With which images adapt searches, and how much."""

from contextlib import suppress
from dataclasses import replace

import pytest
import timm

from timm_mixpath.cli.adapt_plan import SizedSearch, is_backbone_alone, plan_searches, share_evaluations
from timm_mixpath.models.backbone import BackboneSupernet
from timm_mixpath.models.cost import cost_table
from timm_mixpath.models.latency_table import LatencyTable
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.utils.errors import UsageError

BACKBONE = 'mobilenetv3_small_050'


@pytest.fixture(scope='module')
def supernet() -> BackboneSupernet:
    return timm.create_model('mixpath_supernet', backbone=BACKBONE, num_classes=10, m=2, device='meta')


def test_sizes_between_the_backbone_and_nothing(supernet: BackboneSupernet, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the largest with which the backbone is within the limit, to the largest with which anything is."""
    sizes = [96, 32, 64]
    tables = {n: cost_table(supernet, (3, n, n)) for n in sizes}
    # A table takes seconds
    monkeypatch.setattr('timm_mixpath.cli.adapt_plan.cost_table', lambda _, size: tables[size[1]])
    macs = {n: table.macs(supernet.space.default_arch) for n, table in tables.items()}
    for limited in (64, 96):
        config = SearchConfig(max_macs=macs[limited])
        searches = plan_searches(supernet, BACKBONE, sizes, config, 0.8)
        reachable = [n for n in sorted(sizes) if n >= limited and tables[n].bounds('macs')[0] <= config.max_macs]
        assert [s.img_size for s in searches] == reachable
        assert [s.holds_backbone for s in searches] == [n == limited for n in reachable]
        assert is_backbone_alone(searches) == (reachable == [limited])
        # Where the backbone is above the limit, what is far below it is not looked at
        for search in searches:
            expected = config if search.holds_backbone else replace(config, min_macs=int(0.8 * macs[limited]))
            assert search.config == expected
    assert not is_backbone_alone(plan_searches(supernet, BACKBONE, [64], SearchConfig(max_macs=macs[64] - 1)))
    with pytest.raises(UsageError, match=r'max_macs=1000 excludes every arch, the smallest of the space has \d+'):
        plan_searches(supernet, BACKBONE, sizes, SearchConfig(max_macs=1000))
    # Parameters do not depend on the images
    params = tables[64].params(supernet.space.default_arch)
    for limit, holds_backbone in ((params, True), (params - 1, False)):
        (search,) = plan_searches(supernet, BACKBONE, sizes, SearchConfig(max_params=limit))
        assert (search.img_size, search.holds_backbone) == (96, holds_backbone)


@pytest.mark.parametrize(
    'sizes, limits, advised',
    [
        ([96], dict(max_macs=2_300_000), '64 80 96'),
        ([112, 96], dict(max_macs=2_300_000), '64 80 96 112'),
        ([64], dict(max_macs=1_700_000), '48 64'),
        ([224], dict(max_macs=12_500_000), '160 176 192 208 224'),
        ([224], dict(max_macs=10_000_000), '128 160 192 224'),
        ([224], dict(max_macs=7_000_000), '112 144 176 208 224'),  # and none is within the limit with the given one
        ([96], dict(max_macs=100_000_000), None),  # as it is
        ([64, 96], dict(max_macs=2_300_000), None),  # tried
        ([96], dict(max_macs=2_300_000, max_params=500_000), None),  # of which none would be enough
    ],
)
def test_advice_names_what_can_be_tried(
    supernet: BackboneSupernet, caplog: pytest.LogCaptureFixture, sizes: list[int], limits: dict, advised: str | None
) -> None:
    with caplog.at_level('INFO'), suppress(UsageError):
        plan_searches(supernet, BACKBONE, sizes, SearchConfig(**limits))
    assert ('the backbone itself is within' in caplog.text) == (advised is not None)
    if advised is not None:
        assert f'--img-size {advised} tries them all' in caplog.text


def test_several_limits_leave_no_floor(supernet: BackboneSupernet, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cost_table(supernet, (3, 64, 64))
    monkeypatch.setattr('timm_mixpath.cli.adapt_plan.cost_table', lambda *_: table)
    own = supernet.space.default_arch
    limits = dict(max_macs=table.macs(own) - 1, max_params=table.params(own) - 1)
    for name, limit in limits.items():
        assert plan_searches(supernet, BACKBONE, [64], SearchConfig(**{name: limit}))[0].config.limits(name[4:])[0] < 0
        (search,) = plan_searches(supernet, BACKBONE, [64], SearchConfig(**{name: limit}), 0.8)
        assert search.config == SearchConfig(**{name: limit, name.replace('max', 'min'): int(0.8 * limit)})
    (search,) = plan_searches(supernet, BACKBONE, [64], SearchConfig(**limits), 0.8)
    assert search.config == SearchConfig(**limits)
    table.add_metric('latency', 1.0, dict.fromkeys(table.part_costs('macs'), 1.0))
    config = SearchConfig(max_latency=table.cost('latency', own) - 1, objectives={'loss': 1, 'latency': 1})
    (search,) = plan_searches(supernet, BACKBONE, [64], config, 0.8)
    assert search.config == replace(config, min_latency=0.8 * config.max_latency)


def test_limits_are_those_of_the_part_that_is_searched(
    supernet: BackboneSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = cost_table(supernet, (3, 64, 64))
    monkeypatch.setattr('timm_mixpath.cli.adapt_plan.cost_table', lambda *_: table)
    # No kernel of a backbone is the largest, which is the fastest here
    prices = {part: 1.0 - 0.05 * (len(part) == 4 and part[-1]) for part in table.part_costs('macs')}
    table.add_metric('latency', 1.0, prices)
    part = supernet.space.without_more()
    limit = table.within(part).bounds('latency')[0]
    assert limit > table.bounds('latency')[0]
    config = SearchConfig(max_latency=limit, objectives={'loss': 1, 'latency': 1})
    assert len(plan_searches(supernet, BACKBONE, [64], config, space=part)) == 1
    config = replace(config, max_latency=limit - 0.01)
    assert len(plan_searches(supernet, BACKBONE, [64], config)) == 1
    with pytest.raises(UsageError, match=f'excludes every arch, the smallest of the space has {limit:.2f} ms'):
        plan_searches(supernet, BACKBONE, [64], config, space=part)


def test_latency_table_is_of_one_size(supernet: BackboneSupernet) -> None:
    table = object.__new__(LatencyTable)
    with pytest.raises(UsageError, match=r'a latency table is of images of one size, --img-size 32 64 names 2'):
        plan_searches(supernet, BACKBONE, [32, 64], SearchConfig(), latency_table=table)


@pytest.mark.parametrize(
    'generations, num_sizes, is_trained, expected',
    [
        (10, 1, False, [10]),
        (10, 2, False, [0, 10]),  # the first holds the backbone
        (10, 4, False, [0, 3, 3, 3]),
        (10, 4, True, [2, 2, 2, 2]),
        (10, 8, True, [2] * 8),
        (1, 3, True, [1, 1, 1]),
        (0, 3, False, [0, 0, 0]),
    ],
)
def test_sizes_share_the_evaluations(generations: int, num_sizes: int, is_trained: bool, expected: list[int]) -> None:
    config = SearchConfig(population=24, offspring=12, generations=generations)
    searches = [SizedSearch(32 * (i + 1), config, holds_backbone=i == 0) for i in range(num_sizes)]
    shared = share_evaluations(searches, is_trained)
    assert [s.config.generations for s in shared] == expected
    alone = num_sizes > 1 and not is_trained
    assert [s.config.population for s in shared] == [1 if alone and i == 0 else 24 for i in range(num_sizes)]
    assert [replace(s, config=config) for s in shared] == searches
