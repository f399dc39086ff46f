"""A model as it is run where it is deployed: torch with folded batch norms, torch.compile, onnxruntime."""

import copy
import io
import itertools
import logging
import platform
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..utils.errors import needs
from .compiled import with_own_code
from .layers import fold_bn

__all__ = ['RUNTIMES', 'check_runtime', 'describe_device', 'fold_batch_norms', 'make_runner', 'runtime_versions']


RUNTIMES = ('torch', 'compile', 'onnxruntime')

_compiled_numbers = itertools.count()


def check_runtime(runtime: str) -> str:
    """Return the name of a runtime.

    Raises:
        ValueError: There is none of that name.
        ImportError: It is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'unknown runtime {runtime!r}, known are {", ".join(RUNTIMES)}')
    if runtime == 'onnxruntime':
        _import_onnxruntime()
    return runtime


def runtime_versions(runtime: str) -> dict[str, str]:
    """Return the versions of what a runtime's speed depends on."""
    versions = {'torch': torch.__version__}
    if runtime == 'onnxruntime':
        versions['onnxruntime'] = _import_onnxruntime().__version__
    return versions


def describe_device(device: torch.device | str) -> str:
    """Return the name of a device as its maker calls it."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(('model name', 'hardware')):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def make_runner(
    model: nn.Module, x: torch.Tensor, *, runtime: str = 'torch', num_threads: int | None = None
) -> Callable[[], Any]:
    """Prepare a model for a runtime.

    Args:
        model: Model in any mode, on the device of `x`; it is left as it is.
        x: Images, [B, C, H, W].
        runtime: `'torch'`: batch norms folded, channels last, eager. `'compile'`: the same under `torch.compile`, as
            one graph. `'onnxruntime'`: exported to ONNX for the size of `x`, with all optimizations of onnxruntime.
        num_threads: Threads of onnxruntime on a CPU, torch's number if None. Those of torch are a setting of the
            process.

    Returns:
        A function that runs the model once. On a GPU it returns before the device is done, but for onnxruntime. Under
        `torch.compile` its first call compiles, and raises torch's error for a model that is not one graph.

    Raises:
        ValueError: Unknown runtime.
        ImportError: It is not installed.
    """
    check_runtime(runtime)
    with torch.inference_mode(False):  # whose tensors could not be traced
        model = fold_batch_norms(model, x)
    if runtime == 'onnxruntime':
        return _onnx_runner(model, x, torch.get_num_threads() if num_threads is None else num_threads)
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    run = _compile_forward() if runtime == 'compile' else _forward
    return torch.inference_mode()(lambda: run(model, x))


def _forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def _compile_forward() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    # Torch counts recompilations by code object, and networks of one class share theirs: behind the eighth it would go
    # on without compiling and say nothing. So every network has its own, and the whole graph makes a rest an error
    return torch.compile(with_own_code(_forward, next(_compiled_numbers)), fullgraph=True, dynamic=False)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a copy of a model in eval mode in which the batch norms behind convolutions are folded into these.

    Which convolution a norm stands behind shows when the model runs, so this works for models whose blocks do not
    offer it to `timm.utils.reparameterize_model`, such as timm's EfficientNets. A norm behind several convolutions
    whose outputs are joined, as in mixnet, stays. What is computed is the same.

    Args:
        model: Model on the device of `x`.
        x: Images to run it on, [B, C, H, W].
    """
    # What blocks offer by themselves first, such as norms behind channel groups
    model = reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
    names = {module: name for name, module in model.named_modules()}
    sources: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # by the output, which has to live: ids are used again
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}

    def on_conv(module: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        sources[id(output)] = module, output

    def on_norm(module: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in sources:
            pairs[module] = sources[id(inputs[0])][0]

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(on_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(on_norm))
    expected = model(x)
    for hook in hooks:
        hook.remove()
    sources.clear()

    folded = copy.deepcopy(model)
    for norm, conv in pairs.items():
        if calls[norm] == calls[conv] == 1 and norm.running_mean is not None:
            fold_bn(folded, names[conv], names[norm])
    result = folded(x)
    if not torch.allclose(expected, result, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
        return model  # something else sees the convolution, too
    return folded


def _import_onnxruntime() -> Any:
    with needs('the runtime needs onnxruntime', 'onnx'):
        import onnxruntime
    return onnxruntime


def _onnx_runner(model: nn.Module, x: torch.Tensor, num_threads: int) -> Callable[[], Any]:
    ort = _import_onnxruntime()
    content = io.BytesIO()
    with _quiet(), needs('the export needs onnx', 'onnx'):
        # The exporter that traces takes a second per network, the newer one six
        torch.onnx.export(model, (x,), content, dynamo=False, input_names=['x'], output_names=['y'])
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3
    provider = {'cuda': 'CUDAExecutionProvider', 'cpu': 'CPUExecutionProvider'}[x.device.type]
    if provider not in ort.get_available_providers():
        raise ImportError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu, or take runtime 'torch'")
    session = ort.InferenceSession(content.getvalue(), options, providers=[provider])
    inputs = {'x': x.cpu().numpy()}
    return lambda: session.run(None, inputs)


@contextmanager
def _quiet() -> Any:
    """Without the warnings of an export, one of them per layer."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
