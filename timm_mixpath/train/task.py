"""Training tasks for supernets: timm's own, for a network of which every step trains a part."""

import logging
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TrainingTask
from timm.utils import unwrap_model

from ..models.supernet import Supernet
from .data_parallel import SampledDataParallel

__all__ = [
    'STAND_INS',
    'SupernetFeatureDistillationTask',
    'SupernetLogitDistillationTask',
    'SupernetTask',
    'create_task',
]

_logger = logging.getLogger(__name__)


class _PartialTraining(TrainingTask):
    """What changes in a task of timm when every step trains a part of the network, as a mixin in front of it."""

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> '_PartialTraining':
        """Wrap what is trained, in `SampledDataParallel` in the place of timm's DistributedDataParallel.

        Args:
            device_ids: Ignored, as are the options of `DistributedDataParallel`: the network is on its device, and
                buffers are not broadcast.
            **ddp_kwargs: Ignored.
        """
        if hasattr(self, 'teacher'):
            self.teacher.requires_grad_(False)  # as timm does
        self.trainable_module = SampledDataParallel(self.trainable_module)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Leave the supernet in eager mode: its graph changes in every step, compiling would only recompile."""
        _logger.warning('a supernet runs another graph in every step and is not compiled; --torchcompile is ignored')
        return self.get_eval_model()


class SupernetTask(_PartialTraining, ClassificationTask):
    """timm's `ClassificationTask` for a network of which every step trains a part.

    Args:
        model: A supernet.
        *args: See `timm.task.ClassificationTask`.
        **kwargs: See `timm.task.ClassificationTask`.

    Raises:
        TypeError: The model is not a supernet.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, Supernet):
            raise TypeError(
                f'SupernetTask trains a supernet such as mixpath_s1_supernet, not {type(model).__name__}; '
                'use timm.task.ClassificationTask for an ordinary model'
            )
        super().__init__(model, *args, **kwargs)


class SupernetLogitDistillationTask(_PartialTraining, LogitDistillationTask):
    """timm's `LogitDistillationTask` for a supernet as the student; the arch of the step learns from the teacher."""


class SupernetFeatureDistillationTask(_PartialTraining, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` for a supernet as the student; the arch of the step learns from the teacher."""


def _stand_in(task_cls: type[TrainingTask], supernet_cls: type[TrainingTask]) -> Callable[..., TrainingTask]:
    def create(*args: Any, **kwargs: Any) -> TrainingTask:
        model = args[0] if args else kwargs.get('model', kwargs.get('student_model'))
        is_supernet = isinstance(model, nn.Module) and isinstance(unwrap_model(model), Supernet)
        return (supernet_cls if is_supernet else task_cls)(*args, **kwargs)

    create.__doc__ = f'Stand in for `timm.task.{task_cls.__name__}`: a `{supernet_cls.__name__}` for a supernet.'
    return create


create_task = _stand_in(ClassificationTask, SupernetTask)

# By the task of timm in whose place it stands
STAND_INS: dict[type[TrainingTask], Callable[..., TrainingTask]] = {
    ClassificationTask: create_task,
    LogitDistillationTask: _stand_in(LogitDistillationTask, SupernetLogitDistillationTask),
    FeatureDistillationTask: _stand_in(FeatureDistillationTask, SupernetFeatureDistillationTask),
}
