"""Every name of timm that is not public, in one place.

A name with an underscore, or in a file with one, may change in any release. Each is here because nothing public does
the same; `tests/models/test_timm_private.py` fails with a sentence when one moves.
"""

from timm.data.dataset_factory import _search_split as search_split  # the folder that timm takes for a split
from timm.models._efficientnet_blocks import (  # the blocks, which no module shows
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models._efficientnet_builder import _init_weight_goog as init_weight_goog  # its `fix_group_fanout` is fixed
from timm.models._features import feature_take_indices  # what `indices` of forward_intermediates means

__all__ = [
    'DepthwiseSeparableConv',
    'InvertedResidual',
    'SqueezeExcite',
    'UniversalInvertedResidual',
    'feature_take_indices',
    'init_weight_goog',
    'search_split',
]
