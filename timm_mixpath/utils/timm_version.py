"""Is the timm that Python found the one that this package needs?

`python train.py` in a clone of pytorch-image-models puts the clone's own `timm` folder in front of the installed one.
"""

import re
from pathlib import Path

import timm

__all__ = ['NEEDED', 'check_timm']

NEEDED = (1, 0, 31)


def check_timm() -> None:
    """Check the version of timm.

    Raises:
        ImportError: It is older than the oldest that works; the message says where it was found and what to do.
    """
    found = tuple(int(part) for part in re.findall('[0-9]+', timm.__version__)[:3])
    if found < NEEDED:
        needed = '.'.join(map(str, NEEDED))
        raise ImportError(
            f'timm_mixpath needs timm {needed} or later, but Python found {timm.__version__} in '
            f'{str(Path(timm.__file__).parent)!r}; if that is a clone of pytorch-image-models, check out its tag '
            f"v{needed} or copy its train.py to another folder and run it there, otherwise pip install 'timm>={needed}'"
        )
