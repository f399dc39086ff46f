"""`timm_mixpath.models.cost` against the networks themselves, counted by `torch.utils.flop_counter`."""

import itertools
import pickle
import statistics
import time

import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mixpath import Arch, BlockSpec, SearchSpace, get_space, sample
from timm_mixpath.models.cost import CostTable, cost_table, profile_space
from timm_mixpath.models.latency import measure_latency
from timm_mixpath.models.mixpath import MixPath
from timm_mixpath.utils.errors import UsageError

# Different numbers of expansions and kernels per block, not in order
TINY = SearchSpace(
    name='tiny_cost',
    blocks=(
        BlockSpec(8, expand_ratios=(2,), kernel_sizes=(5, 3)),
        BlockSpec(8, expand_ratios=(4, 1), kernel_sizes=(1, 7, 3)),
        BlockSpec(16, stride=2, expand_ratios=(1,), kernel_sizes=(3, 9)),
    ),
    stem_chs=8,
    num_features=24,
    max_paths=2,
    input_size=(3, 15, 11),
    num_classes=7,
)


@pytest.fixture(scope='module', autouse=True)
def single_thread():
    """Many tiny networks: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def true_cost(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """MACs and parameters of a real network."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *input_size))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return {'macs': flops // 2, 'params': sum(p.numel() for p in model.parameters())}


def table_cost(table: CostTable, arch: Arch | str) -> dict[str, int]:
    return {metric: table.cost(metric, arch) for metric in table.metrics}


def archs_of(space: SearchSpace, num: int, seed: int = 0) -> list[Arch]:
    return [sample(space, seed=seed, step=step) for step in range(num)]


@pytest.fixture(scope='module')
def s1() -> CostTable:
    return CostTable(get_space('s1'))


@pytest.fixture(scope='module')
def nano() -> CostTable:
    return CostTable(get_space('nano'))


@pytest.fixture(scope='module')
def brute_force() -> dict[Arch, dict[str, int]]:
    """Cost of every arch of the tiny space."""
    archs = [Arch.from_blocks(choices) for choices in itertools.product(*(TINY.choices(i) for i in range(3)))]
    assert len(set(archs)) == TINY.size
    return {a: true_cost(MixPath(TINY, a, num_classes=7), TINY.input_size) for a in archs}


@pytest.mark.parametrize('name,num', [('s1', 10), ('nano', 15)])
def test_equals_created_model(name, num, request):
    table = request.getfixturevalue(name)
    for arch in archs_of(table.space, num):
        model = timm.create_model(f'mixpath_{name}', arch=str(arch))
        assert table_cost(table, arch) == true_cost(model, table.input_size), arch


def test_equals_every_arch_of_a_space(brute_force):
    table = CostTable(TINY)
    for arch, cost in brute_force.items():
        assert table_cost(table, arch) == cost, arch


@pytest.mark.parametrize(
    'kwargs,input_size',
    [
        (dict(m=1), (3, 65, 48)),
        (dict(m=3, sum_norm='bn', width_mult=0.5), None),
        (dict(in_chans=1), None),
        (dict(in_chans=1, width_mult=0.75, num_classes=100), (1, 28, 28)),
        (dict(num_classes=0, norm_layer='groupnorm1', sum_norm='bn'), None),
        (dict(act_layer='prelu', width_mult=1.3), None),
        (dict(act_layer='hard_swish', output_stride=4, global_pool='catavgmax', drop_path_rate=0.1), None),
        (dict(bn_eps=1e-3, dtype=torch.bfloat16, pretrained_cfg_overlay=dict(input_size=(3, 40, 40))), (3, 40, 40)),
    ],
    ids=str,
)
def test_equals_extracted_model(kwargs, input_size):
    supernet = timm.create_model('mixpath_nano_supernet', **kwargs)
    # The input size of the cfg must be found without being told
    table = cost_table(supernet, None if 'pretrained_cfg_overlay' in kwargs else input_size)
    input_size = input_size or (kwargs.get('in_chans', 3), 32, 32)
    assert table.input_size == input_size
    assert table.space == supernet.space
    for arch in archs_of(supernet.space, 2):
        assert table_cost(table, arch) == true_cost(supernet.extract(arch).float(), input_size), arch


# Four channel groups that do not divide the channels, squeeze-and-excite, grouped 1x1, a fixed block in front
GROUPED = SearchSpace(
    name='grouped_cost',
    blocks=(
        BlockSpec(10, 2, (5, 3), (5, 3), num_groups=3, pwl_groups=2, se_ratio=0.5, act_layer='swish'),
        BlockSpec(10, 1, (3,), (3, 7), num_groups=2, exp_groups=2),
    ),
    stem_chs=8,
    ds_chs=9,
    num_features=16,
    max_paths=1,
    input_size=(3, 12, 12),
    num_classes=5,
)


@pytest.mark.parametrize('m', [1, 2])
def test_channel_groups_equal_every_arch_and_brute_force_bounds(m):
    space = GROUPED.with_max_paths(m)
    table = CostTable(space)
    archs = [Arch.from_blocks(choices) for choices in itertools.product(*(space.choices(i) for i in range(2)))]
    assert len(set(archs)) == space.size
    if m == 2:
        archs = archs[::7] + [table.smallest(metric) for metric in table.metrics]
        archs += [table.largest(metric) for metric in table.metrics]
    # What a supernet with m > 1 hands out has a batch norm behind its sums, whether an arch needs it or not
    costs = {a: true_cost(MixPath(space, a, num_classes=5, norm_sums=m > 1), space.input_size) for a in archs}
    for arch, cost in costs.items():
        assert table_cost(table, arch) == cost, arch
    for metric in table.metrics:
        values = [cost[metric] for cost in costs.values()]
        assert table.bounds(metric) == (min(values), max(values))


@pytest.mark.parametrize('kwargs', [dict(m=1), dict(m=2, num_classes=3), dict(act_layer='prelu')], ids=str)
@pytest.mark.parametrize('name', ['s2', 's3'])
def test_imagenet_spaces_equal_extracted_model(name, kwargs):
    supernet = timm.create_model(f'mixpath_{name}_supernet', **kwargs)
    table = cost_table(supernet, (3, 64, 64))
    for arch in archs_of(supernet.space, 2):
        assert table_cost(table, arch) == true_cost(supernet.extract(arch), (3, 64, 64)), arch


def test_counts_for_another_task_than_the_supernets():
    supernet = timm.create_model('mixpath_nano_supernet', num_classes=10)
    table = cost_table(supernet, (3, 64, 48), num_classes=100)
    arch = supernet.space.default_arch
    assert table_cost(table, arch) == true_cost(
        timm.create_model('mixpath_nano', arch=arch, num_classes=100), (3, 64, 48)
    )


def test_follows_reset_classifier():
    supernet = timm.create_model('mixpath_nano_supernet')
    supernet.reset_classifier(23, 'avgmax')
    arch = sample(supernet.space, seed=0, step=0)
    table = cost_table(supernet)
    assert table_cost(table, arch) == true_cost(supernet.extract(arch), (3, 32, 32))


def test_scaled_space():
    width_mult = 0.5
    space = get_space('s1').scaled(width_mult)
    table = CostTable(space, num_classes=100, input_size=(1, 20, 36))
    for arch in archs_of(space, 2):
        model = timm.create_model('mixpath_s1', arch=str(arch), num_classes=100, in_chans=1, width_mult=width_mult)
        assert table_cost(table, arch) == true_cost(model, (1, 20, 36))


def test_classes_cost_what_a_linear_layer_costs(nano):
    space = nano.space
    arch, features = space.default_arch, space.num_features
    bare = CostTable(space, num_classes=0)
    assert (nano.num_classes, bare.num_classes) == (10, 0)
    assert nano.macs(arch) - bare.macs(arch) == 10 * features
    assert nano.params(arch) - bare.params(arch) == 10 * features + 10


def test_s1_facts(s1):
    """Measured with torch.utils.flop_counter on CPU networks; 32x32, m = 4, 10 classes."""
    golden = {
        ','.join(['k3_e3'] * 12): dict(macs=242_772_480, params=2_887_434),
        ','.join(['k3+5+7+9_e6'] * 12): dict(macs=681_275_904, params=7_106_730),
    }
    for arch, cost in golden.items():
        assert true_cost(timm.create_model('mixpath_s1', arch=arch), (3, 32, 32)) == cost
        assert table_cost(s1, arch) == cost
        print(f'S1 {arch.split(",")[0]} in every block: {cost["macs"]:,} MACs, {cost["params"]:,} params')
    smallest, largest = golden
    for metric in s1.metrics:
        assert (s1.smallest(metric), s1.largest(metric)) == (smallest, largest)
        assert s1.bounds(metric) == (golden[smallest][metric], golden[largest][metric])


@pytest.mark.parametrize('m', [1, 2])
def test_bounds_equal_brute_force(m, brute_force):
    space = TINY.with_max_paths(m)
    table = CostTable(space)
    costs = {a: cost for a, cost in brute_force.items() if all(max(block.num_paths) <= m for block in a.blocks)}
    assert len(costs) == space.size
    for metric in table.metrics:
        values = [cost[metric] for cost in costs.values()]
        assert table.bounds(metric) == (min(values), max(values))
        assert costs[table.smallest(metric)][metric] == min(values)
        assert costs[table.largest(metric)][metric] == max(values)


@pytest.mark.parametrize('m', [1, 3])
def test_bounds_respect_m(m, nano):
    table = CostTable(get_space('nano', m=m))
    largest = table.largest('macs')
    assert all(block.num_paths == (m,) for block in largest.blocks)
    assert (table.macs(largest) > nano.macs(nano.largest('macs'))) == (m > nano.space.max_paths)
    for arch in archs_of(table.space, 50):
        for metric in table.metrics:
            low, high = table.bounds(metric)
            assert low <= table.cost(metric, arch) <= high


def test_any_spelling(nano):
    arch = Arch(','.join(['k5+3_e6'] * 8))
    spelled = ', '.join([' k5+3_e6'] * 8)
    for text in (spelled, str(arch), arch, spelled):
        assert nano.macs(text) == nano.macs(arch)


@pytest.mark.parametrize(
    'arch,message',
    [
        ('k3_e6', 'needs 8'),
        (','.join(['k3_e6'] * 9), 'needs 8'),
        (','.join(['k9_e6'] * 8), 'kernel 9'),
        (','.join(['k3_e4'] * 8), 'expansion 4'),
        (','.join(['k3.3_e6'] * 8), 'channel groups'),
        (','.join(['k3+5+7_e6'] * 8), 'at most m=2'),
        (','.join(['k3_e6'] * 7) + ',nonsense', 'nonsense'),
        ('', 'block 0'),
        (None, 'NoneType'),
        (7, 'int'),
    ],
)
def test_arch_outside_the_space(arch, message, nano):
    nano.macs(nano.space.default_arch)  # known choices must not make a bad arch pass
    for metric in nano.metrics:
        with pytest.raises(ValueError, match=message):
            nano.cost(metric, arch)


@pytest.mark.parametrize('metric', ['flops', 'latency_ms', '', None])
def test_unknown_metric(metric, nano):
    arch = nano.space.default_arch
    for call in (lambda: nano.cost(metric, arch), *(lambda f=f: f(metric) for f in (nano.bounds, nano.largest))):
        with pytest.raises(ValueError, match=r'unknown metric .* known are macs, params'):
            call()


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('mixpath_nano_supernet', {}),
        ('mixpath_nb201_supernet', {}),
        ('mixpath_supernet', dict(backbone='mobilenetv3_small_050')),
    ],
)
def test_a_supernet_that_was_cut_has_no_table(name, kwargs):
    for indices in ((0,), (0, 1)):
        cut = timm.create_model(name, features_only=True, out_indices=indices, **kwargs).model
        with pytest.raises(UsageError, match=r'features_only .* has cut this supernet'):
            cost_table(cut)
    whole = timm.create_model(name, **kwargs)
    whole.reset_classifier(3)
    num_params = sum(p.numel() for p in whole.extract().parameters())
    assert cost_table(whole).params(whole.active_arch) == num_params


def test_bad_arguments(nano):
    with pytest.raises(UsageError, match='num_classes=-1 must be at least 0'):
        cost_table(timm.create_model('mixpath_nano_supernet', device='meta'), num_classes=-1)
    with pytest.raises(ValueError, match='width_mult belongs to the space'):
        CostTable(nano.space, width_mult=0.5)
    for input_size in ((32, 32), (3, 0, 32), (3, 32.0, 32)):
        with pytest.raises(ValueError, match='input_size'):
            CostTable(nano.space, input_size=input_size)
    with pytest.raises(ValueError, match='3 input channels'):
        cost_table(timm.create_model('mixpath_nano_supernet'), (1, 32, 32))
    with pytest.raises(TypeError):
        CostTable(nano.space, no_such_option=1)


def test_does_not_touch_the_global_generator():
    model = nn.Conv2d(3, 4, 1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    CostTable(TINY)
    measure_latency(model, input_size=(3, 8, 8), min_run_time_s=0.01)
    assert torch.equal(torch.rand(3), expected)


def test_pickle(nano):
    arch = sample(nano.space, seed=3, step=0)
    assert table_cost(pickle.loads(pickle.dumps(nano)), arch) == table_cost(nano, arch)


def test_look_up_builds_no_network(s1, monkeypatch):
    # A search asks for every candidate, and for hundreds that it discards
    for name in ('__init__', '__call__'):
        monkeypatch.setattr(torch.nn.Module, name, lambda *_, **__: pytest.fail('a look-up built or ran a module'))
    assert len({s1.macs(arch) for arch in archs_of(s1.space, 50)}) > 1


def test_profile(nano):
    profile = profile_space(nano, num_samples=301, seed=5)
    archs = archs_of(nano.space, 301, seed=5)
    assert (profile.size, profile.num_samples) == (nano.space.size, 301)
    for metric in nano.metrics:
        summary = getattr(profile, metric)
        assert (summary.min, summary.max) == nano.bounds(metric)
        assert summary.median == statistics.median(nano.cost(metric, arch) for arch in archs)
        assert summary.min < summary.median < summary.max
    assert profile == profile_space(nano, num_samples=301, seed=5)
    assert profile_space(nano).num_samples == 10_001
    with pytest.raises(ValueError, match='num_samples'):
        profile_space(nano, num_samples=0)


class Sleeper(nn.Module):
    """Takes a known time per batch and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((tuple(x.shape), x.dtype, self.training, torch.is_inference_mode_enabled()))
        time.sleep(0.01)
        return x * self.weight


def test_latency_is_in_milliseconds():
    model = Sleeper().train()
    latency_ms = measure_latency(model, batch_size=2, input_size=(3, 5, 4), min_run_time_s=0.1)
    assert isinstance(latency_ms, float)
    assert 10 <= latency_ms < 100
    assert set(model.calls) == {((2, 3, 5, 4), torch.float64, False, True)}


def test_latency_of_a_model():
    model = timm.create_model('mixpath_nano', in_chans=1).train()  # the cfg says 3 channels
    model.bn1.eval()
    num_threads = torch.get_num_threads()
    for kwargs in (dict(), dict(num_threads=1, batch_size=4), dict(channels_last=True)):
        assert measure_latency(model, min_run_time_s=0.05, **kwargs) > 0
    assert torch.get_num_threads() == num_threads
    assert model.training and not model.bn1.training and model.bn2.training
    assert model.bn1.num_batches_tracked == 0
    assert model.blocks[0][0].conv_pw.weight.is_contiguous()


def test_latency_of_a_supernet_leaves_its_sequence():
    supernet = timm.create_model('mixpath_nano_supernet').train()
    assert measure_latency(supernet, min_run_time_s=0.01) > 0
    assert supernet.training and int(supernet.sample_step) == 0


def test_latency_needs_an_input_size():
    with pytest.raises(ValueError, match='give input_size'):
        measure_latency(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match='input_size'):
        measure_latency(nn.Conv2d(3, 4, 1), input_size=(32, 32))
    with pytest.raises(ValueError, match='batch_size'):
        measure_latency(nn.Conv2d(3, 4, 1), input_size=(3, 8, 8), batch_size=0)
