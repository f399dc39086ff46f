"""The memory of this process."""

import ctypes
import sys

__all__ = ['keep_freed_memory']

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free for the next ones, instead of returning it to the system at once.

    glibc takes large blocks from the system and returns them, and the system clears every page again when it is
    written to first; on a CPU that is a tenth to a sixth of a training step. What was the largest need of memory
    remains taken until the process ends.

    Returns:
        Whether the C library is one that can be told so: glibc, on Linux.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # musl has none
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT) and mallopt(_M_TRIM_THRESHOLD, -1))
