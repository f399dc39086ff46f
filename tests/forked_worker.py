"""The command line of timm-mixpath with the environment of a test, in a process that was forked for it.

As a script it is what torchrun runs in each process.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from timm_mixpath.cli import main


def run(variables: dict[str, str], folder: str, words: Sequence[str]) -> NoReturn:
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ['timm-mixpath', *words]
    multiprocessing.set_start_method(None, force=True)  # that of this process is inherited otherwise
    sys.exit(main(list(words)))


if __name__ == '__main__':
    surroundings, *words = sys.argv[1:]
    run(*json.loads(surroundings), words)
