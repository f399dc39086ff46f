"""Import this in timm's train.py to train supernets: `python train.py --device-modules timm_mixpath.hook ...`.

train.py imports the modules of `--device-modules` before it makes its model and its task. This one registers the
models and puts a `SupernetTask` where train.py would make a `ClassificationTask` for a supernet; any other model gets
timm's own task, untouched.
"""

import sys
import warnings
from typing import Any

from timm.task import ClassificationTask
from torch import nn

import timm_mixpath  # noqa: F401  registers the models

from .supernet import MixPathSupernet
from .task import SupernetTask

__all__ = ['create_task']


def create_task(model: nn.Module, *args: Any, **kwargs: Any) -> ClassificationTask:
    """Stand in for `timm.task.ClassificationTask`: a `SupernetTask` for a supernet, timm's own for the rest."""
    task_cls = SupernetTask if isinstance(model, MixPathSupernet) else ClassificationTask
    return task_cls(model, *args, **kwargs)


def _install() -> None:
    script = sys.modules['__main__']
    if getattr(script, 'ClassificationTask', None) is ClassificationTask:
        script.ClassificationTask = create_task
    elif getattr(script, 'ClassificationTask', None) is not create_task:
        warnings.warn(
            "timm_mixpath.hook was imported outside timm's train.py and does nothing but register the models; "
            'use timm_mixpath.SupernetTask in a training script of your own',
            stacklevel=3,
        )


_install()
