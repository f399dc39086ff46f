"""MixPath (arXiv 2001.05887) for timm: multi-path supernets with Shadow Batch Normalization, searched and trained.

Importing the package registers its models with timm.
"""

from importlib import import_module
from typing import Any

from .utils.timm_version import check_timm

check_timm()  # before anything that an older timm lacks

from .models import nasbench as _nasbench  # noqa: F401  registers the models of the benchmarks
from .models.backbone import backbone_space, list_backbones
from .models.cellnet import CellNet, CellSupernet
from .models.layers import ShadowBatchNorm2d
from .models.mixpath import MixPath, MixPathSupernet, register_space
from .models.refit import refit
from .models.supernet import Supernet
from .models.warm_start import warm_start
from .spaces.arch import Arch, BlockChoice
from .spaces.backbone import BackboneSpace
from .spaces.catalog import get_space, list_spaces
from .spaces.nasbench import CellArch, CellSpace, NB101Space, NB201Space
from .spaces.sampling import sample
from .spaces.space import BlockSpec, SearchSpace
from .train.task import SupernetTask
from .version import __version__

__all__ = [
    'Arch',
    'BackboneSpace',
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
    'backbone_space',
    'get_space',
    'list_backbones',
    'list_spaces',
    'refit',
    'register_space',
    'sample',
    'warm_start',
]


def __getattr__(name: str) -> Any:
    # The models do not need it, and it takes a while
    if name == 'search':
        return import_module('.search', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), 'search'})
