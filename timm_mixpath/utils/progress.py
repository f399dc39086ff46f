"""How far a long job is: a bar on a terminal, lines elsewhere."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ['Progress', 'progress_bar']

_logger = logging.getLogger(__name__)


def progress_bar(total: int, description: str, **kwargs: Any) -> tqdm:
    """Return a bar on stderr, which shows nothing where that is no terminal.

    Args:
        total: Number of steps.
        description: What makes progress.
        **kwargs: See `tqdm`.
    """
    # not disable=None: that asks the stream which the bar was made for, not the one in place now
    disable = kwargs.pop('disable', False) or not sys.stderr.isatty()
    return tqdm(total=total, desc=description, dynamic_ncols=True, disable=disable, **kwargs)


class Progress:
    """Evaluations as a bar on a terminal, ten lines elsewhere.

    Args:
        name: What makes progress.
        total: Number of evaluations.
        line: Says what was found in an evaluation, in a log.
        status: Says the same behind the bar.
    """

    def __init__(self, name: str, total: int, line: Callable[[Any], str], status: Callable[[Any], str]) -> None:
        self._name = name
        self._line = line
        self._status = status
        self._bar = progress_bar(total, name)

    def __call__(self, evaluated: Any, total: int) -> None:
        """Tell of an evaluation, which has an `index` from 0, of `total`."""
        done = evaluated.index + 1
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(self._status(evaluated))
        elif done % max(1, total // 10) == 0 or done == total:
            _logger.info(f'{self._name}: {done}/{total}  {self._line(evaluated)}')

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
