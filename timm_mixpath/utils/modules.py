"""Python modules that options name."""

import importlib
import sys
from collections.abc import Iterable

from .errors import UsageError

__all__ = ['import_modules']


def import_modules(names: Iterable[str]) -> None:
    """Import modules by name, those of the working directory, too: `--device-modules`.

    Raises:
        UsageError: There is no such module, or what it imports is not there.
    """
    for name in names:
        sys.path.insert(0, '')
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UsageError(f'--device-modules {name}: {e}') from None
        finally:
            sys.path.remove('')
