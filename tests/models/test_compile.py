"""torch.compile, torch.export and ONNX: what is compiled or exported equals the model.

The small network stands for all in the default run, since tracing takes as long as the network is deep.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn as nn
from family import MODELS, create, make_input, shared

NANO = 'k3+5_e6,k7_e3,k3+5+7_e3,k5_e6,k3+7_e6,k3_e3,k5+7_e6,k7_e6'
every_model = pytest.mark.parametrize('key', ['nano', *[pytest.param(key, marks=pytest.mark.slow) for key in MODELS]])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_model(key: str, **kwargs: Any) -> nn.Module:
    if key in MODELS:
        return create(key, **kwargs)
    torch.manual_seed(0)
    return timm.create_model('mixpath_nano', arch=NANO, **kwargs)


def make_eval_model(key: str) -> nn.Module:
    return shared(key) if key in MODELS else reference.perturb(make_model(key)).eval()


def make_supernet() -> nn.Module:
    torch.manual_seed(0)
    return reference.perturb(timm.create_model('mixpath_nano_supernet', m=3, arch=NANO)).eval()


def train_steps(key: str, backend: str | None, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a few training steps; from the second on, compiling again is an error."""
    model = make_model(key, drop_rate=0.1, drop_path_rate=0.1).train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    forward = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    losses = []
    for step in range(steps):
        with torch.compiler.set_stance('default' if step == 0 else 'fail_on_recompile'):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(make_input(key, 4)), torch.arange(4))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model.state_dict()


def check_training(key: str, backend: str, tolerance: float) -> None:
    losses, weights = train_steps(key, backend)
    expected_losses, expected_weights = train_steps(key, None)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)


@every_model
def test_compiled_training_equals_eager_without_recompiling(key: str) -> None:
    check_training(key, 'eager', tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['nano', 'c', 's3'])
def test_compiled_backward_equals_eager(key: str) -> None:
    check_training(key, 'aot_eager', tolerance=1e-4)


@every_model
def test_compiled_eval_equals_eager_without_recompiling(key: str) -> None:
    model = make_eval_model(key)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(make_input(key)), model(make_input(key)), rtol=1e-5, atol=1e-5)
        with torch.compiler.set_stance('fail_on_recompile'):
            compiled(make_input(key) + 1)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['nano', 's3'])
def test_inductor(key: str) -> None:
    model = make_eval_model(key)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(make_input(key)), model(make_input(key)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_supernet_follows_its_active_arch() -> None:
    supernet = make_supernet()
    compiled = torch.compile(supernet, backend='eager', fullgraph=True)
    with torch.no_grad():
        for arch in (NANO, str(supernet.space.default_arch)):
            supernet.active_arch = arch
            expected = supernet.extract()(make_input('nano'))
            torch.testing.assert_close(compiled(make_input('nano')), expected, rtol=1e-5, atol=1e-5)


@every_model
def test_export(key: str) -> None:
    model, x = make_eval_model(key), make_input(key)
    batch = torch.export.Dim('batch')
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for inputs in (x, make_input(key, 5)):
            torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_exported_supernet_is_its_active_sub_network() -> None:
    supernet, x = make_supernet(), make_input('nano')
    program = torch.export.export(supernet, (x,))
    with torch.no_grad():
        expected = supernet(x)
        supernet.active_arch = supernet.space.default_arch
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
        assert (supernet(x) - expected).abs().max() > 1e-2


def check_onnx(model: nn.Module, key: str, path: Path, use_dynamo: bool) -> None:
    from timm.utils.onnx import onnx_export, onnx_forward

    onnx_export(model, str(path), make_input(key), use_dynamo=use_dynamo, check=True)
    for inputs in (make_input(key), make_input(key, 5)):
        with torch.no_grad():
            expected = model(inputs)
        torch.testing.assert_close(torch.from_numpy(onnx_forward(str(path), inputs)), expected, rtol=1e-4, atol=1e-4)


@every_model
def test_onnx(key: str, tmp_path: Path) -> None:
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    check_onnx(make_eval_model(key), key, tmp_path / 'model.onnx', use_dynamo=False)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['nano', 'a', 's3'])
def test_onnx_through_torch_export(key: str, tmp_path: Path) -> None:
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    check_onnx(make_eval_model(key), key, tmp_path / 'model.onnx', use_dynamo=True)


def test_onnx_of_a_supernet_is_its_active_sub_network(tmp_path: Path) -> None:
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    supernet = make_supernet()
    check_onnx(supernet, 'nano', tmp_path / 'model.onnx', use_dynamo=False)
    saved = sum(np.prod(tensor.dims) for tensor in onnx.load(tmp_path / 'model.onnx').graph.initializer)
    assert saved <= sum(value.numel() for value in supernet.extract().state_dict().values())
