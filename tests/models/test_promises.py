"""What timm promises for a convolutional family, on the discovered models; where it can be, against timm's mixnet_m."""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import timm
import torch
import torch.nn as nn
from family import MODELS, ON_MIXNET_M, create, make_input, shared
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

every_model = pytest.mark.parametrize('key', list(MODELS))
on_mixnet_m = pytest.mark.parametrize('key', ON_MIXNET_M)
# For what takes a while: s3 has all that a and b have, groups and sums
_heavy = {key: pytest.param(key, marks=pytest.mark.slow) for key in ('a', 'b')}
every_model_if_slow = pytest.mark.parametrize('key', [_heavy.get(key, key) for key in MODELS])
on_mixnet_m_if_slow = pytest.mark.parametrize('key', [_heavy.get(key, key) for key in ON_MIXNET_M])


@functools.cache
def mixnet_m(**kwargs: Any) -> nn.Module:
    return timm.create_model('mixnet_m', **kwargs)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def weights(key: str, tmp_path: Path) -> str:
    """File of the weights of `shared(key)`."""
    save_file(shared(key).state_dict(), tmp_path / 'model.safetensors')
    return str(tmp_path / 'model.safetensors')


def choice_blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in model.blocks for block in stage]


# Features


@every_model_if_slow
def test_features_only_with_weights_of_the_whole_model(key: str, weights: str) -> None:
    overlay = dict(file=weights)
    expected = shared(key).forward_intermediates(make_input(key), intermediates_only=True)
    for out_indices in ((0, 2), (-1,), tuple(range(len(expected)))):
        model = create(
            key, features_only=True, out_indices=out_indices, pretrained=True, pretrained_cfg_overlay=overlay
        ).eval()
        features = model(make_input(key))
        assert model.feature_info.channels() == [f.shape[1] for f in features]
        assert model.feature_info.reduction() == [make_input(key).shape[-1] // f.shape[-1] for f in features]
        for index, feature in zip(out_indices, features, strict=True):
            torch.testing.assert_close(feature, expected[index])


@on_mixnet_m_if_slow
@pytest.mark.parametrize('output_stride', [8, 32])
def test_features_are_those_of_mixnet_m(key: str, output_stride: int) -> None:
    kwargs = dict(features_only=True, output_stride=output_stride)
    model, mixnet = create(key, **kwargs).eval(), mixnet_m(**kwargs).eval()
    assert model.feature_info.channels() == mixnet.feature_info.channels()
    assert model.feature_info.reduction() == mixnet.feature_info.reduction()
    features = model(make_input(key))
    assert [f.shape for f in features] == [f.shape for f in mixnet(make_input(key))]
    assert features[-1].shape[-1] == 64 // output_stride


@on_mixnet_m_if_slow
@pytest.mark.parametrize('output_stride', [8, 16])
def test_dilation_is_that_of_mixnet_m(key: str, output_stride: int) -> None:
    def grid(model: nn.Module) -> list[set]:
        convs = [[m for m in block.modules() if isinstance(m, nn.Conv2d)] for block in choice_blocks(model)]
        return [{(m.stride, m.dilation) for m in block if m.kernel_size != (1, 1)} for block in convs]

    kwargs = dict(output_stride=output_stride, device='meta')
    assert grid(create(key, **kwargs)) == grid(mixnet_m(**kwargs))


@pytest.mark.parametrize(('key', 'stride', 'output_stride'), [(k, 32, s) for k in ON_MIXNET_M for s in (8, 16)] + [
    ('c', 4, 2), ('c', 4, 1)
])  # fmt: skip
def test_dilated_model_takes_the_weights_and_equals_the_model_on_a_finer_grid(
    key: str, stride: int, output_stride: int
) -> None:
    model, dilated = copy.deepcopy(shared(key)), create(key, output_stride=output_stride).eval()
    dilated.load_state_dict(model.state_dict())
    for block in [*choice_blocks(model), *choice_blocks(dilated)]:
        block.se = nn.Identity()  # it averages over the grid
    coarse, fine = model.forward_features(make_input(key)), dilated.forward_features(make_input(key))
    step = stride // output_stride
    assert fine.shape[-1] == make_input(key).shape[-1] // output_stride
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-4 * coarse.abs().max().item())


@every_model_if_slow
def test_feature_extraction_by_fx(key: str) -> None:
    features = create(key, features_only=True, feature_cls='fx').eval()
    expected = create(key).eval().forward_intermediates(make_input(key), intermediates_only=True)
    for feature, y in zip(features(make_input(key)), expected, strict=True):
        torch.testing.assert_close(feature, y, rtol=1e-5, atol=1e-5)


# Classifier


@every_model
def test_classifier(key: str) -> None:
    model, x = copy.deepcopy(shared(key)), make_input(key)
    features, logits = model.forward_features(x), model(x)
    assert model.get_classifier() is model.classifier
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model.get_classifier()(pooled), logits)

    model.reset_classifier(7, 'max')
    assert (model.num_classes, model.global_pool.pool_type, model(x).shape) == (7, 'max', (2, 7))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.amax((2, 3)))
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(3, 'catavgmax')
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (2, 3)


@every_model_if_slow
@pytest.mark.parametrize(('global_pool', 'factor'), [('avg', 1), ('max', 1), ('avgmax', 1), ('catavgmax', 2), ('', 0)])
def test_no_classes_gives_pooled_features(key: str, global_pool: str, factor: int) -> None:
    model = create(key, num_classes=0, global_pool=global_pool).eval()
    features = torch.randn(2, model.num_features, 3, 3, generator=torch.Generator().manual_seed(0))
    shape = model.forward_head(features).shape
    assert shape == ((2, factor * model.num_features) if factor else features.shape)


# Optimizer


def groups_of_parameters(model: nn.Module) -> tuple[dict[str, set[float]], set[str]]:
    """Scale of the learning rate per block, and the parameters without weight decay, as timm's optimizer has them."""
    names = {id(p): name for name, p in model.named_parameters()}
    scales: dict[str, set[float]] = {}
    free: set[str] = set()
    for group in create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.05, layer_decay=0.75).param_groups:
        for p in group['params']:
            name = names.pop(id(p))
            scales.setdefault(re.match(r'blocks\.\d+\.\d+|\w+', name)[0], set()).add(group['lr_scale'])
            if group['weight_decay'] == 0:
                free.add(name)
    assert not names
    return scales, free


@on_mixnet_m
def test_layer_decay_is_that_of_mixnet_m(key: str) -> None:
    scales, _ = groups_of_parameters(create(key))
    assert scales == groups_of_parameters(mixnet_m())[0]


@every_model
def test_layer_decay_and_weight_decay(key: str) -> None:
    model = create(key)
    scales, free = groups_of_parameters(model)
    in_order = ['conv_stem', *[name for name in scales if name.startswith('blocks')], 'classifier']
    assert len(in_order) == 2 + len(choice_blocks(model))
    assert [scales[name] for name in in_order] == [{0.75 ** (len(in_order) - 1 - i)} for i in range(len(in_order))]
    assert free == {name for name, p in model.named_parameters() if p.ndim <= 1}
    assert hasattr(model, 'no_weight_decay') == hasattr(mixnet_m(device='meta'), 'no_weight_decay')


@every_model_if_slow
@torch.enable_grad()
def test_grad_checkpointing_gives_equal_gradients(key: str) -> None:
    gradients = []
    for enable in (False, True):
        model = create(key, drop_path_rate=0.2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(make_input(key, 4)).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# Weights and cfg


@every_model_if_slow
def test_checkpoint_path(key: str, weights: str, tmp_path: Path) -> None:
    expected = shared(key)(make_input(key))
    assert torch.equal(create(key, checkpoint_path=weights).eval()(make_input(key)), expected)
    checkpoint = dict(state_dict={f'module.{name}': value for name, value in shared(key).state_dict().items()})
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    assert torch.equal(create(key, checkpoint_path=str(tmp_path / 'last.pth.tar')).eval()(make_input(key)), expected)


@every_model_if_slow
def test_pretrained_file_into_one_channel_and_other_classes(key: str, weights: str) -> None:
    model = create(key, pretrained=True, in_chans=1, num_classes=5, pretrained_cfg_overlay=dict(file=weights)).eval()
    state_dict, expected = model.state_dict(), dict(shared(key).state_dict())
    x = make_input(key, in_chans=1)
    torch.testing.assert_close(model.conv_stem(x), shared(key).conv_stem(x.expand(-1, 3, -1, -1)))  # a grey image
    for name in set(expected) - {'conv_stem.weight', 'classifier.weight', 'classifier.bias'}:
        assert torch.equal(state_dict[name], expected[name]), name
    assert model(x).shape == (2, 5)


def test_pretrained_cfg_overlay() -> None:
    overlay = dict(mean=(0.5, 0.5, 0.5), crop_pct=0.9, input_size=(3, 160, 160), num_classes=12)
    model = create('a', pretrained_cfg_overlay=overlay, device='meta')
    config = timm.data.resolve_model_data_config(model)
    assert (config['mean'], config['crop_pct'], config['input_size']) == ((0.5, 0.5, 0.5), 0.9, (3, 160, 160))
    assert model.num_classes == 12
    assert timm.data.resolve_model_data_config(create('c', device='meta'))['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('key', ['a', 'c', 's3'])
def test_weights_of_other_shapes_are_refused(key: str, weights: str) -> None:
    with pytest.raises(RuntimeError, match=r'size mismatch for classifier\.weight'):
        create(key, num_classes=3, checkpoint_path=weights)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict'):
        create('b', checkpoint_path=weights)


def test_unknown_tag_and_missing_weights() -> None:
    for name in ('mixnet_m', 'mixpath_a'):
        with pytest.raises(RuntimeError, match=rf'Invalid pretrained tag \(nope\) for {name}'):
            timm.create_model(f'{name}.nope')
    with pytest.raises(RuntimeError, match='no weights of mixpath_c are published; train it with'):
        timm.create_model('mixpath_c', pretrained=True)
    with pytest.raises(RuntimeError, match=r'mixpath_a has no weights of this tag; there are mixpath_a\.imagenette'):
        timm.create_model('mixpath_a.untrained', pretrained=True)
    assert timm.create_model('mixpath_a.untrained', device='meta').pretrained_cfg['tag'] == 'untrained'


def test_arch_of_another_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arch has 12 blocks, space 's3' needs 18"):
        timm.create_model('mixpath_s3', arch=str(shared('c').arch))
    with pytest.raises(ValueError, match=r"arch block 0 .* is not in space 's2': 4 channel groups, the space has 1"):
        timm.create_model('mixpath_s2', arch=str(shared('a').arch))


# Arguments


@on_mixnet_m
@pytest.mark.parametrize('kwargs', [{}, dict(bn_momentum=0.01, bn_eps=1e-2)], ids=str)
def test_batch_norm_arguments(key: str, kwargs: dict) -> None:
    def norms(model: nn.Module) -> set:
        return {(type(m), m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}

    expected = norms(mixnet_m(device='meta', **kwargs))
    assert norms(create(key, device='meta', **kwargs)) == expected
    assert {(eps, momentum) for _, eps, momentum in expected} == {
        (kwargs.get('bn_eps', 1e-5), kwargs.get('bn_momentum', 0.1))
    }


@on_mixnet_m_if_slow
@pytest.mark.parametrize(
    'kwargs',
    [dict(act_layer='gelu'), dict(act_layer=nn.PReLU), dict(norm_layer='groupnorm1'), dict(norm_layer='layernorm2d')],
    ids=str,
)
def test_act_layer_and_norm_layer(key: str, kwargs: dict) -> None:
    def parts(model: nn.Module) -> list[tuple]:
        blocks = choice_blocks(model)
        norms = [model.bn1, *[block.bn1 for block in blocks], model.bn2]
        gates = [type(getattr(block.se, 'act1', None)) for block in blocks]
        return [(type(norm), type(norm.act)) for norm in norms] + gates

    model, mixnet = create(key, **kwargs).eval(), mixnet_m(**kwargs)
    assert parts(model) == parts(mixnet)
    for block in choice_blocks(model)[1:]:  # every path has the norm and the activation of its block
        # every path, or all paths of the block together
        path_norms = [block.bn2] if block.joint_norm else [m.bn for m in block.paths.modules() if hasattr(m, 'conv')]
        assert {(type(norm), type(norm.act)) for norm in path_norms} == {(type(block.bn1), type(block.bn1.act))}
    assert model(make_input(key)).isfinite().all()


def test_arguments_that_are_wrong_are_wrong_as_in_mixnet_m() -> None:
    for name in ('mixnet_m', 'mixpath_a'):
        with pytest.raises(KeyError, match='nosuchnorm'):
            timm.create_model(name, norm_layer='nosuchnorm')
        with pytest.raises(TypeError, match='unexpected keyword argument'):
            timm.create_model(name, no_such_argument=1)
        with pytest.raises(AssertionError, match='Invalid pool type'):
            timm.create_model(name, global_pool='median')


@every_model
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_device_and_dtype(key: str, dtype: torch.dtype) -> None:
    def kinds(model: nn.Module) -> tuple[set, set]:
        return {(p.dtype, p.device) for p in model.parameters()}, {(b.dtype, b.device) for b in model.buffers()}

    kwargs = dict(device='meta', dtype=dtype)
    assert kinds(create(key, **kwargs)) == kinds(mixnet_m(**kwargs))


@on_mixnet_m
def test_drop_path_rates_are_those_of_mixnet_m(key: str) -> None:
    def rates(model: nn.Module) -> list[float]:
        return [getattr(block.drop_path, 'drop_prob', 0.0) for block in choice_blocks(model)]

    kwargs = dict(drop_path_rate=0.2, device='meta')
    assert rates(create(key, **kwargs)) == rates(mixnet_m(**kwargs))


@every_model_if_slow
def test_drop_rates_work_in_training_only(key: str) -> None:
    model = create(key, drop_rate=0.5, drop_path_rate=0.3).eval()
    expected = create(key).eval()(make_input(key))
    torch.testing.assert_close(model(make_input(key)), expected)
    features = model.forward_features(make_input(key))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    assert not torch.equal(model.forward_features(make_input(key)), model.forward_features(make_input(key)))


@every_model_if_slow
@pytest.mark.parametrize('size', [1, 16, 33])
def test_small_inputs_work(key: str, size: int) -> None:
    x = torch.randn(1, 3, size, size + 1, generator=torch.Generator().manual_seed(0))
    assert shared(key)(x).isfinite().all()
    stride = max(f['reduction'] for f in shared(key).feature_info)
    assert shared(key).forward_features(x).shape[2:] == (-(-size // stride), -(-(size + 1) // stride))


def test_inputs_too_small_are_refused_as_in_mixnet_m() -> None:
    for name in ('mixnet_m', 'mixpath_a', 'mixpath_c'):
        model = timm.create_model(name)
        with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
            model.train()(torch.zeros(1, 3, 1, 1))
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            model.eval()(torch.zeros(1, 3, 0, 0))


# Precision, memory format, folding


@every_model_if_slow
def test_channels_last_equals_contiguous(key: str) -> None:
    model, x = copy.deepcopy(shared(key)).to(memory_format=torch.channels_last), make_input(key)
    features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    expected = shared(key).forward_features(x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@every_model_if_slow
def test_bfloat16(key: str) -> None:
    expected = shared(key)(make_input(key))
    with torch.autocast('cpu', torch.bfloat16):
        autocast = shared(key)(make_input(key))
    cast = copy.deepcopy(shared(key)).to(torch.bfloat16)(make_input(key).bfloat16())
    for y in (autocast, cast):
        assert y.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.98


@every_model_if_slow
@torch.enable_grad()
def test_training_under_autocast(key: str) -> None:
    model = create(key).train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = nn.functional.cross_entropy(model(make_input(key, 4)), torch.arange(4))
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_reparameterized_model_gives_equal_outputs(key: str) -> None:
    expected = shared(key)(make_input(key))
    folded = reparameterize_model(shared(key))
    # timm's function passes over stem and head, and a batch norm behind a sum has no convolution to go into
    kept = {re.sub(r'\.\d+', '.N', name) for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert kept == {'bn1', 'bn2'} | ({'blocks.N.N.bn2'} if key == 's3' else set())
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(folded(make_input(key)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('key', ['c', *[pytest.param(key, marks=pytest.mark.slow) for key in ON_MIXNET_M]])
def test_torchscript(key: str) -> None:
    scripted = torch.jit.script(shared(key))
    torch.testing.assert_close(scripted(make_input(key)), shared(key)(make_input(key)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['mixpath_nano', 'mixpath_nano_supernet'])
def test_reparameterizing_before_eval_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = reference.perturb(timm.create_model(name)).train()
    folded = reparameterize_model(model)
    assert folded.training and all(module.training for module in folded.modules())
    torch.testing.assert_close(folded.eval()(make_input('c')), model.eval()(make_input('c')), rtol=1e-4, atol=1e-4)


# Supernets


def test_supernet_is_not_scripted_but_what_it_extracts_is() -> None:
    supernet = reference.perturb(timm.create_model('mixpath_nano_supernet', m=3)).eval()
    with pytest.raises(RuntimeError, match=r'script extract\(\) instead'):
        torch.jit.script(supernet)
    supernet.active_arch = supernet.space.decode([size - 1 for size in supernet.space.gene_sizes])
    scripted = torch.jit.script(supernet.extract())
    torch.testing.assert_close(scripted(make_input('c')), supernet(make_input('c')), rtol=1e-5, atol=1e-5)


def test_pruned_supernet_extracts_and_keeps_its_taps() -> None:
    supernet = reference.perturb(timm.create_model('mixpath_nano_supernet')).eval()
    taps = supernet.forward_intermediates(make_input('c'), intermediates_only=True)
    for index, tap in enumerate(taps):
        pruned = copy.deepcopy(supernet)
        pruned.prune_intermediate_layers([index])
        pruned.reset_classifier(4, 'avg')
        model = pruned.extract()
        torch.testing.assert_close(model.forward_features(make_input('c')), tap)
        torch.testing.assert_close(model(make_input('c')), pruned(make_input('c')))
        assert model(make_input('c')).shape == (2, 4)


@pytest.mark.parametrize('name, crop_pct', [('mixpath_a', 0.875), ('mixpath_s2_supernet', 0.875), ('mixpath_s1', 1.0)])
def test_images_of_imagenet_are_cropped_as_timm_does(name: str, crop_pct: float) -> None:
    assert timm.get_pretrained_cfg(f'{name}.untrained').crop_pct == crop_pct
    if crop_pct < 1:
        assert timm.get_pretrained_cfg('mixnet_m').crop_pct == crop_pct  # on which S2 and S3 stand
