import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from commands import mixpath
from conftest import small_args
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import timm_mixpath  # noqa: F401  registers the models
from timm_mixpath.models.cpu_kernels import cpu_kernel_calls, use_cpu_kernels
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import RunError

CXX = os.environ.get('CXX', 'c++')
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason='needs a C++ compiler')


@pytest.fixture(autouse=True)
def kernels():
    use_cpu_kernels()
    yield
    use_cpu_kernels(False)


def weight_grad(grad: torch.Tensor, x: torch.Tensor, k: int, stride: tuple, padding: tuple) -> torch.Tensor:
    """The derivative of sum(grad * conv(x)), pixel of the kernel by pixel of the kernel."""
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = grad.shape[2:]
    out = x.new_zeros(x.shape[1], 1, k, k)
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
            out[:, 0, i, j] = (grad * padded[:, :, rows, columns]).sum((0, 2, 3))
    return out


@settings(max_examples=150, deadline=None)
@given(
    k=st.sampled_from([5, 7, 9, 11]),
    chs=st.sampled_from([1, 3, 4, 8, 12, 16, 20, 27, 40]),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_gradients_are_those_of_the_formula(k, chs, size, stride, padding, dtype, seed) -> None:
    padding = tuple(max(p, (k - s + 1) // 2) for p, s in zip(padding, size))  # or there is no output
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, chs, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(chs, 1, k, k, generator=generator, dtype=torch.float64)
    bias = torch.randn(chs, generator=generator, dtype=torch.float64)
    inputs = [x.to(dtype, memory_format=torch.channels_last), weight.to(dtype), bias.to(dtype)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    before = cpu_kernel_calls()
    y = F.conv2d(*inputs, stride=stride, padding=padding, groups=chs)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(grad.to(dtype))
    # what has one channel or one pixel only is channels-last and contiguous at once
    assert cpu_kernel_calls() == before + 1 or chs == 1 or size == (1, 1)
    tolerance = dict(rtol=1e-5, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-11)
    expected = weight_grad(grad, x, k, stride, padding)
    torch.testing.assert_close(inputs[1].grad.double(), expected, **tolerance)
    torch.testing.assert_close(inputs[2].grad.double(), grad.sum((0, 2, 3)), **tolerance)
    weight_64 = weight.clone().requires_grad_()
    x_64 = x.clone().requires_grad_()
    F.conv2d(x_64, weight_64, stride=stride, padding=padding, groups=chs).backward(grad)
    torch.testing.assert_close(inputs[0].grad.double(), x_64.grad, **tolerance)


@pytest.mark.parametrize(
    'kernel, groups, dilation, dtype, channels_last, requires_grad, taken',
    [
        (5, 16, 1, torch.float32, True, True, 1),
        (5, 16, 1, torch.float32, True, False, 0),  # a frozen weight
        (3, 16, 1, torch.float32, True, True, 0),
        (5, 16, 2, torch.float32, True, True, 0),
        (5, 1, 1, torch.float32, True, True, 0),
        (5, 16, 1, torch.float32, False, True, 0),
        (5, 16, 1, torch.bfloat16, True, True, 0),
    ],
)
def test_takes_what_it_is_faster_at(kernel, groups, dilation, dtype, channels_last, requires_grad, taken) -> None:
    conv = torch.nn.Conv2d(16, 16, kernel, padding='same', dilation=dilation, groups=groups).to(dtype)
    conv.weight.requires_grad_(requires_grad)
    x = torch.randn(2, 16, 12, 12, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = cpu_kernel_calls()
    conv(x.requires_grad_()).sum().backward()
    assert cpu_kernel_calls() - before == taken
    if taken:
        assert use_cpu_kernels(False)
        conv(x).sum().backward()
        assert cpu_kernel_calls() - before == taken
        assert not use_cpu_kernels()


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, stride=2, padding=2, groups=8)

    assert gradcheck(conv, (x, weight))
    assert gradgradcheck(conv, (x, weight))


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 72, 20, 20).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(72, 72, 7, padding=3, groups=72, bias=False)
    threads, grads = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            conv.weight.grad = None
            conv(x).square().sum().backward()
            grads.append(conv.weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize('name, kwargs', [
    ('mixpath_nano_supernet', {}),
    ('mixpath_s3_supernet', {}),
    ('mixpath_supernet', dict(backbone='tf_mobilenetv3_small_minimal_100')),
])  # fmt: skip
def test_a_supernet_has_the_same_gradients(name: str, kwargs: dict) -> None:
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=10, **kwargs).double().to(memory_format=torch.channels_last)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    grads, calls = [], []
    for on in (False, True):
        use_cpu_kernels(on)
        supernet = copy.deepcopy(start)
        before = cpu_kernel_calls()
        for _ in range(3):  # three archs, the same for both
            supernet(x).square().sum().backward()
        calls.append(cpu_kernel_calls() - before)
        grads.append({n: p.grad for n, p in supernet.named_parameters() if p.grad is not None})
    assert calls[0] == 0 and calls[1] > 3
    assert grads[0].keys() == grads[1].keys()
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, rtol=1e-9, atol=1e-9 * grad.abs().max().item())


def test_compiled_models_find_it() -> None:
    conv = torch.nn.Conv2d(16, 16, 5, padding=2, groups=16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    conv(x).square().sum().backward()
    expected, conv.weight.grad = conv.weight.grad, None
    before = cpu_kernel_calls()
    torch.compile(conv, backend='aot_eager')(x).square().sum().backward()
    assert cpu_kernel_calls() == before + 1
    torch.testing.assert_close(conv.weight.grad, expected)


def test_training_uses_it_where_it_is_asked_for(digits: Path, tmp_path: Path) -> None:
    use_cpu_kernels(False)
    before = cpu_kernel_calls()
    train(small_args(digits, tmp_path / 'a', epochs=1))
    assert cpu_kernel_calls() == before
    train(small_args(digits, tmp_path / 'b', epochs=1, cpu_kernels=True))
    assert cpu_kernel_calls() > before
    assert not use_cpu_kernels(False)


@pytest.mark.slow
def test_importing_the_module_is_asking_for_it() -> None:
    code = (
        'import torch, timm_mixpath.cpu_kernels as k\n'
        'conv = torch.nn.Conv2d(16, 16, 5, padding=2, groups=16)\n'
        'conv(torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)).sum().backward()\n'
        'print(k.cpu_kernel_calls())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '1', done.stderr


@pytest.mark.parametrize('variable, sentence', [('CXX', 'there is no no-such-compiler'), ('PATH', 'there is no c++')])
def test_without_a_compiler(variable: str, sentence: str, digits: Path, tmp_path: Path) -> None:
    value = 'no-such-compiler' if variable == 'CXX' else str(tmp_path)
    env = {'TORCH_EXTENSIONS_DIR': str(tmp_path / 'extensions'), variable: value}
    command = (
        f'train --cpu-kernels --model mixpath_nano --data-dir {digits} --epochs 1 --output {tmp_path}/out --device cpu'
    )
    done = mixpath(*command.split(), **env)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('timm-mixpath: error: the CPU kernels can not be compiled: ') and sentence in last
    assert 'everything works without them' in last and 'Traceback' not in done.stderr
    assert not list((tmp_path / 'extensions').iterdir())  # nothing half-made


def test_a_damaged_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_mixpath.models import cpu_kernels

    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    library = tmp_path / f'timm_mixpath_{cpu_kernels._fingerprint()}.so'
    library.write_bytes(b'half a file')
    monkeypatch.setattr(cpu_kernels, '_loaded', False)
    with pytest.raises(RunError, match=f'{library.name}.* can not be loaded, delete the file'):
        use_cpu_kernels()
