"""The device of a process, alone or as one of several under torchrun."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from .errors import as_usage_error

__all__ = ['init_device', 'open_process']


def init_device(args: Namespace) -> torch.device:
    """Open the device and, under torchrun, the process group, as timm's train.py does.

    Args:
        args: `device` is read, the GPU if there is one and it is None; `device`, `distributed`, `rank`, `local_rank`
            and `world_size` are set.

    Raises:
        UsageError: The device does not exist.
    """
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with as_usage_error(f'device {args.device!r} can not be used'):
        device = init_distributed_device(args)
        torch.empty(0, device=device)
    return device


@contextmanager
def open_process(device: str | None) -> Iterator[Namespace]:
    """Open the device, and close the process group of torchrun at the end.

    Args:
        device: Device, the GPU if there is one and None is given.

    Yields:
        What `init_device` sets.

    Raises:
        UsageError: The device does not exist.
    """
    process = Namespace(device=device)
    init_device(process)
    try:
        yield process
    finally:
        if process.distributed:
            dist.destroy_process_group()
