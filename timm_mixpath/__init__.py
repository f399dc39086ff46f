"""MixPath (arXiv 2001.05887) for timm: multi-path supernets with Shadow Batch Normalization, searched and trained.

Importing the package registers its models with timm.
"""

from .arch import Arch, BlockChoice
from .layers import ShadowBatchNorm2d
from .mixpath import MixPath, register_space
from .sampling import sample
from .space import BlockSpec, SearchSpace, get_space, list_spaces
from .supernet import MixPathSupernet
from .task import SupernetTask
from .version import __version__

__all__ = [
    'Arch',
    'BlockChoice',
    'BlockSpec',
    'MixPath',
    'MixPathSupernet',
    'SearchSpace',
    'ShadowBatchNorm2d',
    'SupernetTask',
    '__version__',
    'get_space',
    'list_spaces',
    'register_space',
    'sample',
]
