"""Plugin of the pytest that runs timm's own test_models.py: registers the models, and skips what supernets can't do.

The names are registered before timm's file lists the models, so that file stays as it is.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
from timm.models import _registry
from torch import nn

import timm_mixpath  # registers the models
import timm_mixpath.models.backbone

# The models that take a backbone, with three of other families than the default
BACKBONES = ('tf_efficientnet_lite0', 'mixnet_s', 'mobilenetv4_conv_small_035')


default_cfgs: dict[str, Any] = {}  # of this module, where timm looks for them


def register(name: str, backbone: str, create: Callable[..., nn.Module]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(pretrained, backbone=backbone, **kwargs)

    entrypoint.__name__ = variant = variant_on(name, backbone)
    cfg = timm.get_pretrained_cfg(backbone).to_dict(remove_source=True)
    cfg = {key: value for key, value in cfg.items() if key not in ('tag', 'custom_load', 'architecture')}
    default_cfgs.update(timm.models.generate_default_cfgs({f'{variant}.untrained': cfg}))
    setattr(sys.modules[__name__], variant, timm.models.register_model(entrypoint))


def variant_on(name: str, backbone: str) -> str:
    return f'mixpath_{backbone}' + name.removeprefix('mixpath')


ON_BACKBONES = [variant_on(name, backbone) for backbone in BACKBONES for name in ('mixpath', 'mixpath_supernet')]


def pytest_configure() -> None:
    """Register the models before timm's file lists them; not at import, which would show them to other tests."""
    for backbone in BACKBONES:
        register('mixpath', backbone, timm_mixpath.models.backbone.mixpath)
        register('mixpath_supernet', backbone, timm_mixpath.models.backbone.mixpath_supernet)
    # Some tests are for the families that timm's file names, by module. MixPath subclasses one of them, whose tests it
    # is to pass.
    _registry._module_to_models['efficientnet'].update(timm.list_models('mixpath*'))


NO_GRADIENT = 'expects a gradient for every parameter; a supernet trains the paths of one arch per step'
NO_SCRIPT = 'a supernet chooses its modules when it runs; what it extracts can be scripted'
SUPERNET_SKIPS = {
    'test_model_backward': NO_GRADIENT,
    'test_model_backward_fx': NO_GRADIENT,
    'test_prune_intermediate_layers_contract': NO_GRADIENT,
    'test_model_forward_torchscript': NO_SCRIPT,
    'test_model_forward_fx_torchscript': NO_SCRIPT,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.originalname
        if name in SUPERNET_SKIPS and item.callspec.params['model_name'].endswith('_supernet'):
            item.add_marker(pytest.mark.skip(SUPERNET_SKIPS[name]))
