"""Errors whose message is all that a user needs to see."""

__all__ = ['RunError', 'UsageError']


class UsageError(ValueError):
    """A value that was asked for can't be: exit status 2 on the command line."""


class RunError(RuntimeError):
    """A run that was set up well failed: exit status 1 on the command line."""
