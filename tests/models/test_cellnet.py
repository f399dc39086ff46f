"""Networks and supernets of the benchmark cell spaces."""

import copy
import csv
import functools
import math
from collections import Counter

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import small_args
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import rows
from timm.utils import reparameterize_model

from timm_mixpath import ShadowBatchNorm2d, SupernetTask, cli, get_space, sample
from timm_mixpath.analysis.path_statistics import path_statistics
from timm_mixpath.hub.publish import write_repo
from timm_mixpath.models.cost import cost_table, count_macs
from timm_mixpath.search.accuracy import recalibrate_bn
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.loop import train

SMALL = {'nb201': dict(width=4, num_cells=2), 'nb101': dict(width=8, num_cells=2)}
SPACES = list(SMALL)
ALL_3X3 = '|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|'
ALL_SKIP = ALL_3X3.replace('nor_conv_3x3', 'skip_connect')
NB101_PARAMS = {  # some of the benchmark
    'input|maxpool3x3|maxpool3x3|output': 882_570,
    'input|conv1x1-bn-relu|conv3x3-bn-relu|output': 11_215_242,
    'input|conv3x3-bn-relu|conv3x3-bn-relu|conv1x1-bn-relu|output': 21_384_074,
    'input|conv1x1-bn-relu|maxpool3x3|maxpool3x3|output': 2_793_866,
}
NONE = ALL_3X3.replace('nor_conv_3x3', 'none')


def make(name: str, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(f'mixpath_{name}', **{**SMALL[name.removesuffix('_supernet')], **kwargs})


@functools.cache
def supernet(name: str, sum_norm: str = 'sbn'):
    """A supernet to look at, in eval mode, with batch norms that are not the identity."""
    return reference.perturb(make(f'{name}_supernet', sum_norm=sum_norm)).eval()


def images(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_those_of_nas_bench_101():
    for arch, params in NB101_PARAMS.items():
        assert num_params(timm.create_model('mixpath_nb101', arch=arch, device='meta')) == params
    for row in rows('nb101_multipath.csv'):
        assert num_params(timm.create_model('mixpath_nb101', arch=row['ops'], device='meta')) == int(row['params'])


def test_parameters_are_those_of_nas_bench_201():
    # The largest and the smallest of the benchmark, in millions: 1.531546 and 0.073306
    for arch, params in ((ALL_3X3, 1_531_546), (ALL_SKIP, 73_306)):
        assert num_params(timm.create_model('mixpath_nb201', arch=arch, device='meta')) == params


# ---- Against plain references ---------------------------------------------------------------------------------------


def nb201_cell(cell: nn.Module, x: torch.Tensor, arch: str, num_shadows: bool) -> torch.Tensor:
    """The formula of the cell, read from the arch text alone, with the weights of a supernet's cell."""
    xs = [x]
    for j, node in enumerate(arch.split('+')):
        total, k = torch.zeros_like(x), 0
        for edge in node.strip('|').split('|'):
            op, source = edge.split('~')
            y = xs[int(source)]
            if op == 'none' or y is None:
                continue
            k += 1
            if op == 'avg_pool_3x3':
                ones = torch.ones_like(y)
                y = F.avg_pool2d(y, 3, 1, 1, divisor_override=1) / F.avg_pool2d(ones, 3, 1, 1, divisor_override=1)
            elif op != 'skip_connect':
                path = cell.nodes[j].paths[f'{op}_{source}'].op
                y = F.conv2d(y.clamp(min=0), path.conv.weight, padding=1 if op.endswith('3x3') else 0)
                y = batch_norm(y, path.bn)
            total = total + y
        norm = cell.nodes[j].norm
        if k and not isinstance(norm, nn.Identity):
            total = batch_norm(total, norm.shadows[k - 1] if num_shadows else norm)
        xs.append(total if k else None)
    return torch.zeros_like(x) if xs[-1] is None else xs[-1]


def batch_norm(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
    return x * bn.weight.view(shape) + bn.bias.view(shape)


@settings(deadline=None, max_examples=60)
@given(vector=st.tuples(*[st.integers(0, 4)] * 6), sum_norm=st.sampled_from(['sbn', 'bn', 'none']))
def test_nb201_cell_is_the_formula(vector, sum_norm):
    model = supernet('nb201', sum_norm)
    arch = model.space.decode(vector)
    model.active_arch = arch
    cell = model.stages[0][0]
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(cell(x), nb201_cell(cell, x, arch, sum_norm == 'sbn'))


@pytest.mark.parametrize('sum_norm', ['sbn', 'bn', 'none'])
def test_nb101_cell_is_the_formula(sum_norm):
    model = supernet('nb101', sum_norm)
    cell = model.stages[1][1]  # the first one behind a reduction, which doubles the channels
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    for step in range(20):
        arch = model.active_arch = sample(model.space, seed=0, step=step)
        *parallel, behind = arch.split('|')[1:-1]

        def op(name: str, module: nn.Module, y: torch.Tensor) -> torch.Tensor:
            if name == 'maxpool3x3':
                return F.max_pool2d(y, 3, 1, 1)
            y = F.conv2d(y, module.conv.weight, padding=1 if '3x3' in name else 0)
            return batch_norm(y, module.bn).clamp(min=0)

        with torch.no_grad():
            total = 0
            for i, name in enumerate(parallel):
                path = cell.node.paths[f'{name}_{i}'.replace('-', '_')].op
                total = total + op(name, path, op('conv1x1', cell.projections[i], x))
            norm = cell.node.norm
            if sum_norm != 'none':
                total = batch_norm(total, norm.shadows[len(parallel) - 1] if sum_norm == 'sbn' else norm)
            torch.testing.assert_close(cell(x), op(behind, cell.behind[behind], total))


# ---- What supernets promise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('sum_norm', ['sbn', 'bn', 'none'])
@pytest.mark.parametrize('name', SPACES)
def test_extracted_network_is_the_supernet(name, sum_norm):
    model, x = supernet(name, sum_norm), images()
    for strategy in ('paths', 'uniform', 'fair'):
        for step in range(6):
            arch = sample(model.space, seed=5, step=step, strategy=strategy)
            model.active_arch = arch
            network = model.extract()
            assert (network.arch, network.pretrained_cfg['architecture']) == (arch, f'mixpath_{name}')
            with torch.no_grad():
                torch.testing.assert_close(network(x), model(x))


@pytest.mark.parametrize('name', SPACES)
def test_only_sampled_parameters_get_a_gradient(name):
    model = make(f'{name}_supernet').train()
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        model(images()).sum().backward()
        network = model.extract(model.sampled_arch)
        trained = {n.replace(f'.shadows.{i}', '') for i in range(4) for n, p in model.named_parameters()
                   if p.grad is not None and (f'.shadows.{i}' in n or '.shadows.' not in n)}  # fmt: skip
        if name == 'nb201':
            assert trained == dict(network.named_parameters()).keys()
        else:  # the nodes are placed at random, but what is trained is as much
            sizes = {n: p.numel() for n, p in model.named_parameters() if p.grad is not None}
            assert sum(sizes.values()) == num_params(network)
            assert len(sizes) == len(list(network.parameters()))
        for module_name, sbn in model.named_modules():
            if isinstance(sbn, ShadowBatchNorm2d):
                assert sum(bn.weight.grad is not None for bn in sbn.shadows) <= 1, module_name


@pytest.mark.parametrize('name', SPACES)
def test_the_shadow_in_use_is_that_of_the_number_of_paths(name):
    model = make(f'{name}_supernet').train()
    model(images())
    used = {n: int(b) for n, b in model.named_buffers() if n.endswith('num_batches_tracked') and '.shadows.' in n}
    if name == 'nb201':
        paths = [len(edges) for edges in model.space.live_edges(model.sampled_arch)]
        expected = {f'nodes.{j}.norm.shadows.{k - 1}.' for j, k in enumerate(paths) if k}
    else:
        expected = {f'node.norm.shadows.{len(model.sampled_arch.ops) - 2}.'}
    for buffer, count in used.items():
        assert count == any(part in buffer for part in expected), (buffer, model.sampled_arch)


def test_parallel_nodes_are_placed_at_random_in_training():
    model = make('nb101_supernet', width=4, num_cells=1).train()
    again = make('nb101_supernet', width=4, num_cells=1).train()
    counts = Counter()
    for _ in range(400):
        model._sample()
        again._sample()
        cell = model._cells[0]
        assert cell.node.active == again._cells[0].node.active
        assert sorted(p.rpartition('_')[0].replace('_', '-') for p in cell.node.active) == sorted(
            model.sampled_arch.ops[:-1]
        )
        assert [int(p[-1]) for p in cell.node.active] == list(cell.active_nodes)
        counts.update(cell.node.active)
    # k is 2.5 on average, so each of the 12 paths is active in 2.5 / 12 of the steps
    assert len(counts) == 12 and all(abs(n - 83) < 5 * 83**0.5 for n in counts.values())
    model.eval()
    assert model._cells[0].active_nodes == tuple(range(len(model.active_arch.ops) - 1))


def test_a_cell_that_nothing_gets_through_is_a_constant():
    model = supernet('nb201')
    for arch in (NONE, '|none~0|+|none~0|skip_connect~1|+|none~0|nor_conv_3x3~1|nor_conv_3x3~2|'):
        model.active_arch = arch
        with torch.no_grad():
            y = model(images())
            torch.testing.assert_close(y[0], y[1])
            torch.testing.assert_close(model.extract()(images()), y)


@pytest.mark.parametrize('name', SPACES)
def test_recalibration_is_of_the_arch(name):
    model = copy.deepcopy(supernet(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    arch = sample(model.space, seed=9, step=0)
    with recalibrate_bn(model, arch, [(images(8), None)]), torch.no_grad():
        y = model(images(8))
        network = model.extract(arch).train()  # batch statistics of the same images
        for bn in network.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.momentum = None
                bn.reset_running_stats()
        network(images(8))
        torch.testing.assert_close(network.eval()(images(8)), y, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', SPACES)
def test_folded_supernet_is_equal(name):
    model, x = supernet(name), images()
    folded = reparameterize_model(model)
    for step in range(5):
        model.active_arch = folded.active_arch = sample(model.space, seed=2, step=step)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match='folded, it can be evaluated but not trained'):
        folded.train()
    with pytest.raises(ValueError, match='folded; extract from the supernet'):
        folded.extract()


@pytest.mark.parametrize('name', SPACES)
def test_m_bounds_sampling_and_shadows(name):
    model = make(f'{name}_supernet', m=2)
    assert max(m.num_shadows for m in model.modules() if isinstance(m, ShadowBatchNorm2d)) == 2
    for step in range(50):
        model.space.arch(sample(model.space, seed=0, step=step, strategy=('paths', 'uniform', 'fair')[step % 3]))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().extract()(images()), model(images()))


@pytest.mark.parametrize('name', SPACES)
def test_bn_options_reach_every_norm(name):
    model = make(f'{name}_supernet', bn_momentum=0.3, bn_eps=1e-4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.3, 1e-4)}
    network = model.extract()
    assert {(m.momentum, m.eps) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.3, 1e-4)}


@pytest.mark.parametrize('name', SPACES)
def test_training_steps(name):
    model = make(f'{name}_supernet', seed=3, width=8, num_cells=1)
    task = SupernetTask(model, nn.CrossEntropyLoss(), device='cpu', verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    task.train()
    x, y = images(16), torch.arange(16) % 10
    losses = []
    for _ in range(60):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = task(x, y)['loss']
        loss.backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in moved)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])


@pytest.mark.parametrize('name', SPACES)
def test_path_outputs_are_what_is_summed(name):
    model = supernet(name, 'none')
    arch = model.active_arch = sample(model.space, seed=4, step=1)
    cell = model.stages[0][0]
    x = torch.randn(2, model.width, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if name == 'nb101':
            outputs = cell.path_outputs(x)
            assert len(outputs) == 4 * 3
            torch.testing.assert_close(cell.behind[cell.active](sum(outputs[p] for p in cell.node.active)), cell(x))
            return
        xs = [x]
        for index, node in enumerate(cell.nodes):
            outputs = node.path_outputs(xs)
            assert len(outputs) == (4 * (index + 1) if None not in xs else 0), arch
            y = node(xs)
            if outputs and y is not None:
                torch.testing.assert_close(sum(outputs[p] for p in node.active), y)
            xs.append(y)


@pytest.mark.parametrize('name', SPACES)
def test_statistics_of_paths(name):
    model = copy.deepcopy(supernet(name))
    sites = path_statistics(model, [(images(8), None)], num_archs=6)
    cells = model.get_cells()
    if name == 'nb101':
        assert [(s.name, s.paths[:2], len(s.mean_ratio)) for s in sites] == [
            (cell, ('conv1x1_bn_relu_0', 'conv3x3_bn_relu_0'), 4) for cell in cells
        ]
    else:
        expected = [(f'{cell}.nodes.{i}', 4 * (i + 1), i + 1) for cell in cells for i in range(3)]
        assert [(s.name, len(s.paths), len(s.mean_ratio)) for s in sites] == expected
        assert [len(s.pairs) for s in sites] == [0, 16, 48] * len(cells)  # not of operations on one edge
    assert all(-1 <= s.cosine_mean <= 1 and s.var_ratio[0] == pytest.approx(1) for s in sites)


@pytest.mark.parametrize('name', ['nb201', pytest.param('nb101', marks=pytest.mark.slow)])
def test_from_training_to_ranking(name, digits, tmp_path):
    """Training, search, export and ranking with small real images, through the commands."""
    options = dict(model=f'mixpath_{name}_supernet', model_kwargs=dict(SMALL[name]), cache_images=True, reprob=0.0)
    run = train(small_args(digits, tmp_path, **options)).output_dir
    checkpoint = str(run / 'last.pth.tar')
    space = get_space(name)
    archs = list(dict.fromkeys(sample(space, seed=0, step=i) for i in range(14)))
    with open(tmp_path / 'table.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('arch', 'accuracy'), *((a, 80 + i) for i, a in enumerate(archs))])
    rank = ['rank', '--checkpoint', checkpoint, '--table', str(tmp_path / 'table.csv'), '--output', str(tmp_path / 'r')]
    assert cli.main([*rank, '--recalibration-images', '64', '--num-resamples', '20', '-j', '0']) == 0
    ranked = list(csv.DictReader((tmp_path / 'r' / 'ranking.csv').read_text().splitlines()))
    assert sorted(row['arch'] for row in ranked) == sorted(archs)

    search = ['search', '--checkpoint', checkpoint, '--output', str(tmp_path / 's'), '--population', '6']
    assert cli.main([*search, '--offspring', '4', '--generations', '2', '-j', '0']) == 0
    found = list(csv.DictReader((tmp_path / 's' / 'front.csv').read_text().splitlines()))
    export = ['export', '--checkpoint', checkpoint, '--arch', found[0]['arch'], '--output', str(tmp_path / 'm')]
    assert cli.main(export) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
    assert (model.arch, num_params(model)) == (found[0]['arch'], int(found[0]['params']))
    for source, text in ((checkpoint, 'paths per sum'), (str(tmp_path / 'm'), str(model.arch))):
        folder = tmp_path / f'repo-{len(text)}'
        assert 'README.md' in write_repo(source, f'me/mixpath_{name}', folder)
        card = (folder / 'README.md').read_text()
        assert text in card and f'Three stages of 2 cells, {SMALL[name]["width"]} channels' in card
    supernet = load_model(checkpoint).model
    supernet.active_arch = model.arch
    with torch.no_grad():
        torch.testing.assert_close(model(images()), supernet(images()))


# ---- Costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('sum_norm', 'm'), [('sbn', None), ('none', 2)])
@pytest.mark.parametrize('name', SPACES)
def test_costs_are_those_of_the_network(name, sum_norm, m):
    model = make(f'{name}_supernet', sum_norm=sum_norm, m=m)
    table = cost_table(model, (3, 16, 16))
    archs = [sample(model.space, seed=1, step=step, strategy='uniform') for step in range(4)]
    for arch in [*archs, table.smallest('macs'), table.largest('params')]:
        network = model.extract(arch)
        assert table.params(arch) == num_params(network)
        assert table.macs(arch) == sum(count_macs(network.eval(), (3, 16, 16)).values())
    for metric in table.metrics:
        low, high = table.bounds(metric)
        assert low <= min(table.cost(metric, a) for a in archs) <= max(table.cost(metric, a) for a in archs) <= high
    with pytest.raises(ValueError, match="unknown metric 'flops'"):
        table.cost('flops', archs[0])


# ---- timm's interface -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [*SPACES, *(f'{name}_supernet' for name in SPACES)])
def test_features_and_classifier(name):
    model = make(name).eval()
    width, x = model.width, images()
    with torch.no_grad():
        features = make(name, features_only=True).eval()(x)
        assert [tuple(f.shape) for f in features] == [(2, width * 2**i, 16 // 2**i, 16 // 2**i) for i in range(3)]
        last, intermediates = model.forward_intermediates(x, norm=True)
        torch.testing.assert_close(last, intermediates[-1])
        torch.testing.assert_close(model.forward_head(last), model(x))
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([0])
        assert pruned(images()).shape == (2, width, 16, 16)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize('name', SPACES)
def test_script_and_export_of_networks(name):
    model = supernet(name).extract()
    scripted = torch.jit.script(model)
    features = make(name, features_only=True, out_indices=(0, 1)).eval()
    with torch.no_grad():
        for a, b in zip(torch.jit.script(features)(images()), features(images())):
            torch.testing.assert_close(a, b)
    exported = torch.export.export(model, (images(),)).module()
    with torch.no_grad():
        torch.testing.assert_close(scripted(images()), model(images()))
        torch.testing.assert_close(exported(images()), model(images()))


@pytest.mark.parametrize('name', SPACES)
def test_a_checkpointed_pass_is_equal(name):
    grads = []
    for enable in (False, True):
        model = make(f'{name}_supernet').train()
        model.set_grad_checkpointing(enable)
        model(images()).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        passes = [int(b) for n, b in model.named_buffers() if n.startswith('stages') and 'num_batches_tracked' in n]
        assert set(passes) == {0, 2 if enable else 1}  # recomputed, or not
    assert grads[0].keys() == grads[1].keys()
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, msg=n)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(width=0), 'width=0 is not a positive integer'),
        (dict(num_cells='5'), "num_cells='5' is not a positive integer"),
        (dict(sum_norm='ln'), "unknown sum_norm 'ln', known are sbn, bn, none"),
        (dict(sampling='random'), "unknown sampling 'random', known are paths, uniform, fair"),
        (dict(arch='k3_e6'), 'looks like'),
        (dict(m=9), 'm=9 is out of range for space'),
        (dict(norm_layer='groupnorm1'), 'norm_layer is no batch norm and has no shadows'),
    ],
)
@pytest.mark.parametrize('name', SPACES)
def test_wrong_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(f'{name}_supernet', **kwargs)


def test_a_network_has_no_shadows():
    with pytest.raises(ValueError, match="unknown sum_norm 'sbn', known are bn, none"):
        make('nb201', sum_norm='sbn')
    assert get_space('nb201') == make('nb201').space


def test_nb201_takes_images_of_any_size() -> None:
    """Sizes that are halved to whole ones go through the benchmark's pooling, others leave a row and column more."""
    model = make('nb201').eval()
    pools = [m for m in model.modules() if isinstance(m, nn.AvgPool2d) and m.kernel_size == 2]
    assert len(pools) == 2
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(pools[0](x), nn.functional.avg_pool2d(x, 2))
    with torch.inference_mode():
        for size in (33, 34, 31):
            assert model.forward_features(torch.randn(1, 3, size, size)).shape[2:] == (math.ceil(size / 4),) * 2
        assert pools[0](torch.ones(1, 4, 5, 5)).unique().tolist() == [1.0]  # nothing is mixed with padding
