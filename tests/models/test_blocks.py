import copy
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import reference
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, GroupNorm1
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

from timm_mixpath import BlockChoice, BlockSpec, ShadowBatchNorm2d
from timm_mixpath.models.blocks import DepthwiseSeparable, MultiPathResidual
from timm_mixpath.models.choice_blocks import ChoiceBlock

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


def assert_step_equals_reference(block: ChoiceBlock, choice: BlockChoice, **kwargs: Any) -> None:
    """A block and the reference give the same outputs, gradients and running statistics."""
    block.set_choice(choice)
    tensors = reference.leaf_tensors(block)
    x = make_input().requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    y = block(x)
    kwargs = dict(kwargs, groups=choice.groups, expand_ratio=choice.expand_ratio, training=block.training)
    y_ref = reference.choice_block(tensors, '', x_ref, **kwargs)
    torch.testing.assert_close(y, y_ref, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    (y_ref * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-8, atol=1e-8)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-8, atol=1e-8, msg=name)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(buffer, tensors[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_choice_block_equals_reference(in_chs, out_chs, stride, training, sbn):
    for kernel_sizes, expand_ratio in CHOICES:
        block = make_block(in_chs, out_chs, stride, num_shadows=4 if sbn else None).train(training)
        assert_step_equals_reference(block, BlockChoice((kernel_sizes,), expand_ratio), stride=stride, sbn=sbn)


@pytest.mark.parametrize('kernel_sizes', [(3,), (5, 9), KERNELS])
def test_choice_block_equals_reference_in_float32(kernel_sizes):
    block = make_block(dtype=torch.float32)
    block.set_choice(BlockChoice((kernel_sizes,), 6))
    tensors = reference.leaf_tensors(block)
    kwargs = dict(groups=(kernel_sizes,), expand_ratio=6, stride=1, training=True)
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
        block = MultiPathResidual(in_chs, out_chs, (kernel_sizes,), 3, stride=stride).double().eval()
        block.load_state_dict(choice_block.inherited(choice, block))  # strict: nothing is missing, nothing is left
        torch.testing.assert_close(block(make_input()), choice_block(make_input()), rtol=1e-9, atol=1e-9)


def test_inherited_takes_neighbours_of_a_name_apart():
    """Kernels 5 and 15, shadows 1 and 11: names that begin alike."""
    block = ChoiceBlock(4, BlockSpec(4, expand_ratios=(1, 11), kernel_sizes=tuple(range(1, 25, 2))), num_shadows=12)
    choice = BlockChoice(((1, 11),), 1)
    fixed = MultiPathResidual(4, 4, choice.groups, 1)
    state_dict = block.inherited(choice, fixed)
    assert state_dict.keys() == fixed.state_dict().keys()
    assert state_dict['bn3.weight'] is not None
    block_state = block.state_dict()
    for key, source in (
        ('conv_pw.weight', 'e1.conv_pw.weight'),
        ('paths.k11.bn.running_var', 'e1.paths.k11.bn.running_var'),
        ('bn3.running_mean', 'e1.bn3.shadows.1.running_mean'),
    ):
        assert state_dict[key].data_ptr() == block_state[source].data_ptr(), key


@pytest.mark.parametrize('kernel_size', KERNELS)
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_one_path_is_timms_inverted_residual(in_chs, out_chs, stride, kernel_size):
    torch.manual_seed(0)
    block = reference.perturb(MultiPathResidual(in_chs, out_chs, ((kernel_size,),), 6, stride=stride)).double()
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
    block = reference.perturb(MultiPathResidual(8, 8, ((3, 5, 7),), 3)).double().train(training)
    shuffled = MultiPathResidual(8, 8, ((7, 3, 5),), 3).double().train(training)
    shuffled.load_state_dict(block.state_dict())
    torch.testing.assert_close(shuffled(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)


def test_input_is_not_modified():
    x = make_input()
    for block in (make_block(), MultiPathResidual(8, 8, ((3, 5, 7),), 3).double()):
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
    block = MultiPathResidual(8, 8, ((3, 5),), 3, drop_path_rate=0.5)
    x = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dropped = [torch.equal(out, inp) for out, inp in zip(block(x), x)]
    assert 16 < sum(dropped) < 48
    assert not any(torch.equal(out, inp) for out, inp in zip(block.eval()(x), x))


@pytest.mark.parametrize('module', [make_block(), MultiPathResidual(8, 12, ((3, 5),), 6)], ids=['choice', 'fixed'])
def test_feature_info(module):
    assert module.feature_info('')['num_chs'] == module.to(torch.float64)(make_input()).shape[1]


def test_feature_info_expansion():
    info = MultiPathResidual(8, 12, ((3, 5),), 6).feature_info('expansion')
    assert (info['module'], info['num_chs']) == ('conv_pwl', 48)


@pytest.mark.parametrize('kernel_sizes', [(5,), (3, 7), (3, 5, 7)])
def test_torchscript(kernel_sizes):
    torch.manual_seed(0)
    block = reference.perturb(MultiPathResidual(8, 8, (kernel_sizes,), 3)).double()
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


# Channel groups: kernels per group with runs of equal neighbours, sums, and both
GROUPED = [
    (((3,), (3,), (5,)), 1),
    (((3,), (3,), (3,)), 1),
    (((9,), (7,), (9,)), 1),
    (((3,), (3, 5), (3, 5)), 2),
    (((5, 9), (3,), (7,)), 2),
    (((3, 5, 7, 9), (3, 5, 7, 9), (3,)), 4),
]  # groups, smallest m


def make_grouped_block(m: int, out_chs: int = 8, stride: int = 1, sbn: bool = True, **kwargs) -> ChoiceBlock:
    torch.manual_seed(0)
    spec = BlockSpec(out_chs, num_groups=3, exp_groups=2, pwl_groups=2, se_ratio=0.5)
    block = ChoiceBlock(
        8, spec, num_shadows=m if sbn else None, norm_sums=m > 1, stride=stride, act_layer=nn.SiLU, **kwargs
    )
    return reference.perturb(block).double()


@pytest.mark.parametrize('sbn', [True, False], ids=['sbn', 'bn'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize(('in_chs', 'out_chs', 'stride'), SHAPES)
def test_grouped_choice_block_equals_reference(in_chs, out_chs, stride, training, sbn):
    for (groups, min_m), m in zip(GROUPED, (1, 2, 4, 2, 4, 4)):
        assert m >= min_m
        # 24 and 48 channels in 3 groups, and 8 * 5 = 40: the first group is wider
        block = make_grouped_block(m, out_chs, stride, sbn).train(training)
        kwargs = dict(act=nn.functional.silu, pointwise_groups=(2, 2), norm_sums=m > 1)
        assert_step_equals_reference(block, BlockChoice(groups, 6), stride=stride, sbn=sbn, **kwargs)


def test_uneven_channel_groups():
    spec = BlockSpec(8, expand_ratios=(5,), num_groups=3)  # 40 channels: 14, 13, 13
    block = reference.perturb(ChoiceBlock(8, spec, num_shadows=2, norm_sums=True)).double()
    for groups in [groups for groups, m in GROUPED if m <= 2]:
        choice = BlockChoice(groups, 5)
        block.set_choice(choice)
        tensors = reference.leaf_tensors(block)
        kwargs = dict(groups=groups, expand_ratio=5, stride=1, norm_sums=True)
        y_ref = reference.choice_block(tensors, '', make_input(), training=False, **kwargs)
        torch.testing.assert_close(block.eval()(make_input()), y_ref, rtol=1e-9, atol=1e-9)
        fixed = MultiPathResidual(8, 8, groups, 5, norm_sums=True).double().eval()
        fixed.load_state_dict(block.inherited(choice, fixed))
        torch.testing.assert_close(fixed(make_input()), y_ref, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('norm', ['sbn', 'bn', 'groupnorm'])
def test_grouped_fixed_block_joins_the_weights_of_equal_neighbours(norm):
    kwargs = {}
    if norm == 'groupnorm':
        kwargs = dict(norm_layer=GroupNorm1)
    for groups, min_m in GROUPED:
        m = 1 if norm == 'groupnorm' else max(2, min_m)
        if min_m > 1 and norm == 'groupnorm':
            continue
        choice_block = make_grouped_block(m, sbn=norm == 'sbn', **kwargs).eval()
        kwargs_fixed = dict(kwargs, exp_groups=2, pwl_groups=2, se_ratio=0.5, norm_sums=m > 1, act_layer=nn.SiLU)
        choice = BlockChoice(groups, 6)
        choice_block.set_choice(choice)
        block = MultiPathResidual(8, 8, groups, 6, **kwargs_fixed).double().eval()
        block.load_state_dict(choice_block.inherited(choice, block))
        torch.testing.assert_close(block(make_input()), choice_block(make_input()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('groups', 'kernels'),
    [
        (((3,), (3,), (5,), (3,)), [['k3'], ['k5'], ['k3']]),
        (((3,), (3,), (3,), (3,)), [['k3']]),
        (((3, 5), (5, 3), (5,), (5,)), [['k3', 'k5'], ['k5']]),
        (((3,), (5,), (7,), (9,)), [['k3'], ['k5'], ['k7'], ['k9']]),
    ],
)
def test_equal_neighbours_share_a_convolution(groups, kernels):
    block = MultiPathResidual(8, 8, groups, 6)
    assert [list(block.get_submodule(name)) for name in block.run_names] == kernels
    # A norm over all channels of a path, or an activation with weights of its own, can not be shared
    for kwargs in (dict(norm_layer=GroupNorm1), dict(act_layer=nn.PReLU)):
        assert len(MultiPathResidual(8, 8, groups, 6, **kwargs).run_names) == 4


def test_one_norm_serves_all_groups_where_nothing_is_summed():
    def norms(groups, **kwargs):
        block = MultiPathResidual(8, 8, groups, 6, **kwargs)
        return sum(isinstance(module, nn.BatchNorm2d) for module in block.paths.modules()), type(block.bn2)

    assert norms(((3,), (5,), (3,))) == (0, BatchNormAct2d)
    assert norms(((3,), (5,), (3,)), norm_sums=True) == (3, BatchNormAct2d)
    assert norms(((3,), (5, 7), (3,))) == (4, nn.Identity)  # an activation stands between norm and sum
    assert norms(((3,), (3,), (3,))) == (1, nn.Identity)
    assert norms(((3,), (5,), (3,)), act_layer=nn.PReLU) == (3, nn.Identity)


def test_mixnet_block_is_timms_inverted_residual():
    """Equal shares of 3x3 and 5x5, squeeze-and-excite, grouped 1x1: as timm's mixnet_m has it."""
    torch.manual_seed(0)
    block = MultiPathResidual(8, 8, ((3,), (5,)), 6, 1, 1, 2, 2, se_ratio=0.5, act_layer=nn.SiLU)
    block = reference.perturb(block).double()
    se_layer = partial(SqueezeExcite, rd_ratio=0.5 / 6)
    timm_block = InvertedResidual(
        8, 8, [3, 5], exp_ratio=6, exp_kernel_size=[1, 1], pw_kernel_size=[1, 1], act_layer=nn.SiLU, se_layer=se_layer
    ).double()
    state_dict = block.state_dict()
    for name in ('conv_pw', 'conv_pwl'):  # timm has a module per group
        for i, weight in enumerate(state_dict.pop(f'{name}.weight').chunk(2)):
            state_dict[f'{name}.{i}.weight'] = weight
    for i, path in enumerate(('paths.g0.k3', 'paths.g1.k5')):
        state_dict[f'conv_dw.{i}.weight'] = state_dict.pop(f'{path}.conv.weight')
    timm_block.load_state_dict(state_dict)
    for training in (True, False):
        y, y_timm = block.train(training)(make_input()), timm_block.train(training)(make_input())
        torch.testing.assert_close(y, y_timm, rtol=1e-9, atol=1e-9)


def test_gradients_of_the_rest_stay_none_in_groups():
    block = make_grouped_block(2)
    block.set_choice(BlockChoice(((3,), (5, 9), (3,)), 6))
    block(make_input()).sum().backward()
    with_grad = {name.rsplit('.', 1)[0] for name, p in block.named_parameters() if p.grad is not None}
    paths = [f'paths.{path}.{part}' for path in ('g0.k3', 'g1.k5', 'g1.k9', 'g2.k3') for part in ('conv', 'bn')]
    shadows = ['bn2.0.shadows.0', 'bn2.1.shadows.1', 'bn2.2.shadows.0']
    rest = ['conv_pw', 'bn1', 'se.conv_reduce', 'se.conv_expand', 'conv_pwl', 'bn3']
    assert with_grad == {f'e6.{part}' for part in paths + shadows + rest}


def test_sums_of_channel_groups_need_a_batch_norm():
    with pytest.raises(ValueError, match='GroupNorm1Act can not normalise the sums of channel groups'):
        make_grouped_block(2, sbn=False, norm_layer=GroupNorm1)


def test_reparameterized_grouped_block_is_the_same():
    for groups, m in GROUPED:
        kwargs = dict(exp_groups=2, pwl_groups=2, se_ratio=0.5, norm_sums=m > 1)
        block = reference.perturb(MultiPathResidual(8, 8, groups, 6, **kwargs)).double().eval()
        folded = copy.deepcopy(block)
        folded.reparameterize()
        # The norm behind sums stands in front of a non-linear layer and stays
        assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == (m > 1)
        torch.testing.assert_close(folded(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)
    block = reference.perturb(DepthwiseSeparable(8, 8)).double().eval()
    folded = copy.deepcopy(block)
    folded.reparameterize()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(make_input()), block(make_input()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('groups', 'm'), GROUPED)
def test_torchscript_of_channel_groups(groups, m):
    block = reference.perturb(MultiPathResidual(8, 8, groups, 3, se_ratio=0.5, norm_sums=m > 1)).double()
    scripted = torch.jit.script(copy.deepcopy(block))
    torch.testing.assert_close(scripted.eval()(make_input()), block.eval()(make_input()), rtol=1e-9, atol=1e-9)
