"""Plugin of the pytest that runs timm's own test_models.py: registers the models, and skips what supernets can't do.

The names are registered before timm's file lists the models, so that file stays as it is.
"""

import pytest
import timm
from timm.models import _registry

import timm_mixpath  # noqa: F401  registers the models

# Some tests are for the families that timm's file names, by module. MixPath subclasses one of them, whose tests it is
# to pass.
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
