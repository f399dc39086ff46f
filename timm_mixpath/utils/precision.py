"""Mixed precision."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

__all__ = ['AMP_DTYPES', 'add_amp_options', 'autocast_context']

# The first is the default, as in timm's train.py
AMP_DTYPES = ('float16', 'bfloat16')


def add_amp_options(parser: Any) -> None:
    """Add the options of timm's train.py to a parser of argparse, or to a group of one."""
    add = parser.add_argument
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default=AMP_DTYPES[0], choices=AMP_DTYPES, help='its dtype (default: %(default)s)')


def autocast_context(device_type: str, amp_dtype: str | None) -> Callable[[], Any]:
    """Return what makes the context of a forward pass.

    Args:
        device_type: Type of the device as torch calls it.
        amp_dtype: One of `AMP_DTYPES`, None for no mixed precision.
    """
    if amp_dtype is None:
        return nullcontext
    return partial(torch.autocast, device_type=device_type, dtype=getattr(torch, amp_dtype))
