import copy

import pytest
import timm.layers
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_mixpath import ShadowBatchNorm2d
from timm_mixpath.models.layers import ReLU6FromOutput, keep_layout_of_gradient, run_out_of_place


def make_sbn(m: int = 3, chs: int = 4, **kwargs) -> ShadowBatchNorm2d:
    """An SBN with statistics and affine parameters of its own in every shadow."""
    sbn = ShadowBatchNorm2d(chs, m, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for bn in sbn.shadows:
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.data.copy_(torch.rand(chs, generator=generator) + 0.5)
    return sbn


def make_input(chs: int = 4) -> torch.Tensor:
    return 2 * torch.randn(5, chs, 6, 7, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('training', [True, False])
def test_equals_batch_norm_number_k(k, training):
    sbn = make_sbn(eps=1e-3, momentum=0.3).train(training)
    bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3).train(training)
    bn.load_state_dict(sbn.shadows[k - 1].state_dict())
    x = make_input().requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    y, y_ref = sbn(x, k), bn(x_ref)
    y.pow(3).sum().backward()
    y_ref.pow(3).sum().backward()
    assert torch.equal(y, y_ref)
    assert torch.equal(x.grad, x_ref.grad)
    for name, p in bn.named_parameters():
        assert torch.equal(sbn.shadows[k - 1].get_parameter(name).grad, p.grad)
    for name, value in bn.state_dict().items():
        assert torch.equal(sbn.shadows[k - 1].state_dict()[name], value)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_only_shadow_k_moves(k):
    sbn = make_sbn()
    before = copy.deepcopy(sbn.state_dict())
    optimizer = torch.optim.SGD(sbn.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sbn(make_input(), k).pow(2).sum().backward()
    for i, bn in enumerate(sbn.shadows, start=1):
        assert all((p.grad is not None) == (i == k) for p in bn.parameters())
    optimizer.step()
    for name, value in sbn.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(f'shadows.{k - 1}.')


def test_sum_of_k_similar_paths_scales_mean_by_k_and_variance_by_k_squared():
    # The observation SBN rests on: paths are nearly alike, so every k has a distribution of its own
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(16, 4, 8, 8, generator=generator) * torch.tensor([0.5, 1, 2, 3])[:, None, None] + 1
    paths = [path + 0.01 * torch.randn(path.shape, generator=generator) for _ in range(4)]
    sbn = ShadowBatchNorm2d(4, 4, momentum=1.0)
    outputs = [sbn(torch.stack(paths[:k]).sum(0), k) for k in (1, 2, 3, 4)]
    one = sbn.shadows[0]
    for k, (bn, y) in enumerate(zip(sbn.shadows, outputs), start=1):
        torch.testing.assert_close(bn.running_mean, k * one.running_mean, rtol=0.02, atol=1e-3)
        torch.testing.assert_close(bn.running_var, k**2 * one.running_var, rtol=0.02, atol=0)
        torch.testing.assert_close(y, outputs[0], rtol=0, atol=0.2)  # once normalised they are alike


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('k', [-1, 0, 4])
def test_k_out_of_range(k, training):
    sbn = make_sbn().train(training)
    before = copy.deepcopy(sbn.state_dict())
    with pytest.raises(ValueError, match=f'num_paths={k} is out of range, allowed are 1 to 3'):
        sbn(make_input(), k)
    assert all(torch.equal(value, before[name]) for name, value in sbn.state_dict().items())


@pytest.mark.parametrize('num_shadows', [0, -2])
def test_num_shadows_out_of_range(num_shadows):
    with pytest.raises(ValueError, match=f'num_shadows={num_shadows}'):
        ShadowBatchNorm2d(4, num_shadows)


def test_kwargs_reach_every_shadow():
    sbn = ShadowBatchNorm2d(4, 2, eps=1e-3, momentum=0.2, affine=False, dtype=torch.float64)
    assert len(sbn.shadows) == 2
    for bn in sbn.shadows:
        assert (bn.num_features, bn.eps, bn.momentum, bn.affine) == (4, 1e-3, 0.2, False)
        assert bn.running_mean.dtype == torch.float64


@pytest.mark.parametrize(
    'convert', [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=['torch', 'timm']
)
def test_sync_batch_norm_conversion(convert):
    sbn = make_sbn()
    before = copy.deepcopy(sbn).eval()
    sbn = convert(sbn).eval()
    assert [type(bn) for bn in sbn.shadows] == [nn.SyncBatchNorm] * 3
    for k in (1, 2, 3):
        torch.testing.assert_close(sbn(make_input(), k), before(make_input(), k))


def test_buffers_that_distribute_bn_reduces():
    # timm.utils.distribute_bn picks buffers by these words
    names = [n for n, _ in make_sbn().named_buffers() if 'running_mean' in n or 'running_var' in n]
    assert names == [f'shadows.{i}.running_{s}' for i in range(3) for s in ('mean', 'var')]


@pytest.mark.parametrize('training', [True, False])
def test_channels_last(training):
    sbn = make_sbn().train(training)
    y = copy.deepcopy(sbn)(make_input().contiguous(memory_format=torch.channels_last), 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, sbn(make_input(), 2))


def test_bf16_autocast():
    sbn = make_sbn()
    expected = copy.deepcopy(sbn)(make_input(), 2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = sbn(make_input().bfloat16(), 2)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)
    assert sbn.shadows[1].running_mean.dtype == torch.float32
    y.float().pow(2).sum().backward()
    assert sbn.shadows[1].weight.grad.dtype == torch.float32


def test_repr_names_shadows():
    assert '4, num_shadows=3' in repr(make_sbn())


def test_lean_relu6_has_the_values_and_gradients_of_relu6():
    x = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 6).requires_grad_()
    weight = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for act in (nn.ReLU6(inplace=True), ReLU6FromOutput(inplace=True), ReLU6FromOutput()):
        x.grad = None
        y = act(x * 1)  # in place on a tensor that is no leaf
        (y * weight).sum().backward()
        results.append((y.detach().clone(), x.grad.clone()))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])
    assert (results[0][0] == 6).sum() > 0 and (results[0][0] == 0).sum() > 0


def test_lean_relu6_works_in_place_without_a_copy_and_in_eval():
    act = ReLU6FromOutput(inplace=True)
    x = torch.tensor([-1.0, 3.0, 9.0], requires_grad=True) * 1
    assert act(x).data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert act(torch.tensor([-1.0, 3.0, 9.0])).tolist() == [0.0, 3.0, 6.0]
    assert act.eval()(torch.tensor([-1.0, 3.0, 9.0])).tolist() == [0.0, 3.0, 6.0]


class CountedCopies(TorchDispatchMode):
    """Counts the copies of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.count += args[0].ndim == 4 and args[0].shape[-1] > 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('mixpath_s1_supernet', {}),
        ('mixpath_s2_supernet', {}),
        ('mixpath_s3_supernet', {}),
        ('mixpath_a', {}),
        ('mixpath_c', {}),
        ('mixpath_supernet', dict(backbone='mobilenetv3_small_050')),
        ('mixpath', dict(backbone='tf_efficientnet_lite0')),
    ],
)
def test_no_activation_is_copied_in_a_training_step(name: str, kwargs: dict) -> None:
    model = timm.create_model(name, device='meta', **kwargs).train()
    with CountedCopies() as copies:
        model(torch.randn(2, 3, 64, 64, device='meta')).sum().backward()
    assert copies.count == 0


def test_out_of_place_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    model = timm.create_model('mobilenetv3_small_050', num_classes=10, drop_rate=0.0).train()
    other = copy.deepcopy(model)
    run_out_of_place(other)
    assert any(getattr(m, 'inplace', False) for m in other.modules() if isinstance(m, nn.ReLU))  # free in place
    assert not any(getattr(m, 'inplace', False) for m in other.modules() if isinstance(m, nn.Hardswish))
    x = torch.randn(2, 3, 64, 64)
    for m in (model, other):
        m(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize(
    'name',
    [
        'mixpath_nano',
        'mobilenetv3_small_050',
        pytest.param('mixpath_nb201', marks=pytest.mark.slow),
        'mobilenetv4_conv_small_050',
    ],
)
@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_gradient_of_what_is_pooled_has_its_layout(name: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(torch.float64, memory_format=memory_format).train()
    other = copy.deepcopy(model)
    keep_layout_of_gradient(other)
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64).to(memory_format=memory_format)
    layouts = []
    for m in (model, other):
        last = [module for module in m.modules() if isinstance(module, nn.BatchNorm2d) and module.num_features > 10][-1]
        last.register_full_backward_hook(lambda _, __, grads: layouts.append(grads[0]))
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
    assert layouts[1].is_contiguous(memory_format=memory_format)
