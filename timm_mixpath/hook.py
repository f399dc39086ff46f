"""Import this in timm's train.py to train supernets: `python train.py --device-modules timm_mixpath.hook ...`.

train.py imports the modules of `--device-modules` before it makes its model and its task. This one registers the
models and puts a `SupernetTask` where train.py would make a `ClassificationTask` for a supernet, and likewise for
distillation; any other model gets timm's own task, untouched.
"""

import sys
import warnings

from timm.task import ClassificationTask

import timm_mixpath  # noqa: F401  registers the models

from .train.task import STAND_INS, create_task

__all__ = ['create_task']


def _install() -> None:
    script = sys.modules['__main__']
    if getattr(script, 'ClassificationTask', None) is create_task:
        return
    if getattr(script, 'ClassificationTask', None) is not ClassificationTask:
        warnings.warn(
            "timm_mixpath.hook was imported outside timm's train.py and does nothing but register the models; "
            'use timm_mixpath.SupernetTask in a training script of your own',
            stacklevel=3,
        )
        return
    for task_cls, create in STAND_INS.items():
        if getattr(script, task_cls.__name__, None) is task_cls:
            setattr(script, task_cls.__name__, create)


_install()
