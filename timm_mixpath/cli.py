"""The `timm-mixpath` command."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    from .errors import RunError, UsageError

    parser = argparse.ArgumentParser(prog='timm-mixpath')
    sub = parser.add_subparsers(dest='command', required=True)
    from .options import add_train_options, apply_config

    p = sub.add_parser('train')
    add_train_options(p)
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    try:
        if args.config:
            apply_config(p, args.config)
            args = parser.parse_args(argv)
        from timm.utils import setup_default_logging

        setup_default_logging()
        for m in args.device_modules or []:
            importlib.import_module(m)
        from .train import train

        train(args)
    except UsageError as e:
        print(f'timm-mixpath: error: {e}', file=sys.stderr)
        return 2
    except RunError as e:
        print(f'timm-mixpath: error: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
