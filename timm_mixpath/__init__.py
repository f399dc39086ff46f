"""MixPath (arXiv 2001.05887) for timm: multi-path supernets with Shadow Batch Normalization, searched and trained.

Importing the package registers its models with timm.
"""

from .arch import Arch, BlockChoice
from .cellnet import CellNet, CellSupernet
from .layers import ShadowBatchNorm2d
from .mixpath import MixPath, register_space
from .nasbench import CellArch, CellSpace, NB101Space, NB201Space
from .sampling import sample
from .space import BlockSpec, SearchSpace, get_space, list_spaces
from .supernet import MixPathSupernet, Supernet
from .task import SupernetTask
from .version import __version__

__all__ = [
    'Arch',
    'BlockChoice',
    'BlockSpec',
    'CellArch',
    'CellNet',
    'CellSpace',
    'CellSupernet',
    'MixPath',
    'MixPathSupernet',
    'NB101Space',
    'NB201Space',
    'SearchSpace',
    'ShadowBatchNorm2d',
    'Supernet',
    'SupernetTask',
    '__version__',
    'get_space',
    'list_spaces',
    'register_space',
    'sample',
]
