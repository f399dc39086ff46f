"""The command line `timm-mixpath`."""

from .entry import main

__all__ = ['main']
