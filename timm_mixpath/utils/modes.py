"""Training and eval mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ['eval_mode']


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
