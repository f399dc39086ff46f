"""Weights of timm for the models of this package that stand on one of its networks."""

import copy

import pytest
import timm
import torch
from backbones import make_backbone

from timm_mixpath import Arch, BlockChoice, get_space, warm_start
from timm_mixpath.utils.errors import UsageError


def test_warm_start_keeps_a_classifier_of_other_classes() -> None:
    network = make_backbone('mobilenetv3_small_050')
    supernet = timm.create_model('mixpath_supernet', backbone='mobilenetv3_small_050', num_classes=3).eval()
    classifier = copy.deepcopy(supernet.classifier.state_dict())
    network.pretrained_cfg.update(mean=(0.5,) * 3, crop_pct=0.9)
    warm_start(supernet, network)
    assert supernet.pretrained_cfg['mean'] == (0.5,) * 3 and supernet.pretrained_cfg['crop_pct'] == 0.9
    assert all(torch.equal(value, classifier[key]) for key, value in supernet.classifier.state_dict().items())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(supernet.forward_features(x), network.forward_features(x))


@pytest.mark.parametrize(
    'source, kwargs, message',
    [
        ('mobilenetv3_small_075', {}, 'not those of mobilenetv3_small_050: they have shape'),
        ('resnet18', {}, 'not those of mobilenetv3_small_050'),
        ('mobilenetv3_small_050', dict(in_chans=1), r'shape \(16, 1, 3, 3\) at conv_stem.weight'),
    ],
)
def test_weights_of_another_network_change_nothing(source: str, kwargs: dict, message: str) -> None:
    supernet = timm.create_model('mixpath_supernet', backbone='mobilenetv3_small_050')
    before = copy.deepcopy(supernet.state_dict())
    with pytest.raises(UsageError, match=message):
        warm_start(supernet, timm.create_model(source, **kwargs))
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())
    for strange, message in (
        (timm.create_model('mobilenetv3_small_050', device='meta'), 'has no weights, it is a mobilenetv3_small_050'),
        ('mobilenetv3_small_050', r"must be a network, such as timm.create_model\('mobilenetv3_small_050'\) makes"),
        (before, 'must be a network'),
    ):
        with pytest.raises(UsageError, match=message):
            warm_start(supernet, strange)
    with pytest.raises(UsageError, match='ResNet stands on no network of timm'):
        warm_start(timm.create_model('resnet18'), supernet)


@pytest.mark.parametrize('model', ['mixpath', 'mixpath_supernet'])
@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(head_bias=False), r'they have shape \(1024,\) at conv_head.bias, it has nothing'),
        (dict(global_pool='catavgmax'), r'they have shape \(1024, 288, 1, 1\) at conv_head.weight, it has shape'),
    ],
)
def test_options_without_a_place_for_the_weights(model: str, kwargs: dict, message: str) -> None:
    net = timm.create_model(model, backbone='mobilenetv3_small_050', num_classes=10, **kwargs)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match=f'options with which it can not start from mobilenetv3_small_050: {message}'):
        warm_start(net, timm.create_model('mobilenetv3_small_050', num_classes=10))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    'backbone, source, message',
    [
        ('mobilenetv3_large_100', 'tf_mobilenetv3_large_100', 'the class of its conv_stem is Conv2dSame, not Conv2d'),
        ('tf_mobilenetv3_large_100', 'mobilenetv3_large_100', 'the class of its conv_stem is Conv2d, not Conv2dSame'),
        ('mobilenetv4_conv_medium', 'mobilenetv4_conv_aa_medium', 'the class of its .* is AvgPool2d, not none'),
        ('mobilenetv4_conv_aa_medium', 'mobilenetv4_conv_blur_medium', 'the class of its .* BlurPool2d, not AvgPool2d'),
        ('efficientnet_b0', 'efficientnet_blur_b0', 'its blocks.1.0 has a class BlurPool2d, which'),
        ('efficientnet_blur_b0', 'efficientnet_b0', 'its blocks.1.0 lacks a class BlurPool2d, which'),
        ('mobilenetv3_small_050', 'mobilenetv3_small_050 in silu', 'the class of its bn1.act is SiLU, not Hardswish'),
    ],
)
def test_network_of_the_same_shapes_that_computes_otherwise(backbone: str, source: str, message: str) -> None:
    supernet = timm.create_model('mixpath_supernet', backbone=backbone)
    name, _, act_layer = source.partition(' in ')
    with pytest.raises(UsageError, match=f'computes otherwise than {backbone}: {message}'):
        warm_start(supernet, timm.create_model(name, act_layer=act_layer or None))
    plain = timm.create_model(backbone, bn_eps=0.5)
    with pytest.raises(UsageError, match=r'the eps of its bn1 is 0\.5, not'):
        warm_start(supernet, plain)


@pytest.mark.parametrize('backbone', ['mobilenetv2_050', 'mobilenetv3_small_050'])
def test_models_without_a_head(backbone: str) -> None:
    source = make_backbone(backbone)
    net = timm.create_model('mixpath', backbone=backbone, num_classes=10)
    net.prune_intermediate_layers([2], prune_head=True)
    features = timm.create_model('mixpath_supernet', backbone=backbone, features_only=True)
    for model in net, features.model:
        warm_start(model, source)
        assert torch.equal(model.conv_stem.weight, source.conv_stem.weight)
    with pytest.raises(UsageError, match='the class of its bn1'):
        warm_start(net, timm.create_model(backbone, act_layer='silu'))


@pytest.fixture(scope='module')
def mixnet() -> torch.nn.Module:
    return make_backbone('mixnet_m').double()


def large_kernels(mixnet: torch.nn.Module, space_name: str, num_paths: int) -> str:
    """An arch of kernels that are at least as large as those of mixnet_m, summed where there are several."""
    blocks = []
    blocks_of = [block for stage in list(mixnet.blocks)[1:] for block in stage]
    for spec, block in zip(get_space(space_name).blocks, blocks_of):
        convs = block.conv_dw.values() if hasattr(block.conv_dw, 'values') else [block.conv_dw]
        largest = max(conv.kernel_size[0] for conv in convs)
        kernels = [k for k in spec.kernel_sizes if k >= largest][-num_paths:]
        blocks.append(BlockChoice((tuple(kernels),) * spec.num_groups, spec.expand_ratios[0]))
    return Arch.from_blocks(blocks)


def error(model: torch.nn.Module, mixnet: torch.nn.Module) -> float:
    x = torch.randn(2, 3, 48, 48, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = mixnet(x)
        return ((model.double().eval()(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('name, kwargs', [('s2', {}), ('s2', dict(sum_norm='bn')), ('s3', {}), ('s3', dict(m=2))])
def test_supernets_of_the_paper_begin_as_mixnet_m(mixnet: torch.nn.Module, name: str, kwargs: dict) -> None:
    supernet = timm.create_model(f'mixpath_{name}_supernet', num_classes=10, **kwargs).double()
    warm_start(supernet, mixnet)
    supernet.active_arch = large_kernels(mixnet, name, num_paths=1)
    assert error(supernet, mixnet) < 1e-9
    assert error(supernet.extract(), mixnet) < 1e-9
    if supernet.space.max_paths > 1:
        supernet.active_arch = large_kernels(mixnet, name, num_paths=2)
        if name == 's2':
            assert error(supernet, mixnet) > 1e-3  # the gate of squeeze-and-excite sees the sum
        else:  # a norm per channel group divides by the number of its paths
            assert error(supernet, mixnet) < 1e-9


@pytest.mark.parametrize('name', ['s2', 's3'])
@pytest.mark.parametrize('num_paths', [1, 2])
def test_fixed_networks_begin_as_mixnet_m(mixnet: torch.nn.Module, name: str, num_paths: int) -> None:
    arch = large_kernels(mixnet, name, num_paths)
    assert (max(max(block.num_paths) for block in arch.blocks) > 1) == (num_paths > 1)
    net = timm.create_model(f'mixpath_{name}', arch=arch, num_classes=10).double()
    warm_start(net, mixnet)
    assert error(net, mixnet) < 1e-9


@pytest.mark.parametrize('name', ['mixpath_a', 'mixpath_b'])
def test_discovered_models_inherit(mixnet: torch.nn.Module, name: str) -> None:
    net = timm.create_model(name, num_classes=7).double()
    warm_start(net, mixnet)
    assert torch.equal(net.conv_stem.weight, mixnet.conv_stem.weight)
    assert torch.equal(net.blocks[3][0].conv_pwl.weight, mixnet.blocks[3][0].conv_pwl.weight)
    # timm names weights of every network, loaded or not
    (note,) = net.pretrained_cfg['notes']
    assert note.startswith('warm start from a mixnet_m at hand; if its weights go back to mixnet_m.ft_in1k of timm,')
    x = torch.randn(1, 3, 48, 48, dtype=torch.double)
    assert net.eval()(x).isfinite().all()


def test_models_that_stand_on_nothing() -> None:
    for name in ('mixpath_nano_supernet', 'mixpath_c', 'mixpath_nb201'):
        with pytest.raises(UsageError, match='stands on no network of timm'):
            warm_start(timm.create_model(name), timm.create_model('mixnet_m', device='meta'))
    with pytest.raises(UsageError, match='not those of mixnet_m'):
        warm_start(timm.create_model('mixpath_a'), timm.create_model('mixnet_s'))
