"""Statistics of paths: against sums that are really made, and at the two ends, equal and independent paths."""

import csv
import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import perturb
from timm.utils import reparameterize_model
from torch import nn

from timm_mixpath import BlockSpec, MixPathSupernet, SearchSpace, sample
from timm_mixpath.blocks import ActivePathSum
from timm_mixpath.data import open_dataset
from timm_mixpath.errors import RunError, UsageError
from timm_mixpath.evaluate import Batches, load_batches
from timm_mixpath.layers import ShadowBatchNorm2d
from timm_mixpath.pipeline import SearchData
from timm_mixpath.stats import (
    PathStatistics,
    StatsResult,
    SumSite,
    _Site,
    format_stats,
    path_statistics,
    shadow_statistics,
    stats_checkpoint,
    sum_ratios,
)

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
    return StatsResult(
        space.name, space.max_paths, 40, path_statistics(supernet, batches), shadow_statistics(supernet), {}
    )


def make_equal(supernet: MixPathSupernet) -> None:
    """Make all paths of each sum compute the same."""
    for module in supernet.modules():
        if isinstance(module, ActivePathSum):
            module.nest()
            first, *others = module.values()
            for path in others:
                path.bn.load_state_dict(first.bn.state_dict())


def plain_statistics(supernet: MixPathSupernet, batches: Batches) -> dict[str, dict]:
    """Slow reference: keep the features of every path, and sum every set of them."""
    found: dict[str, list[dict]] = {}  # values per arch, by sum
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [name for name, module in supernet.named_modules() if isinstance(module, ActivePathSum)]
    for name in names:
        supernet.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0])
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
                features = [path(torch.cat(xs)) for path in supernet.get_submodule(name).values()]
                flat = [f.flatten(1) for f in features]
                values = {'cosine': torch.tensor([[F.cosine_similarity(a, b).mean() for b in flat] for a in flat])}
                for k in range(1, supernet.space.max_paths + 1):
                    sums = [sum(subset) for subset in combinations(features, k)]
                    values[f'mean {k}'] = torch.stack([s.mean((0, 2, 3)).square().sum() for s in sums]).mean()
                    values[f'var {k}'] = torch.stack([s.var((0, 2, 3), unbiased=False).sum() for s in sums]).mean()
                found.setdefault(name, []).append(values)
    return {
        name: {key: torch.stack([v[key] for v in values]).mean(0) for key in values[0]}
        for name, values in found.items()
    }


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
        for k in range(1, space.max_paths + 1):
            mean = (found[f'mean {k}'] / found['mean 1']).sqrt().item()
            assert site.mean_ratio[k - 1] == pytest.approx(mean, rel=1e-9)
            assert site.var_ratio[k - 1] == pytest.approx((found[f'var {k}'] / found['var 1']).item(), rel=1e-9)


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


@pytest.mark.parametrize(('positive', 'cosine'), [(False, 0.0), (True, 2 / math.pi)])
def test_independent_paths(positive: bool, cosine: float) -> None:
    """The other end: variances add up, although positive features have a similarity far above 0."""
    generator = torch.Generator().manual_seed(0)
    site = _Site()
    for _ in range(4):
        noise = torch.randn(3, 20, 8, 12, 12, generator=generator)
        site.add(dict(zip('abc', noise.abs() if positive else noise)))
    site.end_arch()
    found = site.result('site', 3, 80)
    assert found.var_ratio == pytest.approx((1, 2, 3), rel=0.01) and abs(found.correlation) < 0.01
    assert found.pair_cosines == pytest.approx([cosine] * 3, abs=0.01)
    if positive:
        assert found.mean_ratio == pytest.approx((1, 2, 3), rel=0.01)


def test_sum_ratios_are_means_over_all_sets() -> None:
    factors = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = factors @ factors.T
    means = [
        torch.stack([matrix[list(s)][:, list(s)].sum() for s in combinations(range(5), k)]).mean() for k in range(1, 6)
    ]
    assert sum_ratios(matrix, 5) == pytest.approx([(m / means[0]).item() for m in means])
    assert all(math.isnan(v) for v in sum_ratios(torch.zeros(2, 2), 2))


def test_archs_count_alike_and_their_means_do_not_add_to_the_variance() -> None:
    """A batch norm sees one arch at a time: that archs differ in their means is not variance."""
    noise = torch.randn(2, 50, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = _Site(), _Site()
    for site, offsets in ((one, [0.0]), (two, [0.0, 100.0])):
        for offset in offsets:
            site.add(dict(zip('ab', noise + offset)))
            site.end_arch()
    assert two.result('', 2, 50).var_ratio == pytest.approx(one.result('', 2, 50).var_ratio, rel=1e-9)
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
    assert '8 of 12 shadows were never trained' in text and 'shadow 2 relative' not in text and 'nan' not in text


def test_supernet_without_shadows_says_so(batches: Batches) -> None:
    result = result_of(make_supernet(GROUPS, sum_norm='bn'), batches)
    assert result.shadows == [] and 'a single batch norm stands behind every sum' in format_stats(result)
    assert 'sum of 2 paths: mean' in format_stats(result)


def test_wrong_supernets_and_images(batches: Batches) -> None:
    supernet = make_supernet(GROUPS)
    for function in (lambda model: path_statistics(model, batches), shadow_statistics):
        with pytest.raises(UsageError, match=r'MixPath is no supernet; .* need a supernet'):
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
    found = site.result('dead', 2, 2)
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


def test_output_that_can_not_be_written_is_said_first(supernet_run: Path) -> None:
    with pytest.raises(RunError, match='/dev/null/x'):
        stats_checkpoint(supernet_run / 'last.pth.tar', '/dev/null/x', workers=0)


def test_result_is_the_same_twice(supernet_run: Path) -> None:
    run = [stats_checkpoint(supernet_run / 'last.pth.tar', data=SearchData(num_images=8), workers=0) for _ in range(2)]
    assert run[0].sites == run[1].sites and isinstance(run[0].sites[0], PathStatistics)
