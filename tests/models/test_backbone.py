"""Networks of timm as search spaces: exact copies, inheritance, extraction, bad names."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from backbones import exact_archs, make_backbone, make_supernet
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from timm_mixpath import Arch, BlockChoice, backbone_space, list_backbones, sample
from timm_mixpath.models import backbone as backbone_module
from timm_mixpath.models.backbone import BackboneNet, BackboneSupernet
from timm_mixpath.models.cost import cost_table, count_macs
from timm_mixpath.search.accuracy import recalibrate_bn
from timm_mixpath.utils.errors import RunError, UsageError

# One of every family, small ones; SAME padding, squeeze-and-excite, mixed kernels, fused blocks, blur are among them
FAMILIES = [
    'tf_efficientnetv2_b0',
    'mobilenetv2_050',
    'mobilenetv3_small_050',
    'mobilenetv4_conv_small_035',
    'tinynet_e',
    'lcnet_035',
    'tf_mixnet_s',
    *[
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            'tf_efficientnet_lite0',
            'efficientnet_b0',
            'tf_efficientnet_b0',
            'tf_mobilenetv3_small_minimal_100',
            'mobilenetv4_conv_aa_medium',
            'mnasnet_small',
            'semnasnet_075',
            'spnasnet_100',
            'fbnetc_100',
            'fbnetv3_b',
            'hardcorenas_a',
            'mixnet_s',
            'efficientnet_blur_b0',
            'mobilenetv4_conv_blur_medium',
            'mobilenetv4_hybrid_medium_075',
            'efficientnet_b1_pruned',
        )
    ],
]

CHEAP = ['mobilenetv3_small_050', 'tf_mixnet_s', 'mobilenetv4_conv_small_035']


@pytest.fixture(scope='module')
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, BackboneSupernet]:
    network = make_backbone(request.param).double()
    supernet = make_supernet(network, m=3 if request.param in CHEAP else 2)
    assert supernet.active_arch == supernet.space.default_arch
    return network, supernet


@pytest.fixture
def pair(made: tuple[nn.Module, BackboneSupernet]) -> tuple[nn.Module, BackboneSupernet]:
    """A backbone and a supernet that starts as it, in double precision."""
    network, supernet = made
    supernet.active_arch = supernet.space.default_arch  # whatever another test has run
    return network, supernet


of_families = pytest.mark.parametrize('made', FAMILIES, indirect=True)


@of_families
def test_supernet_begins_as_its_backbone(pair: tuple[nn.Module, BackboneSupernet]) -> None:
    network, supernet = pair
    x = torch.randn(2, 3, 48, 48, dtype=torch.double)
    with torch.inference_mode():
        expected = network(x)
        scale = expected.abs().max()
        assert (supernet(x) - expected).abs().max() < 1e-12 * scale  # groups in one tensor round otherwise than apart
        archs = exact_archs(supernet.space, 3)
        assert any(max(choice.num_paths) > 1 for choice in archs[0].blocks)
        for arch in archs:
            supernet.active_arch = arch
            assert (supernet(x) - expected).abs().max() < 1e-9 * scale
            assert (supernet.extract()(x) - expected).abs().max() < 1e-9 * scale


@of_families
def test_own_arch_goes_back_into_timm(pair: tuple[nn.Module, BackboneSupernet]) -> None:
    network, supernet = pair
    weights = supernet.extract().state_dict()
    plain = timm.create_model(supernet.space.name, num_classes=10).double()
    plain.load_state_dict(weights)
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize('name', CHEAP)
def test_start_is_exact_in_float32(name: str) -> None:
    network = make_backbone(name)
    supernet = make_supernet(network, m=3)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(x)
        for arch in exact_archs(supernet.space, 3):
            supernet.active_arch = arch
            assert (supernet(x) - expected).abs().max() < 1e-4 * expected.abs().max()


@of_families
def test_extracted_equals_active_and_costs_what_the_table_says(pair: tuple[nn.Module, BackboneSupernet]) -> None:
    _, supernet = pair
    table = cost_table(supernet)
    low, high = table.bounds('macs')
    own = table.macs(supernet.space.default_arch)
    plain = timm.create_model(supernet.space.name, num_classes=10, device='meta')
    assert own == sum(count_macs(plain.eval(), table.input_size).values())
    assert table.params(supernet.space.default_arch) == sum(p.numel() for p in plain.parameters())
    x = torch.randn(1, 3, 48, 48, dtype=torch.double)
    for arch in [*(sample(supernet.space, seed=0, step=i) for i in range(2)), table.smallest('macs')]:
        supernet.active_arch = arch
        subnet = supernet.extract()
        with torch.inference_mode():
            torch.testing.assert_close(subnet(x), supernet(x), rtol=1e-9, atol=1e-9)
        assert sum(p.numel() for p in subnet.parameters()) == table.params(arch)
        macs = sum(count_macs(subnet.to('meta', torch.float32), table.input_size).values())
        assert low <= macs == table.macs(arch) <= high


@pytest.mark.parametrize('share_widths', [False, True])
def test_sampled_parts_get_gradients_and_nothing_else(share_widths: bool) -> None:
    supernet = make_supernet(make_backbone('mobilenetv3_small_050'), share_widths=share_widths).train()
    supernet(torch.randn(4, 3, 64, 64)).sum().backward()
    arch = Arch(supernet.sampled_arch)
    assert any(choice.is_skip for choice in arch.blocks)
    for index, ((name, block), choice) in enumerate(zip(supernet.get_choice_blocks().items(), arch.blocks)):
        trained = {key for key, p in block.named_parameters() if p.grad is not None}
        if choice.is_skip:
            assert not trained
            continue
        branch, paths = block.parts(choice)
        owner = branch
        if share_widths:
            owner = block.parts(replace(choice, expand_ratio=max(supernet.space.blocks[index].expand_ratios)))[0]
            paths = [path.replace(f'{branch}.', f'{owner}.', 1) for path in paths]
        assert all(any(key.startswith(f'{path}.') for key in trained) for path in paths), name
        assert all(key.startswith((f'{owner}.', f'{branch}.')) for key in trained)
        in_paths = {key for key in trained if f'.{block.site.paths}.' in key}
        assert in_paths == {key for key in in_paths if key.startswith(tuple(f'{path}.' for path in paths))}


@pytest.mark.parametrize('share_widths', [False, True])
def test_narrower_expansion_keeps_the_channels_that_weigh_most(share_widths: bool) -> None:
    network = make_backbone('mobilenetv2_050')
    supernet = make_supernet(network, expansions=(0.5, 1), share_widths=share_widths)
    block = network.blocks[2][1]
    half = supernet.blocks[2][1].fixed(BlockChoice(((3,),), 3))
    scores = block.conv_pwl.weight.flatten(1).norm(dim=0) * block.bn2.weight.abs()
    kept = sorted(scores.argsort(descending=True)[: half.conv_pw.out_channels].tolist())
    assert torch.equal(half.conv_pw.weight, block.conv_pw.weight[kept])
    assert torch.equal(half.conv_dw.weight, block.conv_dw.weight[kept])
    assert torch.equal(half.bn2.running_var, block.bn2.running_var[kept])
    assert torch.equal(half.conv_pwl.weight, block.conv_pwl.weight[:, kept])


@pytest.mark.parametrize(
    'name',
    ['mobilenetv3_small_050', *(pytest.param(n, marks=pytest.mark.slow) for n in CHEAP[1:])],
)
def test_widths_share_weights(name: str) -> None:
    """A narrower copy computes and learns what one of its own weights would, in the place of the widest's."""
    network = make_backbone(name).double()
    shared, apart = (make_supernet(network, share_widths=share) for share in (True, False))
    assert sum(p.numel() for p in shared.parameters()) < 0.85 * sum(p.numel() for p in apart.parameters())
    # What a narrower copy is made of is in the checkpoint, not in what the supernet was built from
    restored = make_supernet(make_backbone(name, seed=1).double())
    restored.load_state_dict(shared.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    narrow = 0
    for step in range(12):
        arch = sample(shared.space, seed=3, step=step)
        for supernet in (shared, apart, restored):
            supernet.zero_grad()
            supernet.active_arch = arch
        outputs = shared(x)
        torch.testing.assert_close(outputs, apart(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(outputs, restored(x))
        outputs.square().sum().backward()
        apart(x).square().sum().backward()
        for index, choice in enumerate(arch.blocks):
            block_name = shared.space.block_names[index]
            ours, theirs = (net.get_submodule(block_name) for net in (shared, apart))
            if choice.is_skip or ours.parts(choice)[0] == ours.widest:
                continue
            narrow += 1
            branch = ours.parts(choice)[0]
            channels = ours.get_buffer(f'{branch}_channels')
            pointwise = f'{ours.site.expand}.weight'
            expected = torch.zeros_like(ours.get_parameter(f'{ours.widest}.{pointwise}'))
            expected[channels] = theirs.get_parameter(f'{branch}.{pointwise}').grad
            grad = ours.get_parameter(f'{ours.widest}.{pointwise}').grad
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
            mine = {key: p.grad for key, p in ours.get_submodule(branch).named_parameters()}
            for key, value in mine.items():
                assert 'bn' in key or key.startswith('dw_end') or 'layer_scale' in key, key
                other = theirs.get_parameter(f'{branch}.{key}').grad
                assert (value is None) == (other is None)
                if value is not None:
                    torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
            # All weights of all kernels and groups: what the narrower copy learned, put where its channels are
            for key, parameter in theirs.get_submodule(branch).named_parameters():
                if key in mine or parameter.grad is None:
                    continue
                total = ours.get_parameter(f'{ours.widest}.{key}').grad.sum()
                torch.testing.assert_close(total, parameter.grad.sum(), rtol=1e-7, atol=1e-9)
    assert narrow > 6


def test_smaller_kernel_is_the_centre_and_larger_has_zeros_around() -> None:
    network = make_backbone('tf_efficientnet_lite0')
    supernet = make_supernet(network)
    weight = network.blocks[2][0].conv_dw.weight
    paths = supernet.blocks[2][0].get_submodule('e6.conv_dw')
    assert torch.equal(paths.k5.conv.weight, weight)
    assert torch.equal(paths.k3.conv.weight, weight[..., 1:4, 1:4])
    assert torch.equal(paths.k7.conv.weight[..., 1:6, 1:6], weight)
    assert paths.k7.conv.weight.count_nonzero() == weight.count_nonzero()


def test_one_batch_norm_is_wrong_for_sums() -> None:
    network = make_backbone('mobilenetv2_050')
    x = torch.randn(2, 3, 64, 64)
    errors = {}
    for sum_norm in ('sbn', 'bn'):
        supernet = make_supernet(network, sum_norm=sum_norm)
        arch = next(a for a in exact_archs(supernet.space, 5) if any(sum(c.num_paths) > 1 for c in a.blocks))
        supernet.active_arch = arch
        with torch.inference_mode():
            errors[sum_norm] = (supernet(x) - network(x)).abs().max().item()
    assert errors['sbn'] < 1e-4 < 1e-2 < errors['bn']


def test_recalibration_of_a_skipping_arch_leaves_the_supernet_as_it_was() -> None:
    supernet = make_supernet(make_backbone('mobilenetv3_small_050'))
    before = copy.deepcopy(supernet.state_dict())
    arch = cost_table(supernet).smallest('macs')
    assert any(choice.is_skip for choice in arch.blocks)
    with recalibrate_bn(supernet, arch, [(torch.randn(8, 3, 64, 64), None)]):
        pass
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())


@pytest.mark.parametrize('name', CHEAP)
def test_folder_rebuilds_the_network_without_the_backbones_weights(name: str, tmp_path: Path) -> None:
    supernet = make_supernet(make_backbone(name), kernel_sizes=None, expansions=(0.5, 1))
    subnet = supernet.extract(sample(supernet.space, seed=0, step=1))
    save_for_hf(subnet, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'mixpath'
    assert config['model_args']['backbone'] == name and config['model_args']['arch'] == subnet.arch
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), subnet(x))
    whole = tmp_path / 'supernet'
    save_for_hf(supernet, whole, safe_serialization=True)
    again = timm.create_model(f'local-dir:{whole}', pretrained=True).eval()
    assert again.space == supernet.space
    with torch.inference_mode():
        assert torch.equal(again(x), supernet(x))


@pytest.mark.parametrize('name', ['mixpath', 'mixpath_supernet'])
def test_folder_holds_the_defaults_that_made_the_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model(name, backbone='mobilenetv3_small_050', num_classes=3).eval()
    default = timm.create_model(name, num_classes=3)
    mixed = timm.create_model(name, backbone='mixnet_s', num_classes=3)  # kernels of its own in every block
    for folder, saved in ('named', model), ('default', default), ('mixed', mixed):
        save_for_hf(saved, tmp_path / folder, safe_serialization=True)
    # As a later version might have them
    monkeypatch.setattr(backbone_module, '_KERNEL_SIZES', (3, 5))
    monkeypatch.setattr(backbone_module, 'DEFAULT_BACKBONE', 'mobilenetv3_small_050')
    for folder, saved in ('named', model), ('default', default), ('mixed', mixed):
        again = timm.create_model(f'local-dir:{tmp_path / folder}', pretrained=True).eval()
        assert again.space.name == saved.space.name and again.state_dict().keys() == saved.state_dict().keys()
        assert name == 'mixpath' or again.space == saved.space
    config = json.loads((tmp_path / 'named' / 'config.json').read_text())
    if name == 'mixpath_supernet':
        expected = dict(more_kernel_sizes=[3, 5, 7], expansions=[0.5, 0.75, 1.0], skip=True, share_widths=True)
        assert config['model_args'].items() >= dict(expected, m=2, sum_norm='sbn').items()


@pytest.mark.slow
def test_pretrained_file_is_that_of_the_backbone_or_of_the_supernet(tmp_path: Path) -> None:
    network = make_backbone('mobilenetv2_050')
    save_file(network.state_dict(), tmp_path / 'backbone.safetensors')
    kwargs = dict(backbone='mobilenetv2_050', pretrained=True, num_classes=10)
    supernet = timm.create_model(
        'mixpath_supernet', pretrained_cfg_overlay=dict(file=str(tmp_path / 'backbone.safetensors')), **kwargs
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(supernet(x), network(x))
    (note,) = supernet.pretrained_cfg['notes']
    assert note == 'warm start from weights of mobilenetv2_050 in backbone.safetensors, whose licence is not recorded'

    # Of other classes: the classifier is left out, as timm does
    other = timm.create_model(
        'mixpath_supernet',
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'backbone.safetensors')),
        **{**kwargs, 'num_classes': 3},
    ).eval()
    with torch.inference_mode():
        assert torch.equal(other.forward_features(x), network.forward_features(x))

    # A network of one arch inherits from the same file
    arch = exact_archs(supernet.space, 1)[0]
    net = timm.create_model(
        'mixpath', arch=arch, pretrained_cfg_overlay=dict(file=str(tmp_path / 'backbone.safetensors')), **kwargs
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(net(x), network(x), rtol=1e-4, atol=1e-4)

    # The supernet's own weights
    nn.init.zeros_(supernet.blocks[1][0].get_submodule('e6').conv_pw.weight)
    save_file(supernet.state_dict(), tmp_path / 'supernet.safetensors')
    overlay = dict(file=str(tmp_path / 'supernet.safetensors'), num_classes=10)
    again = timm.create_model('mixpath_supernet', pretrained_cfg_overlay=overlay, **kwargs).eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in supernet.state_dict().items())


@pytest.mark.parametrize(
    'name',
    [
        'mobilenetv3_small_050',
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('mobilenetv4_conv_small_035', 'mobilenetv2_050')),
    ],
)
def test_smaller_output_stride_is_timms(name: str) -> None:
    """Which timm has for one of its two classes with `features_only` alone."""
    plain = make_backbone(name)
    x = torch.randn(1, 3, 64, 64)
    for output_stride in 8, 16:
        options = dict(features_only=True, output_stride=output_stride)
        expected = timm.create_model(name, **options).eval()
        expected.load_state_dict({key: plain.state_dict()[key] for key in expected.state_dict()})
        supernet = make_supernet(plain, output_stride=output_stride)
        net = supernet.extract(supernet.space.default_arch)
        info = [level['reduction'] for level in supernet.feature_info]
        assert info == expected.feature_info.reduction() == [level['reduction'] for level in net.feature_info]
        with torch.inference_mode():
            for model in supernet, net:
                features = model.forward_intermediates(x, intermediates_only=True)
                for given, wanted in zip(features, expected(x)):
                    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
        table = cost_table(supernet, (3, 64, 64))
        assert table.macs(net.arch) == sum(count_macs(net, (3, 64, 64)).values())
        for kind in 'mixpath', 'mixpath_supernet':
            given = timm.create_model(kind, backbone=name, **options).eval()(x)
            assert [y.shape for y in given] == [y.shape for y in expected(x)]


@pytest.mark.parametrize('name', ['mixpath', 'mixpath_supernet'])
def test_own_weights_named_by_folder_or_file(name: str, tmp_path: Path) -> None:
    arch = sample(backbone_space('mobilenetv2_050'), seed=0, step=0)
    model = timm.create_model(name, backbone='mobilenetv2_050', arch=arch, num_classes=3).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    x = torch.randn(1, 3, 64, 64)
    for file in (tmp_path, tmp_path / 'model.safetensors'):
        overlay = dict(file=str(file))
        # config.json says what the weights are of, so the backbone need not be told
        for kwargs in (dict(backbone='mobilenetv2_050'), {}):
            again = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **kwargs)
            with torch.inference_mode():
                assert torch.equal(again.eval()(x), model(x))
        with pytest.raises(UsageError, match='of a network around mobilenetv2_050, not mobilenetv3_small_050'):
            timm.create_model(name, backbone='mobilenetv3_small_050', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (
            dict(backbone='resnet50'),
            "'resnet50' can not be a backbone: timm builds it as ResNet, and only networks of its classes EfficientNet "
            'and MobileNetV3 can be searched',
        ),
        (dict(backbone='efficientnet_b00'), r"'efficientnet_b00' can not be a backbone: timm has no such model"),
        (dict(backbone='mixpath_nano'), 'a network of this package'),
        (dict(backbone='efficientnet_b0_gn'), 'GroupNormAct is no batch norm'),
        (dict(backbone='efficientnet_b0_g8_gn'), 'grouped, not depthwise'),
        (dict(backbone='hf-hub:timm/x'), 'must be the name of a network in timm'),
        (dict(backbone='efficientnet_b0.'), "no weights with the tag '', there are"),
        (dict(skip='false'), "skip='false' must be True or False"),
        (dict(share_widths=0), 'share_widths=0 must be True or False'),
        (dict(backbone='efficientnet_b0.nope'), r"no weights with the tag 'nope', there are .*ra_in1k"),
        (dict(kernel_sizes=(3, 4, 5)), 'kernel 4 is not an odd'),
        (dict(kernel_sizes=(3, 7)), r'kernel_sizes=\(3, 7\) lack the 5 that blocks.2.0'),
        (dict(kernel_sizes='357'), "kernel_sizes='357' must be odd numbers, such as 3,5,7"),
        (dict(kernel_sizes=(3, 5.0)), r'kernel_sizes=\(3, 5\.0\) must be odd numbers'),
        (dict(kernel_sizes=(3, 5, 5)), 'kernel 5 is given twice'),
        (dict(m=4), 'm=4 is out of range'),
        (dict(expansions=(0.5,)), r'expansions=\(0.5,\) must be shares'),
        (dict(expansions=(1.5, 1)), 'must be shares'),
        (dict(arch='k3_e1'), 'arch has 1 blocks'),
        (dict(sum_norm='gn'), 'known are sbn, bn'),
        (dict(sampling='x'), 'unknown sampling'),
        (dict(pretrained=True, pretrained_cfg_overlay=dict(file='nope.safetensors')), 'does not exist'),
    ],
)
def test_what_can_not_be_is_one_sentence(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        timm.create_model('mixpath_supernet', **{'backbone': 'efficientnet_b0', **kwargs})
    assert '\n' not in str(info.value)


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = next(n for n in list_backbones('efficientnet_b*') if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(RunError, match=f'timm has no pretrained weights of {untrained}'):
        timm.create_model('mixpath_supernet', backbone=untrained, pretrained=True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(RunError, match=r"can not load 'timm/efficientnet_b0.ra_in1k': offline mode is on"):
        timm.create_model('mixpath_supernet', backbone='efficientnet_b0', pretrained=True, cache_dir=tmp_path)
    other = tmp_path / 'other.safetensors'
    save_file(timm.create_model('mobilenetv2_050').state_dict(), other)
    overlay = dict(file=str(other))
    message = r'do not fit this mixpath_supernet: .*; nor are they those of its backbone efficientnet_b0'
    with pytest.raises(RunError, match=message):
        timm.create_model(
            'mixpath_supernet', backbone='efficientnet_b0', pretrained=True, pretrained_cfg_overlay=overlay
        )


def test_list_backbones() -> None:
    names = list_backbones('mobilenetv3*')
    assert names == list(timm.list_models('mobilenetv3*'))
    assert 'efficientnet_b0_gn' not in list_backbones('efficientnet_b0*')
    assert list_backbones('resnet*') == []
    assert 'mobilenetv3_small_100.lamb_in1k' in list_backbones('mobilenetv3_small*', pretrained=True)


@pytest.mark.slow
def test_every_backbone_on_the_list_can_be_searched() -> None:
    """On the meta device: a supernet, what its archs cost, and the smallest of them."""
    for name in list_backbones():
        supernet = timm.create_model('mixpath_supernet', backbone=name, device='meta').eval()
        table = cost_table(supernet)
        arch = table.smallest('macs')
        net = timm.create_model('mixpath', backbone=name, arch=str(arch), device='meta').eval()
        assert sum(p.numel() for p in net.parameters()) == table.params(arch), name
        assert sum(count_macs(net, table.input_size).values()) == table.macs(arch), name


def test_pruned_widths_stay_as_they_are() -> None:
    space = backbone_space('efficientnet_b1_pruned')
    network = timm.create_model('efficientnet_b1_pruned', device='meta')
    widths = {f'blocks.{i}.{j}': b.conv_pw.out_channels for i in (1, 2) for j, b in enumerate(network.blocks[i])}
    assert widths['blocks.1.0'] == 48 and widths['blocks.1.1'] == 62  # behind 16 and 12 channels
    assert 'blocks.1.0' in space.block_names and 'blocks.1.1' not in space.block_names


def test_blur_is_as_narrow_as_what_it_blurs() -> None:
    network = make_backbone('efficientnet_blur_b0').double()
    supernet = make_supernet(network, m=1)
    x = torch.randn(1, 3, 48, 48, dtype=torch.double)
    arch = cost_table(supernet).smallest('macs')
    supernet.active_arch = arch
    with torch.inference_mode():
        assert torch.equal(supernet(x), supernet.extract()(x))
    # The filter is in no state dict
    assert all(not b.is_meta and b.dtype in (torch.double, torch.long) for b in supernet.extract().buffers())


def test_attention_costs_the_same_on_every_device() -> None:
    network = timm.create_model('mobilenetv4_hybrid_medium_075', num_classes=10).eval()
    macs = count_macs(network, (3, 64, 64))
    assert macs == count_macs(network.to('meta'), (3, 64, 64))


def test_space_reaches_from_less_than_half_to_more_than_the_backbone() -> None:
    for name in ('efficientnet_b0', 'mobilenetv3_large_100', 'tf_efficientnet_lite0'):
        table = cost_table(timm.create_model('mixpath_supernet', backbone=name, device='meta'))
        low, high = (bound / table.macs(table.space.default_arch) for bound in table.bounds('macs'))
        assert low < 0.4 and high > 1.3, name


def test_options_of_the_space() -> None:
    space = backbone_space('efficientnet_b0', kernel_sizes=[5, 3], expansions=(1, 0.5), skip=False, m=1)
    assert space.max_paths == 1 and not any(block.can_skip for block in space.blocks)
    assert space.blocks[1].kernel_sizes == (5, 3) and space.blocks[1].expand_ratios == (3, 6)
    assert space.blocks[0].expand_ratios == (1,)  # depthwise-separable, nothing is expanded
    assert [block.can_skip for block in backbone_space('efficientnet_b0').blocks[:4]] == [False, False, True, False]
    assert backbone_space('mixnet_s').blocks[-3].kernel_sizes == (3, 5, 7, 9, 11)
    with pytest.raises(ValueError, match='the block can not be skipped'):
        space.arch(','.join(['k3_e1', *['skip'] * 15]))


def test_stand_alone_network_takes_archs_beyond_the_defaults() -> None:
    default = backbone_space('mobilenetv3_small_050').default_arch
    blocks = [str(block) for block in default.blocks]
    blocks[1], blocks[2] = 'k9_e2.25', 'skip'
    net = timm.create_model('mixpath', backbone='mobilenetv3_small_050', arch=','.join(blocks), num_classes=4)
    assert isinstance(net, BackboneNet) and net(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    blocks[1] = 'k3_e9'
    with pytest.raises(ValueError, match='expansion 9 is not one of'):
        timm.create_model('mixpath', backbone='mobilenetv3_small_050', arch=','.join(blocks))


@pytest.mark.parametrize('name', CHEAP)
def test_features_are_where_timm_has_them(name: str) -> None:
    plain = timm.create_model(name, features_only=True, feature_cls='getter')
    for model in ('mixpath', 'mixpath_supernet'):
        features = timm.create_model(model, backbone=name, features_only=True)
        assert features.feature_info.channels() == plain.feature_info.channels()
        x = torch.randn(1, 3, 64, 64)
        assert [f.shape for f in features.eval()(x)] == [f.shape for f in plain.eval()(x)]


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'mobilenetv4_conv_small'])
def test_features_behind_a_stage_whose_last_block_is_skipped(name: str) -> None:
    space = backbone_space(name)
    choices = zip(space.blocks, space.default_arch.blocks)
    arch = ','.join('skip' if spec.can_skip else str(choice) for spec, choice in choices)
    plain = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    supernet = timm.create_model('mixpath_supernet', backbone=name, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    supernet.model.active_arch = arch
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected, shapes = supernet(x), [f.shape for f in plain(x)]
        extracted = supernet.model.extract()
        assert [f.shape for f in expected] == shapes
        torch.testing.assert_close(extracted.forward_intermediates(x, intermediates_only=True)[-1], expected[-1])
    network = timm.create_model('mixpath', backbone=name, arch=arch)
    network.prune_intermediate_layers([3], extra_blocks=True)
    assert timm.create_model('mixpath', backbone=name, arch=arch, features_only=True).feature_info.channels()


def test_default_arch_of_all_backbones_is_in_their_space() -> None:
    for name in itertools.islice(list_backbones('*_b0*'), 5):
        space = backbone_space(name)
        assert space.arch(space.default_arch) == space.decode(space.encode(space.default_arch))


@pytest.mark.slow
def test_an_arch_of_narrow_blocks_can_be_traced() -> None:
    supernet = make_supernet(make_backbone('mobilenetv3_small_050'))
    supernet.active_arch = cost_table(supernet).smallest('macs')
    widths = [block.active_branch not in (None, block.widest) for block in supernet.get_choice_blocks().values()]
    assert any(widths)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, feature = supernet(x), supernet.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(supernet, x)(x), expected)
        assert torch.equal(torch.export.export(supernet, (x,)).module()(x), expected)
        extractor = timm.models.create_feature_extractor(supernet, ['blocks.2'])
        (found,) = extractor(x).values() if isinstance(extractor(x), dict) else extractor(x)
    assert found.shape[2:] and torch.isfinite(found).all() and feature.shape[0] == found.shape[0]
