"""Training of supernets and of ordinary models, with the options of timm's train.py."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import TrainResult, train
    from .options import default_args

__all__ = ['TrainResult', 'default_args', 'train']


def __getattr__(name: str) -> Any:
    # At first use: the package itself needs the task alone, not timm's optimizers and schedules
    if name in ('TrainResult', 'train'):
        from . import loop as module
    elif name == 'default_args':
        from . import options as module
    else:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
