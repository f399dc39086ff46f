"""`python -m timm_mixpath.cli`, for `torchrun -m`."""

import sys

from . import main

if __name__ == '__main__':
    sys.exit(main())
