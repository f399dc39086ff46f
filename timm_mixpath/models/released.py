"""Checkpoints of the code that MixPath's authors released, brought into this package's layout.

Written from a description of the layout alone. It names the parts of an S1 supernet as follows, where i is the number
of a block, t the index of an expansion, k that of a kernel, n the number of active paths less 1; on this package's side
s is a stage, b a block in it, e the expansion, size the kernel:

    stem.0, stem.1                              conv_stem, bn1
    Inverted_Block.{i}.pw.{t}.0, .1             blocks.{s}.{b}.e{e}.conv_pw, .bn1
    Inverted_Block.{i}.mix_conv.{t}.{k}.0, .1   blocks.{s}.{b}.e{e}.paths.k{size}.conv, .bn
    Inverted_Block.{i}.pw_linear.{t}            blocks.{s}.{b}.e{e}.conv_pwl
    Inverted_Block.{i}.mix_bn.{t}.{n}           blocks.{s}.{b}.e{e}.bn3.shadows.{n}
    last_conv.0, last_conv.1                    conv_head, bn2
    classifier                                  classifier

timm filters checkpoints where it loads pretrained weights (a file, URL, state dict, Hub repository or folder of the
`pretrained_cfg`) and nowhere else: `create_model(checkpoint_path=...)`, `--initial-checkpoint` and `load_checkpoint`
without `filter_fn` go straight to `load_state_dict`. So one filter has two doors: `checkpoint_filter_fn` for timm's
builder, which adapts the stem and the classifier of what the filter returns, and `remap_state_dict` for the supernet's
`_load_from_state_dict`, which timm's `FrozenBatchNormAct2d` overrides for the same end; it works inside wrappers too.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import nn

from ..spaces.space import SearchSpace
from ..utils.errors import RunError
from .supernet import Supernet

__all__ = ['checkpoint_filter_fn', 'remap_state_dict']

_logger = logging.getLogger(__name__)


# A block's name is enough to know the layout by, so that an incomplete checkpoint is told what it lacks
_MARK = 'Inverted_Block.'


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Bring a checkpoint of the authors' released code into the layout of a supernet.

    A checkpoint may hold shadow batch norms for more paths than the supernet has, the others are left out.

    Args:
        state_dict: State dict, possibly with the prefixes of DataParallel, or a checkpoint that holds one.
        model: The supernet.

    Returns:
        State dict of the supernet; `state_dict` itself if it is not in the released layout.

    Raises:
        RunError: A key is missing, unknown or of another shape, the supernet has a larger m than the checkpoint or no
            shadow batch norms, or the model is no supernet.
    """
    released = _find_released(state_dict)
    if released is None:
        return state_dict
    name = f'mixpath_{model.space.name}'
    if not isinstance(model, Supernet):
        raise RunError(
            f"a supernet of the authors' code does not fit {name}: load it into {name}_supernet and extract(arch) there"
        )
    return _remap(released, model, f'{name}_supernet')


def remap_state_dict(state_dict: dict[str, Any], prefix: str, model: nn.Module) -> None:
    """Do what `checkpoint_filter_fn` does, in place, inside a module's `_load_from_state_dict`.

    Args:
        state_dict: State dict that is being loaded.
        prefix: What the model's keys start with.
        model: The supernet.

    Raises:
        RunError: See `checkpoint_filter_fn`. Also where `strict=False` was asked for, which a module is not told.
    """
    before = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    after = checkpoint_filter_fn(before, model)
    if after is before:
        return
    for key in before:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in after.items()})


def _find_released(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    # timm takes the state dict out of a file that names it as timm does, not out of others, nor out of a URL's
    for candidate in (checkpoint, *checkpoint.values()):
        if isinstance(candidate, Mapping) and any(_MARK in str(key) for key in candidate):
            return clean_state_dict(candidate)
    return None


def _remap(released: dict[str, Any], model: nn.Module, name: str) -> dict[str, Any]:
    expected = model.state_dict()
    _check_shadows(released, expected, model.space.max_paths, name)
    modules = _module_names(model.space)
    state_dict: dict[str, Any] = {}
    unknown: list[str] = []
    for released_key, value in released.items():
        released_module, _, leaf = released_key.rpartition('.')
        module = modules.get(released_module, '')
        # The classifier is timm's to check: it drops one of another size where it loads pretrained weights
        if f'{module}.{leaf}' in expected or module == 'classifier':
            state_dict[f'{module}.{leaf}'] = value
        elif not _is_spare_shadow(module, model.space.max_paths):
            unknown.append(released_key)
    if unknown:
        raise RunError(f"the checkpoint of the authors' code has a key that {name} has not: {_first(unknown)}")

    released_modules = {ours: theirs for theirs, ours in modules.items()}
    missing: list[str] = []
    for key, tensor in expected.items():
        module, _, leaf = key.rpartition('.')
        released_key = f'{released_modules.get(module, module)}.{leaf}'
        if key not in state_dict:
            # Counters: of batches, which old checkpoints and some tools leave out, and of sampled archs, which is ours
            if leaf in ('num_batches_tracked', 'sample_step'):
                state_dict[key] = torch.zeros((), dtype=torch.int64)
            elif module != 'classifier':
                missing.append(released_key)
        elif module not in ('conv_stem', 'classifier') and leaf != 'num_batches_tracked':  # what timm or torch adapts
            _check_shape(released_key, state_dict[key], tensor, name)
    if missing:
        raise RunError(f"the checkpoint of the authors' code lacks {_first(missing)} for {name}")
    return state_dict


def _check_shadows(released: dict[str, Any], expected: dict[str, torch.Tensor], m: int, name: str) -> None:
    if not any('.bn3.shadows.' in key for key in expected):
        raise RunError(
            f"the checkpoint of the authors' code has a batch norm per number of paths, this {name} has none: "
            "create it with sum_norm='sbn'"
        )
    matches = (re.match(rf'{_MARK}\d+\.mix_bn\.\d+\.(\d+)\.', key) for key in released)
    released_m = max((int(match[1]) + 1 for match in matches if match), default=0)
    if 0 < released_m < m:  # none at all is a missing key like others
        raise RunError(
            f"the checkpoint of the authors' code has m={released_m}, this {name} m={m}: create it with m={released_m}"
        )
    if released_m > m:
        _logger.info(f'Leaving out the shadow batch norms of more than {m} paths, the checkpoint has m={released_m}')


def _is_spare_shadow(module: str, m: int) -> bool:
    return '.bn3.shadows.' in module and int(module.rpartition('.')[2]) >= m


def _check_shape(released_key: str, value: Any, tensor: torch.Tensor, name: str) -> None:
    if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
        found = f'shape {tuple(value.shape)}' if isinstance(value, torch.Tensor) else f'type {type(value).__name__}'
        raise RunError(
            f"{released_key!r} in the checkpoint of the authors' code has {found}, "
            f'{name} needs shape {tuple(tensor.shape)}'
        )


def _module_names(space: SearchSpace) -> dict[str, str]:
    names = {
        'stem.0': 'conv_stem',
        'stem.1': 'bn1',
        'last_conv.0': 'conv_head',
        'last_conv.1': 'bn2',
        'classifier': 'classifier',
    }
    positions = [(s, b, spec) for s, stage in enumerate(space.stages) for b, spec in enumerate(stage)]
    for i, (s, b, spec) in enumerate(positions):
        theirs = f'{_MARK}{i}'
        for t, expand_ratio in enumerate(spec.expand_ratios):
            ours = f'blocks.{s}.{b}.e{expand_ratio}'
            names[f'{theirs}.pw.{t}.0'] = f'{ours}.conv_pw'
            names[f'{theirs}.pw.{t}.1'] = f'{ours}.bn1'
            for k, kernel_size in enumerate(spec.kernel_sizes):
                names[f'{theirs}.mix_conv.{t}.{k}.0'] = f'{ours}.paths.k{kernel_size}.conv'
                names[f'{theirs}.mix_conv.{t}.{k}.1'] = f'{ours}.paths.k{kernel_size}.bn'
            names[f'{theirs}.pw_linear.{t}'] = f'{ours}.conv_pwl'
            for n in range(space.max_paths_limit):
                names[f'{theirs}.mix_bn.{t}.{n}'] = f'{ours}.bn3.shadows.{n}'
    return names


def _first(keys: list[str]) -> str:
    return repr(keys[0]) + (f' (and {len(keys) - 1} more)' if len(keys) > 1 else '')
