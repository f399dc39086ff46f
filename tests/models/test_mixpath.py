import json
import math

import pytest
import reference
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf
from timm.models.efficientnet import EfficientNet
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from timm_mixpath import Arch, MixPath, get_space
from timm_mixpath.spaces import genotypes

ARCH = 'k3+5_e6,k7_e3,k3+5+7_e3,k5_e6,k3+7_e6,k3_e3,k5+7_e6,k7_e6'


def make_model(arch: str | None = ARCH, seed: int = 0, **kwargs) -> MixPath:
    torch.manual_seed(seed)
    return reference.perturb(timm.create_model('mixpath_nano', arch=arch, **kwargs)).eval()


def make_input(batch_size: int = 2, size: int = 32, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(batch_size, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def num_params(space_name: str, arch: Arch, num_classes: int) -> int:
    """Number of parameters of a sub-network, counted by formula."""
    space = get_space(space_name)
    total = 3 * 9 * space.stem_chs + 2 * space.stem_chs
    in_chs = space.stem_chs
    for spec, choice in zip(space.blocks, arch.blocks):
        mid = choice.expand_ratio * in_chs
        total += in_chs * mid + 2 * mid
        total += sum(mid * k * k + 2 * mid for k in choice.groups[0])
        total += mid * spec.out_chs + 2 * spec.out_chs
        in_chs = spec.out_chs
    total += in_chs * space.num_features + 2 * space.num_features
    return total + space.num_features * num_classes + num_classes


def test_models_are_registered():
    names = {'mixpath_s1', 'mixpath_s1_supernet', 'mixpath_nano', 'mixpath_nano_supernet'}
    assert names <= set(timm.list_models('mixpath_*'))
    assert all(timm.is_model(name) for name in names)
    assert not timm.list_models('mixpath_s1*', pretrained=True)


BUDGETS = {'a': (349e6, 5.0), 'b': (378e6, 5.1)}


@pytest.mark.parametrize('letter', BUDGETS)
def test_discovered_models_are_inside_the_published_budgets(letter):
    macs, params = BUDGETS[letter]
    model = timm.create_model(f'mixpath_{letter}.untrained').eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        assert model(make_input(1, 224)).shape == (1, 1000)
    assert abs(counter.get_total_flops() / 2 / macs - 1) < 0.01
    assert round(count(model) / 1e6, 1) == params
    cfg = model.default_cfg
    assert (cfg['input_size'], cfg['num_classes']) == ((3, 224, 224), 1000)


def test_discovered_models_are_of_their_spaces():
    archs = {letter: timm.create_model(f'mixpath_{letter}', device='meta').arch for letter in 'abc'}
    assert get_space('s3', m=1).arch(archs['a'])
    assert get_space('s2', m=2).arch(archs['b'])
    assert get_space('s1').arch(archs['c'])
    assert any(max(choice.num_paths) == 2 for choice in archs['b'].blocks)
    c = timm.create_model('mixpath_c')
    assert c(make_input()).shape == (2, 10)
    assert c.default_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('letter', 'abc')
def test_discovered_models_have_a_fixed_arch(letter):
    with pytest.raises(ValueError, match=f"mixpath_{letter} has a fixed arch; use mixpath_s[123] with arch='k3_e6'"):
        timm.create_model(f'mixpath_{letter}', arch='k3_e6')


def test_imagenet_backbone_is_mixnet_m():
    """All but the depthwise kernels and the batch norms of the paths equals timm's mixnet_m."""
    mixnet = timm.create_model('mixnet_m', device='meta')
    model = timm.create_model('mixpath_s2', device='meta')  # single kernels: one batch norm of full width, as mixnet

    def rest(model: nn.Module, depthwise: str) -> list[int]:
        named = {n: p for n, p in model.named_parameters() if depthwise not in n or n.startswith('blocks.0')}
        blocks = {}  # mixnet_m has a module per group of a 1x1 convolution
        for name, p in named.items():
            key = '.'.join(name.split('.')[:3]) if name.startswith('blocks') else name
            blocks[key] = blocks.get(key, 0) + p.numel()
        return list(blocks.values())

    assert rest(model, '.conv.') == rest(mixnet, '.conv_dw.')
    assert [f | dict(module='') for f in model.feature_info] == [f | dict(module='') for f in mixnet.feature_info]
    acts = [[type(m) for m in net.modules() if isinstance(m, (nn.ReLU, nn.SiLU))] for net in (model, mixnet)]
    assert acts[0] == acts[1]


def test_mixed_kernels_of_four_equal_mixnets():
    """Block 15 of S3 with all four kernels is mixnet_m's own block."""
    arch = ','.join(f'k3.5.7.9_e{choice.expand_ratio}' for choice in get_space('s3').default_arch.blocks)
    block = timm.create_model('mixpath_s3', arch=arch).blocks[5][1]
    timm_block = timm.create_model('mixnet_m').blocks[5][1]
    state_dict = {}
    for key, value in reference.perturb(timm_block).state_dict().items():
        if key.startswith('conv_dw.'):
            index = int(key.split('.')[1])
            state_dict[f'paths.g{index}.k{3 + 2 * index}.conv.weight'] = value
        elif key.startswith('conv_pwl.'):
            state_dict.setdefault('conv_pwl.weight', []).append(value)
        else:
            state_dict[key] = value
    state_dict['conv_pwl.weight'] = torch.cat(state_dict['conv_pwl.weight'])
    block.load_state_dict(state_dict)
    x = torch.randn(2, 200, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block.eval()(x), timm_block.eval()(x), rtol=1e-5, atol=1e-5)


def test_pretrained_is_refused_where_there_are_no_weights():
    with pytest.raises(RuntimeError, match='no weights of mixpath_s1 are published'):
        timm.create_model('mixpath_s1', pretrained=True)


@pytest.mark.parametrize('name', ['mixpath_s1', 'mixpath_nano'])
def test_default_cfg(name):
    cfg = timm.create_model(f'{name}.untrained', device='meta').default_cfg
    assert (cfg['input_size'], cfg['num_classes'], cfg['first_conv']) == ((3, 32, 32), 10, 'conv_stem')
    assert cfg['architecture'] == name


@pytest.mark.parametrize('name', ['s1', 'nano'])
@pytest.mark.parametrize('num_classes', [10, 100])
def test_number_of_parameters(name, num_classes):
    space = get_space(name, 3)
    arch = space.decode([i % size for i, size in enumerate(space.gene_sizes)])
    model = timm.create_model(f'mixpath_{name}', arch=arch, num_classes=num_classes, device='meta')
    assert count(model) == num_params(name, arch, num_classes)


@pytest.mark.parametrize('training', [True, False])
def test_equals_reference(training):
    # The reference runs a supernet, here one that holds nothing but this arch
    model = make_model().double().train(training)
    space = get_space('nano', 3)
    tensors, names = {}, {}
    for name, value in reference.leaf_tensors(model).items():
        parts = name.split('.')
        if parts[0] == 'blocks':
            choice = model.arch.blocks[sum(map(len, space.stages[: int(parts[1])])) + int(parts[2])]
            parts.insert(3, f'e{choice.expand_ratio}')
            if parts[4] == 'bn3':
                parts[5:5] = ['shadows', str(len(choice.groups[0]) - 1)]
        names[name] = '.'.join(parts)
        tensors[names[name]] = value
    x = make_input().double()
    y, y_ref = model(x), reference.supernet(tensors, space, model.arch, x, training=training)
    torch.testing.assert_close(y, y_ref, rtol=1e-8, atol=1e-8)
    y.pow(2).sum().backward()
    y_ref.pow(2).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, tensors[names[name]].grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize('arch', [ARCH, Arch(ARCH), ' k5+3_e6,' + ARCH.split(',', 1)[1]])
def test_arch_as_text_and_as_object(arch):
    model = timm.create_model('mixpath_nano', arch=arch)
    assert type(model.arch) is Arch
    assert model.arch == ARCH
    paths = [[list(block.paths) for block in stage] for stage in model.blocks]
    assert paths == [[['k3', 'k5'], ['k7']], [['k3', 'k5', 'k7'], ['k5'], ['k3', 'k7']], [['k3'], ['k5', 'k7'], ['k7']]]


def test_default_arch():
    assert make_model(None).arch == genotypes.MIXPATH_NANO
    assert timm.create_model('mixpath_s1', device='meta').arch == get_space('s1').default_arch
    assert isinstance(make_model(None), EfficientNet)


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        (ARCH.replace('k7_e3', 'k9_e3'), 'arch block 1 .*kernel 9'),
        (ARCH.replace('k7_e3', 'k7_e4'), 'arch block 1 .*expansion 4'),
        (ARCH + ',k3_e6', '9 blocks'),
        ('nonsense', 'arch block 0'),
    ],
)
def test_arch_outside_the_space(arch, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('mixpath_nano', arch=arch)


def test_initialisation():
    # Normal(0, sqrt(2 / (k * k * out))) for convolutions, depthwise ones too; uniform(+-1/sqrt(fan_out)) for the linear
    torch.manual_seed(0)
    model = timm.create_model('mixpath_s1', arch=','.join(['k3+5+7+9_e6'] * 12), num_classes=100)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 1 + 12 * 6 + 1
    for name, m in convs.items():
        std = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
        assert abs(m.weight.std().item() / std - 1) < 0.15, name
        assert abs(m.weight.mean().item() / std) < 0.15, name
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.weight.eq(1).all() and m.bias.eq(0).all()
    bound = 1 / math.sqrt(100)
    assert 0.99 * bound < model.classifier.weight.abs().max() <= bound
    assert model.classifier.bias.eq(0).all()


@pytest.mark.parametrize('arch', [Arch(ARCH), ARCH])
def test_saved_sub_network_is_rebuilt_bit_equal(arch, tmp_path):
    kwargs = dict(num_classes=7, in_chans=1, width_mult=0.5, bn_eps=1e-3, output_stride=4, global_pool='avgmax')
    model = make_model(arch, **kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'mixpath_nano'
    assert config['model_args']['arch'] == ARCH

    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.arch == ARCH
    assert torch.equal(loaded(make_input(in_chans=1)), model(make_input(in_chans=1)))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ('name', 'channels', 'reduction'),
    [
        ('mixpath_nano', [24, 48, 96], [2, 4, 8]),
        ('mixpath_nano_supernet', [24, 48, 96], [2, 4, 8]),
        ('mixpath_s1', [48, 96, 320], [1, 2, 4]),
    ],
)
def test_features_only(name, channels, reduction):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == reduction
    features = model(make_input(1))
    assert [tuple(f.shape) for f in features] == [(1, c, 32 // r, 32 // r) for c, r in zip(channels, reduction)]


def test_features_only_out_indices():
    model = timm.create_model('mixpath_nano', features_only=True, out_indices=(0, 2)).eval()
    assert [tuple(f.shape[1:]) for f in model(make_input(1))] == [(24, 16, 16), (96, 4, 4)]


def test_forward_intermediates():
    model = make_model()
    x = make_input()
    output, intermediates = model.forward_intermediates(x)
    assert torch.equal(output, model.forward_features(x))
    y = model.bn1(model.conv_stem(x))
    for stage, intermediate in zip(model.blocks, intermediates):
        y = stage(y)
        assert torch.equal(intermediate, y)
    assert len(intermediates) == 3
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(last, intermediates[-1])


def test_classifier():
    model = make_model(num_classes=0)
    x = make_input()
    assert model(x).shape == (2, 384)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize(
    ('global_pool', 'pool'),
    [
        ('avg', lambda x: x.mean((2, 3))),
        ('max', lambda x: x.amax((2, 3))),
        ('avgmax', lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))),
    ],
)
def test_global_pool(global_pool, pool):
    model = make_model(global_pool=global_pool)
    x = make_input()
    torch.testing.assert_close(model(x), model.classifier(pool(model.forward_features(x))))


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(in_chans):
    assert make_model(in_chans=in_chans)(make_input(in_chans=in_chans)).shape == (2, 10)


def test_drop_path_rate_grows_linearly():
    model = make_model(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(8)])
    torch.testing.assert_close(model(make_input()), make_model()(make_input()))  # nothing is dropped in eval
    model.train()
    assert not torch.equal(model(make_input()), model(make_input()))


def test_drop_rate():
    model = make_model(drop_rate=0.5)
    features = model.forward_features(make_input())
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize('name', ['mixpath_nano', 'mixpath_nano_supernet'])
def test_bn_args_reach_every_batch_norm(name):
    model = timm.create_model(name, bn_eps=1e-3, bn_momentum=0.01)
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(bn.eps, bn.momentum) for bn in bns} == {(1e-3, 0.01)}


@pytest.mark.parametrize('name', ['mixpath_nano', 'mixpath_nano_supernet'])
def test_act_layer(name):
    model = timm.create_model(name, act_layer='silu')
    kinds = {type(m) for m in model.modules()}
    assert nn.SiLU in kinds
    assert nn.ReLU6 not in kinds


@pytest.mark.parametrize(('output_stride', 'step'), [(4, 2), (2, 4)])
def test_output_stride_is_the_same_network_on_a_finer_grid(output_stride, step):
    x = make_input()
    model = make_model(output_stride=output_stride)
    assert max(f['reduction'] for f in model.feature_info) == output_stride
    fine, coarse = model.forward_features(x), make_model().forward_features(x)
    assert fine.shape[-1] == 32 // output_stride
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-4)


def test_width_mult():
    model = make_model(width_mult=0.5)
    assert model.conv_stem.out_channels == 16
    assert model.num_features == 384
    assert count(model) < 0.5 * count(make_model())
    assert model(make_input()).shape == (2, 10)


def test_other_input_sizes():
    model = make_model()
    for size in (16, 40, 64):
        assert model.forward_features(make_input(1, size)).shape[-1] == size // 8


def test_grad_checkpointing_gives_equal_gradients():
    grads = []
    for enable in (False, True):
        model = make_model().train()
        model.set_grad_checkpointing(enable)
        model(make_input()).pow(2).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_torchscript():
    model = make_model()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(make_input()), model(make_input()), rtol=1e-5, atol=1e-5)


def test_group_matcher_covers_every_parameter():
    model = make_model()
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert sorted(name for group in groups.values() for name in group) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) == 1 + 8 + 1  # stem, blocks (the head convolution goes with the last), classifier


def test_channels_last_and_bf16():
    model, x = make_model(), make_input()
    expected = model(x)
    y = make_model().to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_reparameterize_folds_batch_norms():
    model = make_model()
    folded = reparameterize_model(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.blocks.modules()) == 0
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.blocks.modules()) == 8 * 2 + 13  # kept: 2 a block, 1 a path
    torch.testing.assert_close(folded(make_input()), model(make_input()), rtol=1e-4, atol=1e-4)


def test_no_attribute_of_timms_efficientnet_is_missing() -> None:
    """MixPath sets by itself what the constructor of the class that it inherits from would set."""
    attributes = vars(timm.create_model('efficientnet_b0')).keys()
    modules = timm.create_model('efficientnet_b0')._modules.keys()
    for model in (timm.create_model('mixpath_a'), timm.create_model('mixpath_nano_supernet')):
        missing = attributes - vars(model).keys()
        assert not missing, f'EfficientNet.__init__ sets {sorted(missing)}, MixPath.__init__ has to do so too'
        assert modules == model._modules.keys()
