"""Errors whose message is all that a user needs to see."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['RunError', 'Stopped', 'UsageError', 'as_usage_error', 'concise', 'needs']


class UsageError(ValueError):
    """A value that was asked for can't be: exit status 2 on the command line."""


class RunError(RuntimeError):
    """A run that was set up well failed: exit status 1 on the command line."""


class Stopped(BaseException):
    """The process was asked to end and has written what it had: exit status 128 + signal on the command line.

    As KeyboardInterrupt it is no Exception, so that nothing takes it for a failure that can be gone on from.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def concise(error: BaseException) -> str:
    """Return the first line of an error's message, with its type where that says more.

    A line that ends with a colon says what the next one is about, as that of `load_state_dict` does.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    while len(lines) > 1 and lines[0].endswith(':'):
        lines[:2] = [' '.join(filter(None, lines[:2]))]
    if lines and isinstance(error, (AssertionError, OSError, RuntimeError, ValueError)):
        return lines[0]
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__


@contextmanager
def as_usage_error(what: str) -> Iterator[None]:
    """Turn what a library raises for a value that it does not take into one sentence.

    Args:
        what: What was tried with which value, for example "optimizer 'sdg' can not be created".

    Raises:
        UsageError: The block raised; the cause is chained.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
            ValueError) as e:  # fmt: skip
        raise UsageError(f'{what}: {concise(e)}') from e


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Say how to install what an import inside the block lacks.

    Args:
        what: What needs which package, for example 'plots need matplotlib'.
        extra: Extra of this package that brings it.

    Raises:
        ImportError: The block raised one; the cause is chained.
    """
    try:
        yield
    except ImportError as e:
        raise ImportError(f"{what} ({e}): pip install 'timm-mixpath[{extra}]'") from e
