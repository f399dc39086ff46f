"""Model folders that `timm.create_model('local-dir:...', pretrained=True)` reads."""

import copy
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn

from ..models.supernet import Supernet
from ..search.accuracy import recalibrate_bn
from ..search.images import SearchData, open_search_split, recalibration_batches
from ..spaces.arch import Arch
from ..train.checkpoint import load_model, set_img_size
from ..utils.errors import UsageError
from ..utils.files import needs_room, write_dir_atomic
from .records import find_label_names

__all__ = ['DTYPES', 'export', 'save_model']


# What weights can be stored as; loaded, they are of the model's own dtype
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def export(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    arch: Arch | str | None = None,
    *,
    recalibration_images: int = 0,
    data: SearchData | None = None,
    like: Namespace | None = None,
    dtype: str | None = None,
    img_size: int | None = None,
) -> nn.Module:
    """Write the model of a checkpoint as a model folder.

    Args:
        checkpoint: Training checkpoint or model folder.
        output: Folder to make: `config.json` and `model.safetensors`.
        arch: Sub-network of a supernet to export, with the weights it inherits; None exports the model as it is.
        recalibration_images: Training images to recalibrate the sub-network's batch norms with, as a search with the
            same number does; 0 for none.
        data: Where they come from, the images that the supernet was trained with if None.
        like: What `checkpoint` is of, if it holds weights alone, see `load_model`.
        dtype: What the weights are stored as, a key of `DTYPES`; the model's own, float32, if None.
        img_size: Height and width of the images that the model is for, in pixels; those of its training if None.

    Returns:
        The exported model, in eval mode and in its own dtype.

    Raises:
        UsageError: The arch is not in the supernet's space, the checkpoint is no supernet, the output exists, a
            weight is out of the range of `dtype`, or the image size is not positive.
        RunError: The checkpoint can't be read or the output not be written.
    """
    loaded = load_model(checkpoint, like=like)
    set_img_size(loaded, img_size)
    model = loaded.model
    if arch is not None:
        if not isinstance(model, Supernet):
            raise UsageError(
                f'--arch needs the checkpoint of a supernet, {str(checkpoint)!r} holds {type(model).__name__}'
            )
        try:
            arch = model.space.arch(arch)
        except ValueError as e:
            raise UsageError(str(e)) from None
        batches = None
        if recalibration_images:
            _, train_set, _ = open_search_split(loaded, data or SearchData(), warn=False)
            batches = recalibration_batches(train_set, loaded, recalibration_images)
        with recalibrate_bn(model, arch, batches):
            model = model.extract(arch)
    elif recalibration_images:
        raise UsageError('recalibration needs --arch: it is for a sub-network with inherited weights')
    save_model(model, output, loaded.data_config, find_label_names(loaded), dtype)
    return model


def save_model(
    model: nn.Module,
    output: str | os.PathLike,
    data_config: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a model folder, whole or not at all, weights as safetensors.

    Args:
        model: Model made by `timm.create_model`.
        output: Folder to make.
        data_config: Input size, mean, std and resizing it was trained with.
        label_names: Class names in the order of their index, unknown if None.
        dtype: See `export`.

    Raises:
        UsageError: The output exists, there is no such dtype, or a weight is out of its range.
        RunError: The output can't be written.
    """
    with write_dir_atomic(output) as folder:
        write_model(model, folder, data_config, label_names, dtype=dtype)
    return Path(output)


def write_model(
    model: nn.Module,
    folder: Path,
    data_config: dict[str, Any] | None,
    label_names: Sequence[str] | None,
    pretrained_cfg: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write config.json and model.safetensors into a folder: what `save_model` and `hub.publish.write_repo` share.

    Args:
        model: See `save_model`.
        folder: Folder that exists.
        data_config: See `save_model`.
        label_names: See `save_model`.
        pretrained_cfg: Entries of the pretrained cfg in the place of the model's own.
        dtype: See `export`.

    Raises:
        UsageError: There is no such dtype, or a weight is out of its range.
        RunError: The folder can't be written.
    """
    model_config: dict[str, Any] = {'pretrained_cfg': dict(pretrained_cfg or {})}
    if label_names:
        descriptions = _own_descriptions(model, label_names) or _synset_descriptions(label_names)
        # Not those of the weights that it once started from
        model_config['pretrained_cfg'].update(label_names=None, label_descriptions=None)
        model_config['label_names'] = list(label_names)
        if descriptions:
            model_config['label_descriptions'] = descriptions
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f'dtype {dtype!r} is none that weights are stored as: {", ".join(DTYPES)}')
    stored = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # safetensors takes no other
    if dtype is not None:
        own = model.state_dict()
        stored.to(DTYPES[dtype])
        for name, value in stored.state_dict().items():
            if value.is_floating_point() and (value.isinf() & own[name].isfinite()).any():
                raise UsageError(
                    f'{name} of the {type(model).__name__} does not fit into {dtype}; store it as bfloat16 or float32'
                )
    with needs_room('the model folder'):
        save_for_hf(stored, str(folder), model_config=model_config, safe_serialization=True, data_config=data_config)


def _own_descriptions(model: nn.Module, label_names: Sequence[str]) -> dict[str, str]:
    """What a model says of its classes, nothing if it has others."""
    names, descriptions = (model.pretrained_cfg.get(key) for key in ('label_names', 'label_descriptions'))
    if not isinstance(names, list | tuple) or not isinstance(descriptions, dict):
        return {}
    return descriptions if list(map(str, names)) == list(label_names) else {}


def _synset_descriptions(label_names: Sequence[str]) -> dict[str, str]:
    """What classes that are named as those of ImageNet are in words, nothing if any is not."""
    if not all(re.fullmatch(r'n\d{8}', name) for name in label_names):
        return {}
    info = ImageNetInfo('imagenet-22k')
    try:
        return {name: info.label_name_to_description(name) for name in label_names}
    except KeyError:
        return {}
