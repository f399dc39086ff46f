import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.utils import ModelEmaV3, reparameterize_model
from torch.nn.utils import prune

from timm_mixpath import (
    Arch,
    BlockChoice,
    BlockSpec,
    MixPath,
    MixPathSupernet,
    SearchSpace,
    ShadowBatchNorm2d,
    get_space,
    sample,
)

ONE_PATH = 'k3_e6,k7_e3,k5_e3,k5_e6,k3_e6,k3_e3,k7_e6,k7_e6'
TWO_PATHS = 'k3+5_e3,k7_e3,k3+7_e6,k5_e6,k5+7_e3,k3_e3,k3+5_e6,k3+7_e6'
THREE_PATHS = 'k3+5+7_e6,k7_e3,k3+7_e3,k3+5+7_e6,k5_e3,k3+5_e3,k5+7_e6,k3+5+7_e3'


def make_supernet(**kwargs: Any) -> MixPathSupernet:
    torch.manual_seed(0)
    return reference.perturb(timm.create_model('mixpath_nano_supernet', **kwargs))


def make_input(batch_size: int = 2, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(batch_size, in_chans, 32, 32, generator=torch.Generator().manual_seed(1))


def train_step(supernet: MixPathSupernet, optimizer: torch.optim.Optimizer, seed: int) -> Arch:
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(supernet(x), target).backward()
    optimizer.step()
    return supernet.sampled_arch


def archs_of_steps(supernet: MixPathSupernet, num_steps: int) -> list[Arch]:
    supernet.train()
    archs = []
    for _ in range(num_steps):
        supernet(make_input())
        archs.append(supernet.sampled_arch)
    return archs


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
def test_training_equals_reference(sbn):
    supernet = make_supernet(m=3, sum_norm='sbn' if sbn else 'bn').double().train()
    tensors = reference.leaf_tensors(supernet)
    x = make_input().double()
    y = supernet(x)
    y_ref = reference.supernet(tensors, supernet.space, supernet.sampled_arch, x, training=True, sbn=sbn)
    torch.testing.assert_close(y, y_ref, rtol=1e-8, atol=1e-8)
    y.pow(2).sum().backward()
    y_ref.pow(2).sum().backward()
    for name, p in supernet.named_parameters():
        torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-6, atol=1e-8, msg=name)
    for name, buffer in supernet.named_buffers():
        if name != 'sample_step':
            torch.testing.assert_close(buffer, tensors[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize('arch', [ONE_PATH, TWO_PATHS, THREE_PATHS], ids=['1', '2', '3'])
def test_eval_equals_reference(arch):
    supernet = make_supernet(m=3).eval()
    supernet.active_arch = arch
    tensors = reference.leaf_tensors(supernet)
    y_ref = reference.supernet(tensors, supernet.space, Arch(arch), make_input(), training=False)
    torch.testing.assert_close(supernet(make_input()), y_ref, rtol=1e-4, atol=1e-4)


# Blocks of every kind of S2 and S3, narrow and few: a fixed block in front, strides, skips, squeeze-and-excite,
# grouped 1x1 convolutions, channel groups that do not divide the channels
IMAGENET_LIKE = SearchSpace(
    name='imagenet_like',
    blocks=(
        BlockSpec(8, 2, (6,), (3, 5), num_groups=4, exp_groups=2, pwl_groups=2),
        BlockSpec(8, 1, (3,), (3, 5, 7), num_groups=4, exp_groups=2, pwl_groups=2, se_ratio=0.5, act_layer='swish'),
        BlockSpec(12, 1, (5, 3), (3, 7), num_groups=3, se_ratio=0.25, act_layer='swish'),
        BlockSpec(12, 1, (6,), (3, 9), se_ratio=0.25, act_layer='swish'),
    ),
    stem_chs=8,
    stem_stride=2,
    ds_chs=8,
    num_features=24,
    act_layer='relu',
)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize('m', [1, 2])
def test_channel_groups_equal_reference(m, sbn):
    torch.manual_seed(0)
    supernet = (
        reference.perturb(MixPathSupernet(IMAGENET_LIKE, m=m, sum_norm='sbn' if sbn else 'bn', num_classes=10))
        .double()
        .train()
    )
    for _ in range(3):
        tensors = reference.leaf_tensors(supernet)
        supernet.zero_grad()
        x = make_input().double()
        y = supernet(x)
        arch = supernet.sampled_arch
        y_ref = reference.supernet(tensors, supernet.space, arch, x, training=True, sbn=sbn)
        torch.testing.assert_close(y, y_ref, rtol=1e-8, atol=1e-8)
        y.pow(2).sum().backward()
        y_ref.pow(2).sum().backward()
        for name, p in supernet.named_parameters():
            torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-6, atol=1e-8, msg=name)
            assert (p.grad is not None) == reference.active_parameter(name, supernet.space, arch, sbn), name
        for name, buffer in supernet.named_buffers():
            if name != 'sample_step':
                torch.testing.assert_close(buffer, tensors[name], rtol=1e-8, atol=1e-8, msg=name)
    supernet.eval()
    for step in range(5):
        supernet.active_arch = arch = sample(supernet.space, seed=1, step=step)
        y_ref = reference.supernet(reference.leaf_tensors(supernet), supernet.space, arch, x, training=False, sbn=sbn)
        torch.testing.assert_close(supernet(x), y_ref, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('s2', {}),
        ('s3', {}),
        ('s3', dict(m=2)),
        ('s3', dict(m=2, sum_norm='bn')),
        pytest.param('s2', dict(m=2, sum_norm='bn'), marks=pytest.mark.slow),
        pytest.param('s2', dict(m=4, width_mult=0.6), marks=pytest.mark.slow),
        pytest.param('s3', dict(m=4, width_mult=0.6), marks=pytest.mark.slow),
    ],
)
def test_extracted_imagenet_network_equals_supernet(name, kwargs):
    torch.manual_seed(0)
    supernet = reference.perturb(timm.create_model(f'mixpath_{name}_supernet', num_classes=10, **kwargs))
    # Joined and separate convolutions round differently on every kind of CPU, and 18 random blocks make 1e8 of it
    supernet = supernet.double().eval()
    x = make_input().double()
    single = supernet.space.default_arch
    for arch in (single, sample(supernet.space, seed=0, step=0), sample(supernet.space, seed=0, step=1)):
        supernet.active_arch = arch
        torch.testing.assert_close(supernet.extract()(x), supernet(x), rtol=1e-6, atol=1e-6)
    # Rebuilt from what config.json holds: the norms behind the sums do not depend on this arch alone
    rebuilt = timm.create_model(f'mixpath_{name}', **supernet.extract(single)._model_args)
    rebuilt.load_state_dict(supernet.extract(single).state_dict())
    supernet.active_arch = single
    torch.testing.assert_close(rebuilt.double().eval()(x), supernet(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(m=3),
        dict(m=3, sum_norm='bn'),
        dict(m=3, width_mult=0.5, num_classes=7),
        dict(m=3, in_chans=1, bn_eps=1e-2, act_layer='silu', global_pool='avgmax'),
        dict(m=3, output_stride=4, drop_path_rate=0.2, drop_rate=0.2),
    ],
    ids=str,
)
def test_extracted_network_equals_supernet(kwargs):
    supernet = make_supernet(**kwargs).eval()
    x = make_input(in_chans=kwargs.get('in_chans', 3))
    outputs = []
    for arch in (ONE_PATH, TWO_PATHS, THREE_PATHS):
        supernet.active_arch = arch
        model = supernet.extract(arch)
        outputs.append(supernet(x))
        assert type(model) is MixPath
        assert model.arch == arch
        torch.testing.assert_close(model(x), outputs[-1], rtol=1e-5, atol=1e-5)
    # the test would be blind if all archs gave the same
    assert min((a - b).abs().max() for a, b in pairwise(outputs)) > 1e-2


@pytest.mark.parametrize('m', [1, 2, 3])
@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
def test_extract_for_every_m(m, sbn):
    supernet = make_supernet(m=m, sum_norm='sbn' if sbn else 'bn').eval()
    supernet.active_arch = arch = {1: ONE_PATH, 2: TWO_PATHS, 3: THREE_PATHS}[m]
    torch.testing.assert_close(supernet.extract(arch)(make_input()), supernet(make_input()), rtol=1e-5, atol=1e-5)


def test_extract_uses_active_arch_and_copies():
    supernet = make_supernet().eval()
    supernet.active_arch = TWO_PATHS
    model = supernet.extract()
    assert model.arch == TWO_PATHS
    before = supernet(make_input())
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert torch.equal(supernet(make_input()), before)
    assert supernet.active_arch == TWO_PATHS
    supernet.extract(ONE_PATH)
    assert supernet.active_arch == TWO_PATHS


def test_extract_keeps_mode_dtype_and_classifier():
    supernet = make_supernet()
    assert supernet.train().extract().training
    assert not supernet.eval().extract().training
    supernet.reset_classifier(4, 'max')
    model = supernet.extract(TWO_PATHS)
    assert (model.num_classes, model.global_pool.pool_type) == (4, 'max')
    supernet.active_arch = TWO_PATHS
    torch.testing.assert_close(model(make_input()), supernet(make_input()), rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in supernet.double().extract().parameters()} == {torch.float64}


def test_extract_after_training():
    supernet = make_supernet()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    for seed in range(3):
        train_step(supernet, optimizer, seed)
    supernet.eval()
    supernet.active_arch = TWO_PATHS
    torch.testing.assert_close(supernet.extract()(make_input()), supernet(make_input()), rtol=1e-5, atol=1e-5)


def test_extracted_network_is_saved_and_rebuilt(tmp_path):
    model = make_supernet(num_classes=7, width_mult=0.5).eval().extract(TWO_PATHS)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.arch == TWO_PATHS
    assert loaded.pretrained_cfg['architecture'] == 'mixpath_nano'
    assert torch.equal(loaded(make_input()), model(make_input()))


@pytest.mark.parametrize('arch', [THREE_PATHS, 'k9_e6' + ONE_PATH[5:], 'k3_e6', 'nonsense'])
def test_archs_outside_the_space_are_refused(arch):
    supernet = make_supernet(m=2)
    with pytest.raises(ValueError, match='arch'):
        supernet.extract(arch)
    with pytest.raises(ValueError, match='arch'):
        supernet.active_arch = arch
    assert supernet.active_arch == get_space('nano').default_arch


@pytest.mark.parametrize('num_classes', [10, 100])
def test_number_of_parameters_of_s1(num_classes):
    channels = [32, 48, 48, 96, 96, 96, 192, 192, 192, 256, 256, 320, 320]
    total = 3 * 32 * 9 + 2 * 32
    for in_chs, out_chs in pairwise(channels):
        for mid in (3 * in_chs, 6 * in_chs):
            total += in_chs * mid + 2 * mid
            total += sum(mid * k * k + 2 * mid for k in (3, 5, 7, 9))
            total += mid * out_chs + 4 * 2 * out_chs  # 4 shadow batch norms
    total += 320 * 1280 + 2 * 1280 + 1280 * num_classes + num_classes
    supernet = timm.create_model('mixpath_s1_supernet', m=4, num_classes=num_classes, device='meta')
    assert sum(p.numel() for p in supernet.parameters()) == total


@pytest.mark.parametrize(('m', 'sbn', 'num_shadows'), [(None, True, 2), (1, True, 1), (3, True, 3), (3, False, 0)])
def test_one_shadow_for_every_number_of_paths(m, sbn, num_shadows):
    supernet = timm.create_model('mixpath_nano_supernet', m=m, sum_norm='sbn' if sbn else 'bn', device='meta')
    sbns = [module for module in supernet.modules() if isinstance(module, ShadowBatchNorm2d)]
    assert len(sbns) == (16 if sbn else 0)
    assert all(len(s.shadows) == num_shadows for s in sbns)
    assert supernet.space.max_paths == (m or 2)


@pytest.mark.parametrize('m', [0, 4])
def test_m_out_of_range(m):
    with pytest.raises(ValueError, match=f'm={m} .*allowed are 1 to 3'):
        timm.create_model('mixpath_nano_supernet', m=m)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
def test_unsampled_parameters_do_not_move(sbn):
    supernet = make_supernet(sum_norm='sbn' if sbn else 'bn')
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    moved_before: set[str] = set()
    rested = 0
    for seed in range(4):
        before = copy.deepcopy(dict(supernet.named_parameters()))
        arch = train_step(supernet, optimizer, seed)
        active = {n for n in before if reference.active_parameter(n, supernet.space, arch, sbn)}
        assert {n for n, p in supernet.named_parameters() if p.grad is not None} == active
        assert {n for n, p in supernet.named_parameters() if not torch.equal(p, before[n])} == active
        rested += len(moved_before - active)
        moved_before |= active
    assert rested > 100  # parameters with momentum that a later step left out, the case that goes wrong


def test_unsampled_statistics_do_not_move():
    supernet = make_supernet(m=3).train()
    before = copy.deepcopy(dict(supernet.named_buffers()))
    supernet(make_input())
    for name, buffer in supernet.named_buffers():
        owner = name.rsplit('.', 1)[0] + '.weight'
        active = name == 'sample_step' or reference.active_parameter(owner, supernet.space, supernet.sampled_arch)
        assert torch.equal(buffer, before[name]) != active, name


def test_samples_the_sequence_of_its_seed():
    supernet = make_supernet(m=3, seed=5)
    assert supernet.sampled_arch is None
    assert archs_of_steps(supernet, 4) == [sample(get_space('nano', 3), seed=5, step=i) for i in range(4)]
    assert supernet.sample_step.item() == 4
    assert archs_of_steps(make_supernet(m=3, seed=6), 4) != archs_of_steps(make_supernet(m=3, seed=5), 4)


def test_sampling_ignores_and_leaves_the_global_generator():
    torch.manual_seed(1)
    first = archs_of_steps(make_supernet(), 2)
    supernet = make_supernet().train()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    supernet(make_input())
    assert supernet.sampled_arch == first[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_runs_the_active_arch():
    supernet = make_supernet().eval()
    supernet.active_arch = TWO_PATHS
    expected = supernet(make_input())
    assert supernet.sample_step.item() == 0
    statistics = copy.deepcopy(supernet.state_dict())
    supernet.train()
    supernet(make_input())
    assert supernet.sampled_arch != TWO_PATHS
    assert supernet.active_arch == TWO_PATHS
    supernet.load_state_dict(statistics)
    assert torch.equal(supernet.eval()(make_input()), expected)


@pytest.mark.parametrize('arch', [TWO_PATHS, Arch(TWO_PATHS), TWO_PATHS.replace('k3+5', 'k5+3')])
def test_active_arch_takes_text_and_arch(arch):
    supernet = make_supernet()
    supernet.active_arch = arch
    assert type(supernet.active_arch) is Arch
    assert supernet.active_arch == TWO_PATHS


def test_active_arch_set_while_training_waits_for_eval():
    supernet = make_supernet().train()
    supernet.active_arch = TWO_PATHS
    assert archs_of_steps(supernet, 1) == [sample(supernet.space, seed=0, step=0)]
    model = supernet.eval().extract(TWO_PATHS)
    torch.testing.assert_close(supernet(make_input()), model(make_input()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('assign', [True, False])
def test_a_resumed_supernet_continues_the_sequence(assign):
    supernet = make_supernet(seed=3)
    archs_of_steps(supernet, 3)
    file = io.BytesIO()
    torch.save(supernet.state_dict(), file)
    file.seek(0)
    resumed = make_supernet(seed=3)
    archs_of_steps(resumed, 1)
    resumed.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert resumed.sample_step.item() == 3
    expected = [sample(supernet.space, seed=3, step=i) for i in (3, 4)]
    assert archs_of_steps(resumed, 2) == archs_of_steps(supernet, 2) == expected


def test_saved_supernet_is_rebuilt_and_continues(tmp_path):
    supernet = make_supernet(m=3, seed=4, sum_norm='bn', bn_eps=1e-3)
    archs_of_steps(supernet, 2)
    save_for_hf(supernet, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (loaded.space, loaded.seed, loaded.bn1.eps) == (supernet.space, 4, 1e-3)
    for model in (supernet, loaded):
        model.eval().active_arch = THREE_PATHS
    assert torch.equal(loaded(make_input()), supernet(make_input()))
    assert archs_of_steps(loaded, 1) == [sample(supernet.space, seed=4, step=2)]


def test_a_step_that_is_written_into_the_buffer_counts():
    supernet = make_supernet(seed=3)
    archs_of_steps(supernet, 1)
    with torch.no_grad():
        supernet.sample_step.fill_(7)
    assert archs_of_steps(supernet, 2) == [sample(supernet.space, seed=3, step=i) for i in (7, 8)]
    assert supernet.sample_step.item() == 9


def test_a_supernet_without_memory_takes_weights_and_modes():
    supernet = timm.create_model('mixpath_nano_supernet', device='meta')
    supernet.load_state_dict({}, strict=False)
    supernet.load_state_dict(supernet.train().state_dict())


def test_deepcopy_is_independent():
    supernet = make_supernet()
    archs_of_steps(supernet, 2)
    clone = copy.deepcopy(supernet)
    assert archs_of_steps(clone, 2) == archs_of_steps(supernet, 2)
    clone.eval().active_arch = TWO_PATHS
    supernet.eval()
    assert supernet.active_arch == supernet.space.default_arch
    torch.testing.assert_close(
        supernet(make_input()), supernet.extract(supernet.space.default_arch)(make_input()), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(clone(make_input()), clone.extract(TWO_PATHS)(make_input()), rtol=1e-5, atol=1e-5)


def test_ema():
    supernet = make_supernet()
    ema = ModelEmaV3(supernet, decay=0.75)
    before = copy.deepcopy(ema.module.state_dict())
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05)
    for seed in range(2):
        train_step(supernet, optimizer, seed)
    ema.update(supernet)
    moved = 0
    for name, p in supernet.named_parameters():
        expected = 0.75 * before[name] + 0.25 * p
        torch.testing.assert_close(ema.module.state_dict()[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        moved += not torch.equal(ema.module.state_dict()[name], before[name])
    assert moved > 100
    ema.module.active_arch = TWO_PATHS
    assert not ema.module.training
    expected = ema.module.extract()(make_input())
    torch.testing.assert_close(ema.module(make_input()), expected, rtol=1e-5, atol=1e-5)
    # a run that starts from the EMA weights goes on with the sequence
    fresh = make_supernet()
    fresh.load_state_dict(ema.module.state_dict())
    assert archs_of_steps(fresh, 1) == [sample(supernet.space, seed=0, step=2)]


def test_one_sample_per_forward():
    supernet = make_supernet().train()
    x = make_input()
    supernet(x)
    assert supernet.sample_step.item() == 1
    supernet.forward_head(supernet.forward_features(x))
    assert supernet.sample_step.item() == 2
    supernet.forward_intermediates(x)
    assert supernet.sample_step.item() == 3
    assert supernet.sampled_arch == sample(supernet.space, seed=0, step=2)


def test_features_only_samples_in_training():
    supernet = timm.create_model('mixpath_nano_supernet', features_only=True).train()
    features = supernet(make_input())
    assert supernet.model.sampled_arch == sample(get_space('nano'), seed=0, step=0)
    assert [f.shape[1] for f in features] == [24, 48, 96]


def test_grad_checkpointing_gives_equal_gradients():
    grads = []
    for enable in (False, True):
        supernet = make_supernet().train()
        supernet.set_grad_checkpointing(enable)
        supernet(make_input()).pow(2).sum().backward()
        assert supernet.sample_step.item() == 1
        grads.append({name: p.grad for name, p in supernet.named_parameters()})
    assert any(grad is None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_moves_to_another_dtype():
    supernet = make_supernet().to(torch.bfloat16)
    assert supernet.sample_step.dtype == torch.int64
    assert supernet(make_input().bfloat16()).dtype == torch.bfloat16


def test_sync_batch_norm_conversion():
    supernet = make_supernet().eval()
    supernet.active_arch = TWO_PATHS
    expected = supernet(make_input())
    converted = timm.layers.convert_sync_batchnorm(supernet).eval()
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted(make_input()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
def test_folded_batch_norms_serve_every_arch(sbn):
    supernet = make_supernet(m=3, sum_norm='sbn' if sbn else 'bn').eval()
    folded = reparameterize_model(supernet)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.blocks.modules()) == 0
    for arch in (ONE_PATH, TWO_PATHS, THREE_PATHS):
        supernet.active_arch = folded.active_arch = arch
        torch.testing.assert_close(folded(make_input()), supernet(make_input()), rtol=1e-4, atol=1e-4)


def test_arch_argument_is_the_first_active_arch():
    supernet = make_supernet(m=3, arch=Arch(THREE_PATHS)).eval()
    assert supernet.active_arch == THREE_PATHS
    model = supernet.extract()
    assert model.arch == THREE_PATHS
    torch.testing.assert_close(model(make_input()), supernet(make_input()), rtol=1e-5, atol=1e-5)
    assert supernet.extract(ONE_PATH).arch == ONE_PATH
    with pytest.raises(ValueError, match='at most m=2'):
        timm.create_model('mixpath_nano_supernet', arch=THREE_PATHS)


@pytest.mark.parametrize('name', ['mixpath_nano_supernet', 'mixpath_s3_supernet', 'mixpath_nb201_supernet'])
def test_extract_draws_no_random_numbers_and_shares_no_memory(name):
    """A training that extracts on the way goes on as if it had not."""
    supernet = timm.create_model(name, num_classes=10)
    state = torch.get_rng_state()
    model = supernet.extract()
    assert torch.equal(torch.get_rng_state(), state)
    own = {t.data_ptr() for t in supernet.state_dict().values()}
    assert not any(t.is_meta or t.data_ptr() in own for t in model.state_dict().values())
    assert all(p.requires_grad for p in model.parameters())


def test_extract_says_what_is_missing():
    unregistered = MixPathSupernet(replace(get_space('nano'), name='unregistered'))
    with pytest.raises(ValueError, match='register_space'):
        unregistered.extract()
    folded = reparameterize_model(timm.create_model('mixpath_nano_supernet').eval())
    with pytest.raises(ValueError, match='folded'):
        folded.extract()


def test_norm_layer_by_name_with_bn_options():
    model = timm.create_model('mixpath_nano_supernet', norm_layer='batchnorm2d', bn_eps=1e-3)
    assert model.extract().bn1.eps == 1e-3


@pytest.mark.parametrize('name', ['nano', 's3'])
def test_nested_init_gives_all_archs_the_same_function(name):
    torch.manual_seed(0)
    kwargs = dict(num_classes=10, m=2, nested_init=True)
    supernet = timm.create_model(f'mixpath_{name}_supernet', **kwargs).double().train()
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    # In training mode a batch norm takes the scale of a sum out again, so that sums compute the same as single paths
    choices = supernet.space.default_arch.blocks  # one expansion: the branches of a block are not nested
    outputs = []
    for kernel_sizes in ((3,), (5,), (7,), (3, 7)):
        arch = Arch.from_blocks(BlockChoice((kernel_sizes,) * len(c.groups), c.expand_ratio) for c in choices)
        with torch.no_grad():
            supernet.active_arch = arch
            supernet._activate(arch)
            outputs.append(MixPath.forward_features(supernet, x))
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-2, atol=1e-2)
    # the paths have weights of their own from then on
    weights = {p.data_ptr() for p in supernet.parameters()}
    assert len(weights) == len(list(supernet.parameters()))
    assert 'nested_init' not in supernet.extract()._model_args


# What others do to a supernet


class LowRank(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Parameter(torch.zeros(1))


def _wrap(layer: nn.Module, how: str) -> nn.Module:
    if how == 'weight_norm':
        return nn.utils.parametrizations.weight_norm(layer)
    if how == 'old_weight_norm':
        return nn.utils.weight_norm(layer)
    if how == 'spectral_norm':
        return nn.utils.parametrizations.spectral_norm(layer)
    if how == 'prune':
        return prune.l1_unstructured(layer, 'weight', amount=0.5)
    return LowRank(layer)


FAMILIES = {
    'mixpath_nano_supernet': {},
    'mixpath_s3_supernet': dict(num_classes=10),
    'mixpath_nb201_supernet': {},
    'mixpath_supernet': dict(backbone='mobilenetv3_small_050', num_classes=10),
}


@pytest.mark.parametrize('name', FAMILIES)
def test_frozen_as_timm_freezes(name):
    supernet = reference.perturb(timm.create_model(name, **FAMILIES[name])).eval()
    names = supernet.state_dict().keys()
    for step in range(2):
        arch = supernet.space.arch(sample(supernet.space, seed=0, step=step))
        frozen = copy.deepcopy(supernet)
        timm.utils.freeze(frozen)
        assert not any(p.requires_grad for p in frozen.parameters())
        frozen.active_arch = supernet.active_arch = arch
        expected = supernet(make_input())
        torch.testing.assert_close(frozen(make_input()), expected, rtol=1e-4, atol=1e-5)
        network = frozen.extract()
        torch.testing.assert_close(network(make_input()), expected, rtol=1e-4, atol=1e-5)
        assert network.state_dict().keys() == supernet.extract().state_dict().keys()
        assert all(p.requires_grad for p in network.parameters()) and network.train().training
    counters = {key for key in names if key.endswith('num_batches_tracked')}
    assert frozen.state_dict().keys() == names - counters
    timm.utils.unfreeze(frozen)
    assert frozen.state_dict().keys() == names
    weights = copy.deepcopy(frozen.state_dict())
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    for other in (frozen, timm.create_model(name, **FAMILIES[name])):
        other.load_state_dict(weights)
        other.eval().active_arch = arch
        torch.testing.assert_close(other(make_input()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_functional_call(name):
    supernet = reference.perturb(timm.create_model(name, **FAMILIES[name])).eval()
    weights = {key: value.detach() * 1.5 for key, value in supernet.named_parameters()}
    scaled = copy.deepcopy(supernet)
    scaled.load_state_dict({**scaled.state_dict(), **weights})
    for step in range(2):
        scaled.active_arch = supernet.active_arch = sample(supernet.space, seed=0, step=step)
        y = torch.func.functional_call(supernet, weights, (make_input(),))
        torch.testing.assert_close(y, scaled(make_input()), rtol=1e-5, atol=1e-5)


def test_shared_layers_with_weight_norm_train():
    supernet = timm.create_model('mixpath_supernet', backbone='mobilenetv3_small_050', num_classes=10)
    block = supernet.blocks[2][0]
    conv = block.get_submodule(block.widest).conv_pw
    parameter = _wrap(conv, 'weight_norm').parametrizations.weight.original1
    supernet.train()
    narrow = 0
    for _ in range(30):
        supernet.zero_grad()
        supernet(make_input()).sum().backward()
        name = supernet.get_choice_blocks()['blocks.2.0'].active_branch
        if name is not None and name != block.widest:
            narrow += 1
            assert parameter.grad.abs().sum() > 0
    assert narrow > 2


def test_norms_that_can_not_be_shadowed():
    with pytest.raises(
        ValueError, match='norm_layer GroupNorm1Act can not be shadowed; use a batch norm, or sum_norm=bn'
    ):
        timm.create_model('mixpath_nano_supernet', norm_layer='groupnorm1')
    timm.create_model('mixpath_nano_supernet', norm_layer='groupnorm1', sum_norm='bn').extract()


def test_shadows_are_like_the_other_norms():
    norm_layer = partial(nn.BatchNorm2d, track_running_stats=False, eps=1e-3)
    supernet = timm.create_model('mixpath_nano_supernet', norm_layer=norm_layer)
    norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.track_running_stats, m.running_mean, m.eps) for m in norms} == {(False, None, 1e-3)}
    supernet.extract()


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('how', ['weight_norm', 'old_weight_norm', 'spectral_norm', 'prune', 'lora'])
@pytest.mark.parametrize(
    'name',
    ['mixpath_nano_supernet', 'mixpath_nb101_supernet', pytest.param('mixpath_nb201_supernet', marks=pytest.mark.slow)],
)
def test_wrapped_layers_are_one_sentence(name, how):
    supernet = timm.create_model(name, num_classes=4, **(dict(width=16) if 'nb101' in name else {}))
    arch = supernet.space.default_arch
    layers = [
        n
        for n, m in supernet.named_modules()
        if type(m) is nn.Conv2d and n.startswith(('blocks', 'stages')) and ('e6.paths.k3' in n or '3x3' in n)
    ]
    for layer in (layers[0], 'conv_stem' if 'nano' in name else None):
        if layer is None:
            continue
        changed = copy.deepcopy(supernet)
        parent, _, child = layer.rpartition('.')
        setattr(changed.get_submodule(parent), child, _wrap(changed.get_submodule(layer), how))
        with pytest.raises(ValueError, match=r'were wrapped or changed .* undo it first') as e:
            changed.extract(arch)
        assert len(str(e.value)) < 500
    supernet.extract(arch)


def test_every_thread_has_a_network_of_its_own():
    """The way out that the docstring gives: the results are those of one arch after the other."""
    supernet = reference.perturb(timm.create_model('mixpath_nano_supernet', m=3)).eval()
    archs = [sample(supernet.space, seed=0, step=i) for i in range(24)]
    x = torch.randn(2, 3, 32, 32)
    expected = []
    with torch.inference_mode():
        for arch in archs:
            supernet.active_arch = arch
            expected.append(supernet(x))

        def extracted(arch):
            with torch.inference_mode():
                return supernet.extract(arch)(x)

        own = threading.local()

        def copied(arch):
            with torch.inference_mode():
                if not hasattr(own, 'supernet'):
                    own.supernet = copy.deepcopy(supernet)
                own.supernet.active_arch = arch
                return own.supernet(x)

        for evaluate in (extracted, copied):
            with ThreadPoolExecutor(6) as pool:
                for y, y_ref in zip(pool.map(evaluate, archs), expected, strict=True):
                    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('mixpath_nano_supernet', {}),
        ('mixpath_nb201_supernet', {}),
        ('mixpath_supernet', dict(backbone='mobilenetv3_small_050')),
    ],
)
def test_folder_gives_back_the_active_arch(name: str, kwargs: dict, tmp_path: Any) -> None:
    supernet = timm.create_model(name, num_classes=10, **kwargs).eval()
    supernet.active_arch = sample(supernet.space, seed=1, step=0)
    assert supernet.active_arch != supernet.space.default_arch
    save_for_hf(supernet, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.active_arch == supernet.active_arch
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), supernet(x))
