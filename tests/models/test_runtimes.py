"""A model computes the same in every runtime."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import nn

import timm_mixpath  # noqa: F401  registers the models
from timm_mixpath.models.runtimes import check_runtime, fold_batch_norms, make_runner

NANO = 'k3_e6,k5_e6,k3+7_e3,k3_e6,k5_e6,k7_e6,k3+5_e6,k3_e3'


def with_random_norms(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight, 0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    ('name', 'kwargs', 'left'),  # norms that are left, None for some
    [
        ('tf_efficientnet_lite0', {}, 0),
        ('mobilenetv3_small_050', {}, 0),
        ('mobilenetv4_conv_small', {}, 0),
        ('mixnet_s', {}, None),  # some stand behind convolutions of several kernels, whose outputs are joined
        ('mixpath_nano', dict(arch=NANO), 0),
        ('mixpath_a', {}, 0),
        ('mixpath_nb101', {}, 0),
    ],
)
def test_folding_changes_nothing(name: str, kwargs: dict, left: int | None) -> None:
    torch.manual_seed(0)
    model = with_random_norms(timm.create_model(name, num_classes=7, **kwargs)).double()
    before = num_norms(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = fold_batch_norms(model, x)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert num_norms(folded) == left or (left is None and 0 < num_norms(folded) < before)
    assert num_norms(model) == before


class _Twice(nn.Module):
    """What the norm sees is used twice, and the norm of the second convolution normalises two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = y + self.bn(y)
        return self.bn2(self.conv2(y)) + self.bn2(self.conv2(x))


def test_a_convolution_that_others_see_is_not_folded() -> None:
    model = with_random_norms(_Twice())
    x = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norms(model, x)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x))
    assert num_norms(folded) == 2


@pytest.mark.parametrize('runtime', ['torch', 'onnxruntime'])
@pytest.mark.parametrize(
    ('name', 'kwargs'), [('mixpath_nano', dict(arch=NANO)), ('tf_efficientnet_lite0', {}), ('mixpath_nb201', {})]
)
def test_runtimes_compute_the_same(name: str, kwargs: dict, runtime: str) -> None:
    if runtime == 'onnxruntime':
        pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = with_random_norms(timm.create_model(name, num_classes=7, **kwargs)).train()
    x = torch.randn(2, 3, 32, 32)
    run = make_runner(model, x, runtime=runtime, num_threads=1)
    assert model.training  # it is left as it was
    with torch.no_grad():
        expected = model.eval()(x)
    found = run()
    found = torch.as_tensor(found[0]) if isinstance(found, list) else found
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


class _Graphs:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=self))

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        self.count += 1
        return graph.forward


def test_every_network_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up after eight networks that share the code of their forward."""
    graphs = _Graphs(monkeypatch)
    x = torch.randn(1, 3, 8, 8)
    runners = [make_runner(with_random_norms(_Twice()), x, runtime='compile') for _ in range(10)]
    for number, run in enumerate(runners, 1):
        run()
        assert graphs.count == number
    for run in runners:
        run()
    assert graphs.count == len(runners)


@pytest.mark.parametrize(
    'name',
    ['mixpath_s3', *(pytest.param(n, marks=pytest.mark.slow) for n in ('mobilenetv3_small_050', 'mixpath_nb101'))],
)
def test_networks_are_compiled_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    graphs = _Graphs(monkeypatch)
    model = with_random_norms(timm.create_model(name, num_classes=7))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    found = make_runner(model, x, runtime='compile')()
    assert graphs.count == 1
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
def test_compiled_computes_the_same() -> None:
    model = with_random_norms(timm.create_model('mixpath_nano', num_classes=7))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(make_runner(model, x, runtime='compile')(), model(x), rtol=1e-3, atol=1e-3)


def test_unknown_runtime() -> None:
    with pytest.raises(ValueError, match="unknown runtime 'tflite', known are torch, compile, onnxruntime"):
        check_runtime('tflite')
