"""Training and eval mode of a model, models without memory, and calls of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ['ShapesOnly', 'eval_mode', 'without_memory']


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; then every module has its mode again, as some may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the context models are built on the meta device: no memory for their weights, and nothing is drawn.

    What initialises weights is not even called, which would take half of the time.
    """
    with torch.device('meta'), _NoInit():
        yield


class _NoInit(TorchFunctionMode):
    """Functions of `torch.nn.init` return the tensor as it is."""

    def __torch_function__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, '__module__', None) == nn.init.__name__:
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


class ShapesOnly(TorchFunctionMode):
    """Within the context batch norms and activations return a tensor on the meta device as it is.

    Torch would derive its shape and type by the formulas of these layers, in Python, which takes most of the time.
    """

    _KEEP_SHAPE = frozenset(
        (F.batch_norm, F.relu, F.relu6, F.hardtanh, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.sigmoid)
    )

    def __torch_function__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._KEEP_SHAPE and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
