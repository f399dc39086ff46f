"""Statistics of paths: against sums that are really made, and at the two ends, equal and independent paths."""

import csv
import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import perturb
from timm.utils import reparameterize_model
from torch import nn

from timm_mixpath import BlockSpec, MixPathSupernet, SearchSpace, cli, sample
from timm_mixpath.analysis.path_report import format_stats
from timm_mixpath.analysis.path_statistics import (
    PathStatistics,
    StatsResult,
    _Site,
    path_statistics,
    shadow_statistics,
    sum_ratios,
)
from timm_mixpath.analysis.run import stats_checkpoint
from timm_mixpath.models.cellnet import CellSupernet
from timm_mixpath.models.cells import NB101ChoiceCell, NB201ChoiceNode
from timm_mixpath.models.choice_blocks import ActivePathSum
from timm_mixpath.models.layers import ShadowBatchNorm2d
from timm_mixpath.models.supernet import SumSite
from timm_mixpath.search.images import Batches, SearchData, load_batches
from timm_mixpath.train.data import open_dataset
from timm_mixpath.utils.errors import RunError, UsageError

DATA_CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.3,) * 3, crop_pct=1.0)

SMALL = dict(stem_chs=8, stem_stride=2, num_features=16)
SUMS = SearchSpace(  # as S1
    'stats_sums', (BlockSpec(8, 1, (2, 3), (3, 5, 7)), BlockSpec(8, 2, (2, 3), (3, 5, 7))), max_paths=3, **SMALL
)
GROUPS = SearchSpace(  # as S3: channel groups, squeeze-and-excite, swish
    'stats_groups',
    (
        BlockSpec(8, 1, (3,), (3, 5, 7), num_groups=2),
        BlockSpec(8, 2, (3, 6), (3, 5, 7), num_groups=2, se_ratio=0.5, act_layer='swish'),
    ),
    max_paths=2,
    **SMALL,
)
FULL = SearchSpace(  # as S2
    'stats_full',
    (BlockSpec(8, 1, (3,), se_ratio=0.25, act_layer='swish'), BlockSpec(16, 2, (6,))),
    max_paths=4,
    **SMALL,
)


@pytest.fixture(scope='module')
def batches(digits: Path) -> Batches:
    """40 real images, in batches of different size."""
    dataset = open_dataset('', str(digits), 'train')
    return load_batches(dataset, DATA_CONFIG, batch_size=16, max_images=40, workers=0)


def make_supernet(space: SearchSpace, **kwargs) -> MixPathSupernet:
    torch.manual_seed(0)
    return perturb(MixPathSupernet(space, num_classes=10, **kwargs)).eval()


def result_of(supernet: MixPathSupernet, batches: Batches) -> StatsResult:
    space = supernet.space
    sites, shadows = path_statistics(supernet, batches), shadow_statistics(supernet)
    return StatsResult(space.name, space.max_paths, 40, sites, shadows, {}, supernet.sum_norm)


def make_equal(supernet: MixPathSupernet) -> None:
    """Make all paths of each sum compute the same."""
    for module in supernet.modules():
        if isinstance(module, ActivePathSum):
            module.nest()
            first, *others = module.values()
            for path in others:
                path.bn.load_state_dict(first.bn.state_dict())


def make_cell_supernet(name: str, **kwargs) -> CellSupernet:
    torch.manual_seed(0)
    model = timm.create_model(f'mixpath_{name}_supernet', width=4, num_cells=1, num_classes=10, **kwargs)
    return perturb(model).eval()


def is_sum(module: nn.Module) -> bool:
    return isinstance(module, ActivePathSum | NB201ChoiceNode | NB101ChoiceCell)


def features_of(module: nn.Module, inputs: list) -> dict[str, torch.Tensor]:
    """Outputs of all paths of a sum for all images, nothing if it has not all inputs."""
    if isinstance(module, ActivePathSum):
        return {name: path(torch.cat(inputs)) for name, path in module.items()}
    if isinstance(module, NB101ChoiceCell):
        xs, paths = [projection(torch.cat(inputs)) for projection in module.projections], module.node.paths
    elif any(x is None for xs in inputs for x in xs):
        return {}
    else:
        xs, paths = [torch.cat(batches) for batches in zip(*inputs, strict=True)], module.paths
    return {name: path.op(xs[int(name[-1])]) for name, path in paths.items()}


def can_be_summed(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Paths of a cell end in the node that they come from, of which each gives one."""
    if isinstance(module, ActivePathSum):
        return True
    nodes = [int(name[-1]) for name in names]
    limit = module.max_paths if isinstance(module, NB201ChoiceNode) else len(module.projections)
    return len(set(nodes)) == len(nodes) <= limit


def plain_statistics(supernet: nn.Module, batches: Batches) -> dict[str, dict]:
    """Slow reference: keep the features of every path, and sum every set of them that can be summed."""
    found: dict[str, list[dict]] = {}  # values per arch, by sum
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [name for name, module in supernet.named_modules() if is_sum(module)]
    for name in names:
        supernet.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: inputs.setdefault(name, []).append(
                list(args[0]) if isinstance(args[0], list) else args[0]  # the cell appends to its list
            )
        )
    step = -1
    while any(len(found.get(name, [])) < 3 for name in names):
        step += 1
        inputs.clear()
        supernet.active_arch = sample(supernet.space, seed=0, step=step)
        with torch.no_grad():
            for x, _ in batches:
                supernet(x)
            for name, xs in inputs.items():
                module = supernet.get_submodule(name)
                features = features_of(module, xs)
                if not features:
                    continue
                flat = [f.flatten(1) for f in features.values()]
                values = {'cosine': torch.tensor([[F.cosine_similarity(a, b).mean() for b in flat] for a in flat])}
                for k in range(1, supernet.space.max_paths + 1):
                    sets = [s for s in combinations(features, k) if can_be_summed(module, s)]
                    if sets:
                        of_sums = moments([sum(features[name] for name in s) for s in sets])
                        of_one = moments([features[name] for s in sets for name in s])
                        values.update({f'mean {k}': of_sums[0], f'var {k}': of_sums[1]})
                        values.update({f'mean of one of {k}': of_one[0], f'var of one of {k}': of_one[1]})
                found.setdefault(name, []).append(values)
    return {
        name: {key: torch.stack([v[key] for v in values]).mean(0) for key in values[0]}
        for name, values in found.items()
    }


def moments(features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norm of the mean over images and positions, and total variance; mean over the features."""
    means = torch.stack([f.mean((0, 2, 3)).square().sum() for f in features])
    variances = torch.stack([f.var((0, 2, 3), unbiased=False).sum() for f in features])
    return means.mean(), variances.mean()


def assert_ratios_are_those_of(site: PathStatistics, found: dict[str, torch.Tensor]) -> None:
    ks = range(1, sum(key.startswith('var of one') for key in found) + 1)
    for kind, ratios in (('mean', [v**2 for v in site.mean_ratio]), ('var', site.var_ratio)):
        expected = [(found[f'{kind} {k}'] / found[f'{kind} of one of {k}']).item() for k in ks]
        assert ratios == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(('space', 'sbn'), [(SUMS, True), (GROUPS, True), (GROUPS, False), (FULL, False)])
def test_statistics_are_those_of_sums_that_are_made(space: SearchSpace, sbn: bool, batches: Batches) -> None:
    supernet = make_supernet(space, sum_norm='sbn' if sbn else 'bn').double()
    batches = [(x.double(), y) for x, y in batches]
    sites = path_statistics(supernet, batches)
    assert [s.name for s in sites] == [n for n, m in supernet.named_modules() if isinstance(m, ActivePathSum)]
    expected = plain_statistics(supernet, batches)
    for site in sites:
        found = expected[site.name]
        assert site.num_images == 40 and site.num_archs >= 3 and site.paths == tuple(supernet.get_submodule(site.name))
        torch.testing.assert_close(torch.tensor(site.cosine), found['cosine'].float(), rtol=1e-5, atol=1e-6)
        assert len(site.mean_ratio) == len(site.var_ratio) == space.max_paths
        assert_ratios_are_those_of(site, found)


@pytest.mark.parametrize(('name', 'm'), [('nb201', None), ('nb201', 2), ('nb101', None), ('nb101', 2)])
def test_statistics_of_cells_are_those_of_sums_that_can_be_made(name: str, m: int | None, batches: Batches) -> None:
    """Operations on one edge, or in one parallel node, are alternatives."""
    supernet = make_cell_supernet(name, m=m).double()
    batches = [(x.double(), y) for x, y in batches]
    sites = path_statistics(supernet, batches)
    expected = plain_statistics(supernet, batches)
    assert [s.name for s in sites] == [n for n, module in supernet.named_modules() if is_sum(module)]
    assert set(expected) == {s.name for s in sites}
    for site in sites:
        found = expected[site.name]
        torch.testing.assert_close(torch.tensor(site.cosine), found['cosine'].float(), rtol=1e-5, atol=1e-6)
        assert_ratios_are_those_of(site, found)
        pairs = []
        for (p, a), (q, b) in combinations(enumerate(site.paths), 2):
            if a[-1] != b[-1]:
                pairs.append((p, q))
        assert site.pairs == tuple(pairs) and site.has_sums == bool(pairs)
        assert math.isnan(site.correlation) != site.has_sums
        if m is None and pairs:  # of all pairs alike a sum of two consists
            assert site.var_ratio[1] == pytest.approx(2 * (1 + site.correlation), rel=1e-9)


@pytest.mark.parametrize(('name', 'm'), [('nb201', None), ('nb201', 2), ('nb101', None), ('nb101', 3)])
def test_path_sets_are_those_that_archs_activate(name: str, m: int | None) -> None:
    supernet = make_cell_supernet(name, m=m)
    sums = next(iter(supernet.get_cells().values()))
    sums = [(sums, sums.node)] if name == 'nb101' else [(node, node) for node in sums.nodes]
    seen: list[set] = [set() for _ in sums]
    supernet.sampling = 'uniform'
    for _ in range(4000):
        supernet._sample()
        for active, (_, node) in zip(seen, sums):
            active.add(frozenset(node.active))
    for active, (site, _) in zip(seen, sums):
        assert active - {frozenset()} == set(map(frozenset, site.path_sets()))


def test_archs_are_drawn_as_the_supernet_was_trained(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict] = []

    def spy(space: SearchSpace, **kwargs) -> str:
        drawn.append(kwargs)
        return sample(space, **kwargs)

    monkeypatch.setattr('timm_mixpath.analysis.path_statistics.sample', spy)
    path_statistics(make_supernet(GROUPS, sampling='fair'), batches, num_archs=2)
    assert drawn == [dict(seed=0, step=step, strategy='fair') for step in range(2)]


def test_alternatives_are_not_among_the_sums(batches: Batches) -> None:
    result = result_of(make_cell_supernet('nb201', sum_norm='none'), batches)
    text = format_stats(result)
    assert re.search(r'^cosine similarity of different paths: .* over 6 sums$', text, re.MULTILINE)
    assert re.search(r'^cosine similarity of alternatives: .* at 3 places where no two', text, re.MULTILINE)
    assert re.search(r'at \d of 6 sums$', text, re.MULTILINE) and 'nan' not in text
    assert 'no norm stands behind a sum' in text and 'single batch norm' not in text


def test_single_precision_is_enough(batches: Batches) -> None:
    supernet = make_supernet(GROUPS)
    single = path_statistics(supernet, batches)
    double = path_statistics(supernet.double(), [(x.double(), y) for x, y in batches])
    for a, b in zip(single, double, strict=True):
        assert a.var_ratio == pytest.approx(b.var_ratio, rel=1e-5) and a.cosine_min == pytest.approx(
            b.cosine_min, abs=1e-5
        )


@pytest.mark.parametrize('space', [SUMS, GROUPS])
def test_equal_paths_sum_to_k_times_one(space: SearchSpace, batches: Batches) -> None:
    supernet = make_supernet(space)
    make_equal(supernet)
    result = result_of(supernet, batches)
    for site in result.sites:
        assert [v for row in site.cosine for v in row] == pytest.approx([1.0] * 9, abs=1e-5)
        assert site.correlation == pytest.approx(1.0, abs=1e-5)
        assert site.mean_ratio == pytest.approx(range(1, space.max_paths + 1), rel=1e-5)
        assert site.var_ratio == pytest.approx([k * k for k in range(1, space.max_paths + 1)], rel=1e-5)
    assert f'nearer to k equal paths than to k uncorrelated ones at {len(result.sites)} of' in format_stats(result)


ALL_OF_3 = [names for k in (1, 2, 3) for names in combinations('abc', k)]


@pytest.mark.parametrize(('positive', 'cosine'), [(False, 0.0), (True, 2 / math.pi)])
def test_independent_paths(positive: bool, cosine: float) -> None:
    """The other end: variances add up, although positive features have a similarity far above 0."""
    generator = torch.Generator().manual_seed(0)
    site = _Site()
    for _ in range(4):
        noise = torch.randn(3, 20, 8, 12, 12, generator=generator)
        site.add(dict(zip('abc', noise.abs() if positive else noise)))
    site.end_arch()
    found = site.result('site', 80, ALL_OF_3)
    assert found.var_ratio == pytest.approx((1, 2, 3), rel=0.01) and abs(found.correlation) < 0.01
    assert found.pair_cosines == pytest.approx([cosine] * 3, abs=0.01)
    if positive:
        assert found.mean_ratio == pytest.approx((1, 2, 3), rel=0.01)


def test_sum_ratios_are_means_over_all_sets() -> None:
    factors = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = factors @ factors.T
    sets = [s for k in range(1, 6) for s in combinations(range(5), k)]
    means = [
        torch.stack([factors[list(s)].sum(0).square().sum() for s in sets if len(s) == k]).mean() for k in range(1, 6)
    ]
    assert sum_ratios(matrix, sets) == pytest.approx([(m / means[0]).item() for m in means])
    own = matrix.trace().item() / 5
    pair = (matrix.sum() - matrix.trace()).item() / 20
    assert sum_ratios(matrix, sets) == pytest.approx([k + k * (k - 1) * pair / own for k in range(1, 6)])
    assert all(math.isnan(v) for v in sum_ratios(torch.zeros(2, 2), [(0,), (1,), (0, 1)]))


def test_sum_ratios_where_operations_of_one_source_exclude_each_other() -> None:
    """With as many operations per source, a pair of different sources is in as many sets as any other."""
    factors = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = factors @ factors.T
    sources = [(0, 1), (2, 3), (4, 5)]
    sets = [s for k in (1, 2, 3) for chosen in combinations(sources, k) for s in product(*chosen)]
    own = matrix.trace().item() / 6
    pair = torch.stack([matrix[p, q] for p in range(6) for q in range(6) if p // 2 != q // 2]).mean().item()
    assert sum_ratios(matrix, sets) == pytest.approx([k + k * (k - 1) * pair / own for k in (1, 2, 3)])


def test_ratios_have_their_ends_where_single_paths_differ_in_size() -> None:
    """Sums of two are not of the paths that stand alone, as in NAS-Bench-101: still 2 and 4 are the ends."""
    sets = [(0,), (1, 2)]
    assert sum_ratios(torch.diag(torch.tensor([100.0, 1.0, 3.0])), sets) == (1, 2)
    matrix = torch.ones(3, 3)
    matrix[0, 0] = 100
    assert sum_ratios(matrix, sets) == (1, 4)


def test_archs_count_alike_and_their_means_do_not_add_to_the_variance() -> None:
    """A batch norm sees one arch at a time: that archs differ in their means is not variance."""
    noise = torch.randn(2, 50, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = _Site(), _Site()
    for site, offsets in ((one, [0.0]), (two, [0.0, 100.0])):
        for offset in offsets:
            site.add(dict(zip('ab', noise + offset)))
            site.end_arch()
    sets = ['a', 'b', 'ab']
    assert two.result('', 50, sets).var_ratio == pytest.approx(one.result('', 50, sets).var_ratio, rel=1e-9)
    assert two.num_archs == 2


class ListSum(nn.Module):
    """A sum as a cell has it: a list of inputs, some of which are None."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleDict({name: nn.Conv2d(3, 8, 3, padding=1) for name in ('a', 'b')})

    def forward(self, inputs: list[torch.Tensor | None], scale: float = 1.0) -> torch.Tensor:
        return self.path_outputs(inputs, scale=scale)['a']

    def path_outputs(self, inputs: list[torch.Tensor | None], scale: float = 1.0) -> dict[str, torch.Tensor]:
        (x,) = [x for x in inputs if x is not None]
        return {name: scale * path(x) for name, path in self.paths.items()}


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = ListSum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site([None, x], scale=2.0)


def test_any_module_that_offers_its_paths_is_looked_at(batches: Batches) -> None:
    supernet = make_supernet(GROUPS)
    supernet.conv_stem = Stem()
    assert isinstance(supernet.conv_stem.site, SumSite) and not isinstance(supernet.conv_stem, SumSite)
    first = path_statistics(supernet, batches)[0]
    assert first.name == 'conv_stem.site' and first.paths == ('a', 'b') and first.num_channels == 8
    with torch.no_grad():
        a, b = (torch.cat([path(x) for x, _ in batches]).flatten(1) for path in supernet.conv_stem.site.paths.values())
    assert first.cosine_mean == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-5)


@pytest.mark.parametrize('fail', [False, True])
def test_supernet_is_left_as_it_was(fail: bool, batches: Batches) -> None:
    supernet = make_supernet(SUMS)
    arch = sample(supernet.space, seed=5, step=5)
    supernet.active_arch = arch
    supernet.train()
    supernet(batches[0][0])
    supernet.conv_head.eval()  # frozen by hand
    modes = [m.training for m in supernet.modules()]
    state = {k: v.clone() for k, v in supernet.state_dict().items()}
    if fail:
        with pytest.raises(RuntimeError):
            path_statistics(supernet, [(torch.zeros(2, 5, 16, 16), torch.zeros(2))])
    else:
        path_statistics(supernet, batches)
    assert [m.training for m in supernet.modules()] == modes
    assert supernet.active_arch == arch and int(supernet.sample_step) == supernet._step == 1
    assert all(torch.equal(v, state[k]) for k, v in supernet.state_dict().items())
    assert not any(m._forward_pre_hooks for m in supernet.modules())
    assert all(p.grad is None for p in supernet.parameters())


def test_eval_mode_statistics_do_not_depend_on_the_mode_before(batches: Batches) -> None:
    supernet = make_supernet(GROUPS)
    assert path_statistics(supernet, batches) == path_statistics(supernet.train(), batches)


def test_sums_that_did_not_run_are_left_out_and_said(batches: Batches, caplog: pytest.LogCaptureFixture) -> None:
    supernet = make_supernet(SUMS)
    sites = path_statistics(supernet, batches, num_archs=1)
    assert len(sites) == 2 and {s.num_archs for s in sites} == {1}
    assert '2 of 4 sums did not run in 1 archs' in caplog.text
    caplog.clear()
    assert len(path_statistics(supernet, batches)) == 4 and not caplog.text


def test_m_of_1_has_similarities_but_no_sums(batches: Batches) -> None:
    result = result_of(make_supernet(GROUPS, m=1), batches)
    assert len(result.sites) == 6 and all(len(s.pair_cosines) == 3 and s.mean_ratio == (1.0,) for s in result.sites)
    text = format_stats(result)
    assert 'm = 1: paths are never summed' in text and 'sum of 2' not in text


def test_single_candidate_is_nothing_to_compare(batches: Batches) -> None:
    space = SearchSpace('stats_single', (BlockSpec(8, kernel_sizes=(3,)),), stem_chs=8, num_features=16, max_paths=1)
    result = result_of(make_supernet(space), batches)
    assert result.sites == [] and 'nothing to compare' in format_stats(result)


def shadow_names(supernet: MixPathSupernet) -> Iterator[tuple[str, ShadowBatchNorm2d]]:
    return ((n, m) for n, m in supernet.named_modules() if isinstance(m, ShadowBatchNorm2d))


@pytest.mark.parametrize('space', [SUMS, GROUPS])
def test_shadow_statistics(space: SearchSpace) -> None:
    supernet = make_supernet(space)
    for _, sbn in shadow_names(supernet):
        for k, bn in enumerate(sbn.shadows, 1):
            bn.running_mean.copy_(k * torch.linspace(-3, 4, len(bn.running_mean)))
            bn.running_var.fill_(0.5 * k**2)
            bn.weight.data.fill_(-0.1 * k)
            bn.bias.data.fill_(0.2)
            bn.num_batches_tracked.fill_(10 * k)
    found = shadow_statistics(supernet)
    assert [s.name for s in found] == [name for name, _ in shadow_names(supernet)]
    ks = range(1, space.max_paths + 1)
    for s in found:
        assert s.mean_norm[0] == pytest.approx(torch.linspace(-3, 4, s.num_channels).norm().item())
        assert s.mean_ratio == pytest.approx(ks) and s.var_ratio == pytest.approx([k * k for k in ks])
        assert s.var[0] == 0.5 and s.weight == pytest.approx([0.1 * k for k in ks]) and s.bias[0] == pytest.approx(0.2)
        assert s.num_batches == tuple(10 * k for k in ks)


def test_untrained_shadows_have_no_ratio(batches: Batches) -> None:
    supernet = make_supernet(SUMS)
    for _, sbn in shadow_names(supernet):
        sbn.shadows[0].num_batches_tracked.fill_(5)
    result = result_of(supernet, batches)
    assert all(s.var_ratio[0] == 1 and all(map(math.isnan, s.var_ratio[1:])) for s in result.shadows)
    text = format_stats(result)
    assert '4 of 12 shadows have seen fewer than 22 batches' in text
    assert '8 of 12 shadows were never trained' in text and 'shadow 2 relative' not in text and 'nan' not in text


def test_supernet_without_shadows_says_so(batches: Batches) -> None:
    result = result_of(make_supernet(GROUPS, sum_norm='bn'), batches)
    assert result.shadows == [] and 'a single batch norm stands behind every sum' in format_stats(result)
    assert 'sum of 2 paths: mean' in format_stats(result)


def test_wrong_supernets_and_images(batches: Batches) -> None:
    supernet = make_supernet(GROUPS)
    for function in (lambda model: path_statistics(model, batches), shadow_statistics):
        with pytest.raises(UsageError, match=r'MixPath is no supernet; .* need one'):
            function(timm.create_model('mixpath_nano'))
        with pytest.raises(UsageError, match='are folded; pass the supernet it was made of'):
            function(reparameterize_model(supernet))
    with pytest.raises(UsageError, match='1 images are too few'):
        path_statistics(supernet, [(batches[0][0][:1], batches[0][1][:1])])
    with pytest.raises(UsageError, match='number of archs 0'):
        path_statistics(supernet, batches, num_archs=0)
    supernet.bn1.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match=r'paths of blocks\.0\.0\.e3\.paths\.g0 are not finite'):
        path_statistics(supernet, batches)


def test_paths_that_change_are_an_error() -> None:
    site = _Site()
    site.add({'a': torch.ones(1, 1, 1, 1), 'b': torch.ones(1, 1, 1, 1)})
    with pytest.raises(ValueError, match='must stay the same'):
        site.add({'a': torch.ones(1, 1, 1, 1)})


def test_dead_paths_are_undefined_not_an_error() -> None:
    site = _Site()
    site.add({'a': torch.zeros(2, 3, 2, 2), 'b': torch.zeros(2, 3, 2, 2)})
    site.end_arch()
    found = site.result('dead', 2, ['a', 'b', 'ab'])
    assert found.cosine_mean == 0 and math.isnan(found.correlation) and math.isnan(found.var_ratio[1])
    assert 'undefined' in format_stats(StatsResult('x', 2, 2, [found], [], {}))


def test_files_of_a_checkpoint(supernet_run: Path, tmp_path: Path) -> None:
    """The files say what the result says, and the images are those that the training held out."""
    result = stats_checkpoint(
        supernet_run / 'last.pth.tar', tmp_path / 'out', SearchData(num_images=16), workers=0, device='cpu'
    )
    assert result.num_images == 16 and result.source['holdout'] == 0.1
    content = json.loads((tmp_path / 'out' / 'stats.json').read_text(), parse_constant=pytest.fail)
    assert 'not published' in content['protocol'] and content['max_paths'] == 2
    assert [s['cosine'] for s in content['sites']] == [[list(row) for row in s.cosine] for s in result.sites]
    assert [s['num_batches'] for s in content['shadows']] == [list(s.num_batches) for s in result.shadows]

    rows = list(csv.DictReader((tmp_path / 'out' / 'stats.csv').read_text().splitlines()))
    sums = {(r['name'], int(r['k'])): r for r in rows if r['kind'] == 'sum'}
    shadows = {(r['name'], int(r['k'])): r for r in rows if r['kind'] == 'shadow'}
    assert len(rows) == len(sums) + len(shadows) == 64
    for site in result.sites:
        for k in (1, 2):
            row = sums[site.name, k]
            assert float(row['var_ratio']) == site.var_ratio[k - 1] and float(row['cosine_min']) == site.cosine_min
            assert row['num_candidates'] == '3' and row['weight'] == ''
    for sbn in result.shadows:
        ratio = shadows[sbn.name, 2]['var_ratio']
        assert (float(ratio) if ratio else math.nan) == pytest.approx(sbn.var_ratio[1], nan_ok=True)
    assert (tmp_path / 'out' / 'stats.png').read_bytes().startswith(b'\x89PNG')


def test_only_the_first_process_writes(
    supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def second(process: Namespace) -> None:
        process.rank, process.distributed = 1, False

    monkeypatch.setattr('timm_mixpath.utils.distributed.init_device', second)
    for name, value in (('RANK', '1'), ('LOCAL_RANK', '1'), ('WORLD_SIZE', '2')):
        monkeypatch.setenv(name, value)
    words = ['stats', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--num-images', '8', '-j', '0']
    assert cli.main([*words, '--device', 'cpu', '--output', str(tmp_path / 'out')]) == 0
    assert not list((tmp_path / 'out').iterdir()) and not capsys.readouterr().out


def test_command_takes_images_as_a_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple] = []
    result = StatsResult('x', 1, 2, [], [], {})
    monkeypatch.setattr(
        'timm_mixpath.cli.rank.stats_checkpoint', lambda *args, **kw: given.append((args, kw)) or result
    )
    assert cli.main(['stats', '--checkpoint', 'x', '--dataset', 'torch/cifar10', '--search-split', 'test']) == 0
    ((_, _, data), kwargs) = given[0]
    assert data == SearchData(dataset='torch/cifar10', search_split='test', num_images=512)
    assert kwargs['batch_size'] == 32


def test_output_that_can_not_be_written_is_said_first(supernet_run: Path) -> None:
    with pytest.raises(RunError, match='/dev/null/x'):
        stats_checkpoint(supernet_run / 'last.pth.tar', '/dev/null/x', workers=0)


def test_result_is_the_same_twice(supernet_run: Path) -> None:
    run = [stats_checkpoint(supernet_run / 'last.pth.tar', data=SearchData(num_images=8), workers=0) for _ in range(2)]
    assert run[0].sites == run[1].sites and isinstance(run[0].sites[0], PathStatistics)
