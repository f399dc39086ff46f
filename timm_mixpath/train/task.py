"""Training tasks for supernets: timm's own, for a network of which every step trains a part."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..models.compiled import CompiledRegions
from ..models.supernet import Supernet
from .data_parallel import SampledDataParallel

__all__ = [
    'STAND_INS',
    'SupernetFeatureDistillationTask',
    'SupernetLogitDistillationTask',
    'SupernetTask',
    'create_task',
]


class _PartialTraining(TrainingTask):
    """What changes in a task of timm when every step trains a part of the network, as a mixin in front of it."""

    _regions: CompiledRegions | None = None
    # What of the teacher is compiled
    _teacher_parts: ClassVar[Mapping[str, bool]] = MappingProxyType({})

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
        """Compile the training of the supernet by regions, see `CompiledRegions`, and the teacher as timm does.

        Its graphs are compiled in front of the first step, for images as that step has them. The supernet is evaluated
        in eager mode.

        Args:
            backend: Backend of `torch.compile`.
            mode: Its mode.
            **compile_kwargs: For the teacher, see `torch.compile`.

        Returns:
            The supernet.

        Raises:
            UsageError: No such backend or mode, or one that a supernet can't have.
        """
        model = self.get_eval_model()
        self._regions = CompiledRegions(unwrap_model(model), backend, mode)
        if hasattr(self, 'teacher'):
            self.teacher.compile(backend=backend, mode=mode, **self._teacher_parts, **compile_kwargs)
        return model

    def compile_ema(self, *args: Any, **kwargs: Any) -> nn.Module | None:
        """The averaged supernet is evaluated in eager mode.

        Args:
            *args: Ignored.
            **kwargs: Ignored.
        """
        return self.get_eval_model(ema=True) if self.has_ema() else None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the task of timm; images [B, C, H, W] and targets."""
        if self._regions is not None and not self._regions.is_warm:
            self._regions.warm_up(input)
        return super().forward(input, target)


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
        if not isinstance(unwrap_model(model), Supernet):
            raise TypeError(
                f'SupernetTask trains a supernet such as mixpath_s1_supernet, not {type(model).__name__}; '
                'use timm.task.ClassificationTask for an ordinary model'
            )
        super().__init__(model, *args, **kwargs)


class SupernetLogitDistillationTask(_PartialTraining, LogitDistillationTask):
    """timm's `LogitDistillationTask` for a supernet as the student; the arch of the step learns from the teacher."""

    _teacher_parts = MappingProxyType({'compile_model': True, 'compile_features': False})


class SupernetFeatureDistillationTask(_PartialTraining, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` for a supernet as the student; the arch of the step learns from the teacher."""

    _teacher_parts = MappingProxyType({'compile_model': False, 'compile_features': True})


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
