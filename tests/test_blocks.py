import copy
from itertools import combinations

import pytest
import reference
import torch
import torch.nn as nn
from timm.models._efficientnet_blocks import InvertedResidual

from timm_mixpath import BlockChoice, BlockSpec, ShadowBatchNorm2d
from timm_mixpath.blocks import ChoiceBlock, MultiPathResidual, subnet_key

KERNELS = (3, 5, 7, 9)
SUBSETS = [s for k in range(1, 5) for s in combinations(KERNELS, k)]
CHOICES = [((3,), 3), ((9,), 6), ((3, 7), 6), ((5, 9), 3), ((3, 5, 9), 3), (KERNELS, 6)]  # kernels, expansion
SHAPES = [(8, 8, 1), (8, 12, 1), (8, 8, 2)]  # in, out, stride: with skip, without, strided


def make_block(
    in_chs: int = 8,
    out_chs: int = 8,
    stride: int = 1,
    num_shadows: int | None = 4,
    dtype: torch.dtype = torch.float64,
) -> ChoiceBlock:
    torch.manual_seed(0)
    block = ChoiceBlock(in_chs, BlockSpec(out_chs, kernel_sizes=KERNELS), num_shadows=num_shadows, stride=stride)
    return reference.perturb(block).to(dtype)


def make_input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_choice_block_equals_reference(in_chs, out_chs, stride, training, sbn):
    for kernel_sizes, expand_ratio in CHOICES:
        block = make_block(in_chs, out_chs, stride, num_shadows=4 if sbn else None).train(training)
        block.set_choice(BlockChoice((kernel_sizes,), expand_ratio))
        tensors = reference.leaf_tensors(block)
        x = make_input().requires_grad_()
        x_ref = x.detach().clone().requires_grad_()
        y = block(x)
        y_ref = reference.choice_block(
            tensors,
            '',
            x_ref,
            kernel_sizes=kernel_sizes,
            expand_ratio=expand_ratio,
            stride=stride,
            training=training,
            sbn=sbn,
        )
        torch.testing.assert_close(y, y_ref, rtol=1e-9, atol=1e-9)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        (y * weight).sum().backward()
        (y_ref * weight).sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-8, atol=1e-8)
        for name, p in block.named_parameters():
            torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-8, atol=1e-8, msg=name)
        for name, buffer in block.named_buffers():
            torch.testing.assert_close(buffer, tensors[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize('kernel_sizes', [(3,), (5, 9), KERNELS])
def test_choice_block_equals_reference_in_float32(kernel_sizes):
    block = make_block(dtype=torch.float32)
    block.set_choice(BlockChoice((kernel_sizes,), 6))
    tensors = reference.leaf_tensors(block)
    kwargs = dict(kernel_sizes=kernel_sizes, expand_ratio=6, stride=1, training=True)
    x = make_input(torch.float32)
    y, y_ref = block(x), reference.choice_block(tensors, '', x, **kwargs)
    torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-5)
    y.mul(x).sum().backward()
    y_ref.mul(x).sum().backward()
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_fixed_block_takes_a_selection_of_the_choice_blocks_state(in_chs, out_chs, stride, sbn):
    choice_block = make_block(in_chs, out_chs, stride, num_shadows=4 if sbn else None).eval()
    for kernel_sizes in SUBSETS:  # all 15 ways to activate paths
        choice = BlockChoice((kernel_sizes,), 3)
        choice_block.set_choice(choice)
        block = MultiPathResidual(in_chs, out_chs, kernel_sizes, 3, stride=stride).double().eval()
        state_dict = {subnet_key(key, choice): value for key, value in choice_block.state_dict().items()}
        state_dict.pop(None)
        block.load_state_dict(state_dict)  # strict: nothing is missing, nothing is left
        torch.testing.assert_close(block(make_input()), choice_block(make_input()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('key', 'fixed_key'),
    [
        ('e3.conv_pw.weight', 'conv_pw.weight'),
        ('e6.conv_pw.weight', None),
        ('e3.paths.k5.conv.weight', 'paths.k5.conv.weight'),
        ('e3.paths.k3.conv.weight', None),
        ('e6.paths.k5.conv.weight', None),
        ('e3.bn3.shadows.1.running_mean', 'bn3.running_mean'),
        ('e3.bn3.shadows.0.running_mean', None),
        ('e3.bn3.shadows.11.running_mean', None),
        ('e3.bn3.weight', 'bn3.weight'),
    ],
)
def test_subnet_key(key, fixed_key):
    assert subnet_key(key, BlockChoice(((5, 13),), 3)) == fixed_key


@pytest.mark.parametrize('kernel_size', KERNELS)
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_one_path_is_timms_inverted_residual(in_chs, out_chs, stride, kernel_size):
    torch.manual_seed(0)
    block = reference.perturb(MultiPathResidual(in_chs, out_chs, (kernel_size,), 6, stride=stride)).double()
    timm_block = InvertedResidual(
        in_chs, out_chs, dw_kernel_size=kernel_size, stride=stride, exp_ratio=6, act_layer=nn.ReLU6
    ).double()
    timm_block.load_state_dict(dict(zip(timm_block.state_dict(), block.state_dict().values())))
    for training in (True, False):
        y, y_timm = block.train(training)(make_input()), timm_block.train(training)(make_input())
        torch.testing.assert_close(y, y_timm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False])
def test_order_of_paths_does_not_matter(training):
    torch.manual_seed(0)
    block = reference.perturb(MultiPathResidual(8, 8, (3, 5, 7), 3)).double().train(training)
    shuffled = MultiPathResidual(8, 8, (7, 3, 5), 3).double().train(training)
    shuffled.load_state_dict(block.state_dict())
    torch.testing.assert_close(shuffled(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)


def test_input_is_not_modified():
    x = make_input()
    for block in (make_block(), MultiPathResidual(8, 8, (3, 5, 7), 3).double()):
        block(x)
        assert torch.equal(x, make_input())


def test_number_of_shadows():
    for num_shadows in (1, 2, 4):
        block = make_block(num_shadows=num_shadows)
        assert isinstance(block.e3.bn3, ShadowBatchNorm2d)
        assert len(block.e3.bn3.shadows) == len(block.e6.bn3.shadows) == num_shadows
    assert isinstance(make_block(num_shadows=None).e3.bn3, nn.BatchNorm2d)


def test_more_paths_than_shadows_is_refused():
    block = make_block(num_shadows=2)
    block.set_choice(BlockChoice(((3, 5, 7),), 3))
    with pytest.raises(ValueError, match='allowed are 1 to 2'):
        block(make_input())


def test_gradients_of_the_rest_stay_none():
    block = make_block()
    block.set_choice(BlockChoice(((5, 9),), 6))
    block(make_input()).sum().backward()
    with_grad = {name for name, p in block.named_parameters() if p.grad is not None}
    parts = ['conv_pw', 'bn1', 'paths.k5.conv', 'paths.k5.bn', 'paths.k9.conv', 'paths.k9.bn', 'conv_pwl']
    parts += ['bn3.shadows.1']
    assert {name.rsplit('.', 1)[0] for name in with_grad} == {f'e6.{part}' for part in parts}


def test_drop_path():
    block = MultiPathResidual(8, 8, (3, 5), 3, drop_path_rate=0.5)
    x = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dropped = [torch.equal(out, inp) for out, inp in zip(block(x), x)]
    assert 16 < sum(dropped) < 48
    assert not any(torch.equal(out, inp) for out, inp in zip(block.eval()(x), x))


@pytest.mark.parametrize('module', [make_block(), MultiPathResidual(8, 12, (3, 5), 6)], ids=['choice', 'fixed'])
def test_feature_info(module):
    assert module.feature_info('')['num_chs'] == module.to(torch.float64)(make_input()).shape[1]


def test_feature_info_expansion():
    info = MultiPathResidual(8, 12, (3, 5), 6).feature_info('expansion')
    assert (info['module'], info['num_chs']) == ('conv_pwl', 48)


@pytest.mark.parametrize('kernel_sizes', [(5,), (3, 7), (3, 5, 7)])
def test_torchscript(kernel_sizes):
    torch.manual_seed(0)
    block = reference.perturb(MultiPathResidual(8, 8, kernel_sizes, 3)).double()
    scripted = torch.jit.script(copy.deepcopy(block))
    torch.testing.assert_close(scripted(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scripted.eval()(make_input()), block.eval()(make_input()), rtol=1e-9, atol=1e-9)


def test_channels_last():
    block = make_block(dtype=torch.float32).to(memory_format=torch.channels_last).eval()
    block.set_choice(BlockChoice(((3, 7),), 6))
    y = block(make_input(torch.float32).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, block(make_input(torch.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_reparameterized_choice_block_is_the_same(in_chs, out_chs, stride, sbn):
    block = make_block(in_chs, out_chs, stride, num_shadows=4 if sbn else None).eval()
    folded = copy.deepcopy(block)
    for _ in range(2):  # again is a no-op
        folded.e3.reparameterize()
        folded.e6.reparameterize()
    for kernel_sizes, expand_ratio in CHOICES:
        for b in (block, folded):
            b.set_choice(BlockChoice((kernel_sizes,), expand_ratio))
        torch.testing.assert_close(folded(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)
