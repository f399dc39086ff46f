"""The models whose promises are tested: the discovered ones, and a sub-network of S3 that sums in channel groups."""

import functools

import reference
import timm
import torch
import torch.nn as nn

from timm_mixpath import MixPath

_KERNELS = ('3+5.3+5.7.9', '3.5+9.7.7+9', '5.5.5.3+7', '3+5.3+5.3+5.3+5+9')  # with and without groups that are equal
_EXPANSIONS = [6, 3, *[6] * 8, 6, *[3] * 3, *[6] * 4]
MODELS = {
    'a': ('mixpath_a', {}),
    'b': ('mixpath_b', {}),
    'c': ('mixpath_c', {}),
    's3': ('mixpath_s3', dict(arch=','.join(f'k{_KERNELS[i % 4]}_e{e}' for i, e in enumerate(_EXPANSIONS)))),
}
ON_MIXNET_M = [key for key in MODELS if key != 'c']  # what has mixnet_m's skeleton has its features, groups and so on


def create(key: str, **kwargs) -> MixPath:
    """A model to change."""
    torch.manual_seed(0)
    name, fixed = MODELS[key]
    return timm.create_model(name, **fixed, **kwargs)


@functools.cache
def shared(key: str) -> MixPath:
    """A model to look at, in eval mode, with batch norms that are not the identity.

    Their statistics are those of a batch that the input belongs to, as after training. With any others the features
    of a random network grow from block to block until rounding errors are all that one sees.
    """
    model = reference.perturb(create(key))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(make_input(key, 16))
    return model.eval()


def make_input(key: str, batch_size: int = 2, in_chans: int = 3) -> torch.Tensor:
    size = 64 if key in ON_MIXNET_M else 16
    return torch.randn(16, in_chans, size, size, generator=torch.Generator().manual_seed(1))[:batch_size]
