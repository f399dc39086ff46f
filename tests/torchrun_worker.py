"""What torchrun runs in each process: the command line of timm-mixpath, with the environment of a test."""

import json
import multiprocessing
import os
import sys

from timm_mixpath.cli import main

if __name__ == '__main__':
    surroundings, *words = sys.argv[1:]
    variables, folder = json.loads(surroundings)
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ['timm-mixpath', *words]
    multiprocessing.set_start_method(None, force=True)  # that of this process is inherited otherwise
    sys.exit(main(words))
