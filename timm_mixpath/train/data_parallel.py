"""Data parallel training of a network of which every step trains a part."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..models.supernet import Supernet

__all__ = ['SampledDataParallel']


class SampledDataParallel(nn.Module):
    """Averages the gradients of the sampled arch over all processes, in one go after the backward pass.

    All processes sample the same arch, so they have gradients of the same parameters and no others. DDP does not know
    that: with `find_unused_parameters` it goes through the graph in every step, waits for the device, and reduces zeros
    for all parameters that were left out. Here those that have a gradient are reduced together, and the others stay
    None. Gradients are those of DDP.

    Batch norm statistics remain those of each process: `timm.utils.distribute_bn` averages them, which train.py calls
    after every epoch (`--dist-bn`). What is wrapped is at `module`, and may be used by other code as if it were wrapped
    by DDP: `no_sync` accumulates, and `timm.utils.unwrap_model` unwraps.

    Args:
        module: Network on its device, the same in all processes. Parameters and buffers are made equal to those of
            rank 0.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._is_synced = True
        self._start_as_the_first()

    @torch.no_grad()
    def _start_as_the_first(self) -> None:
        tensors: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensors[tensor.dtype].append(tensor)
        for parts in tensors.values():
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.broadcast(flat, 0)
            for part, first in zip(parts, flat.split([part.numel() for part in parts])):
                part.copy_(first.view_as(part))
        for supernet in self.module.modules():
            if isinstance(supernet, Supernet):
                supernet.count_steps()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the context, gradients are accumulated in each process."""
        before, self._is_synced = self._is_synced, False
        try:
            yield
        finally:
            self._is_synced = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; the backward pass of what it returns ends with the average of the gradients."""
        outputs = self.module(*args, **kwargs)
        if self._is_synced and torch.is_grad_enabled():
            is_queued = False

            def queue(_: torch.Tensor) -> None:
                nonlocal is_queued
                if not is_queued:
                    is_queued = True
                    # As torch's own FSDP: when all gradients are there
                    torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

            for output in _tensors(outputs):
                if output.requires_grad:
                    output.register_hook(queue)
        return outputs

    @torch.no_grad()
    def _reduce(self) -> None:
        grads: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                if not torch.ops.aten.is_non_overlapping_and_dense(parameter.grad):
                    parameter.grad = parameter.grad.contiguous()
                # In the order of the memory, whatever its format is
                grads[parameter.grad.dtype].append(parameter.grad.as_strided((parameter.numel(),), (1,)))
        for parts in grads.values():
            flat = torch.cat(parts)
            flat.div_(dist.get_world_size())
            dist.all_reduce(flat)
            torch._foreach_copy_(parts, flat.split([part.numel() for part in parts]))


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)
