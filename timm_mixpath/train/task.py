"""Training task for supernets."""

import logging
from typing import Any

import torch.nn as nn
from timm.task import ClassificationTask

from ..models.supernet import Supernet

__all__ = ['SupernetTask', 'create_task']

_logger = logging.getLogger(__name__)


class SupernetTask(ClassificationTask):
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

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'SupernetTask':
        """Wrap the supernet in DistributedDataParallel, ready for parameters that a step leaves out.

        Args:
            device_ids: Device of this rank, ignored on the CPU where DDP takes none.
            **ddp_kwargs: Passed to `DistributedDataParallel`.
        """
        if self.device.type == 'cpu':
            device_ids = None
        # DDP leaves the gradient of parameters that no rank used at None, as a single process does.
        super().prepare_distributed(device_ids=device_ids, **{**ddp_kwargs, 'find_unused_parameters': True})
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Leave the supernet in eager mode: its graph changes in every step, compiling would only recompile."""
        _logger.warning('a supernet runs another graph in every step and is not compiled; --torchcompile is ignored')
        return self.get_trainable_module()


def create_task(model: nn.Module, *args: Any, **kwargs: Any) -> ClassificationTask:
    """Stand in for `timm.task.ClassificationTask`: a `SupernetTask` for a supernet, timm's own for the rest."""
    task_cls = SupernetTask if isinstance(model, Supernet) else ClassificationTask
    return task_cls(model, *args, **kwargs)
