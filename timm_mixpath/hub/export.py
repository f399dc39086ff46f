"""Model folders that `timm.create_model('local-dir:...', pretrained=True)` reads."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from ..models.supernet import Supernet
from ..search.accuracy import recalibrate_bn
from ..search.images import SearchData, open_search_split, recalibration_batches
from ..spaces.arch import Arch
from ..train.checkpoint import load_model
from ..utils.errors import UsageError
from ..utils.files import write_dir_atomic
from .records import find_label_names

__all__ = ['export', 'save_model']


def export(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    arch: Arch | str | None = None,
    *,
    recalibration_images: int = 0,
    data: SearchData | None = None,
    like: Namespace | None = None,
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

    Returns:
        The exported model, in eval mode.

    Raises:
        UsageError: The arch is not in the supernet's space, the checkpoint is no supernet, or the output exists.
        RunError: The checkpoint can't be read or the output not be written.
    """
    loaded = load_model(checkpoint, like=like)
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
            _, train_set, _ = open_search_split(loaded, data or SearchData())
            batches = recalibration_batches(train_set, loaded, recalibration_images)
        with recalibrate_bn(model, arch, batches):
            model = model.extract(arch)
    elif recalibration_images:
        raise UsageError('recalibration needs --arch: it is for a sub-network with inherited weights')
    save_model(model, output, loaded.data_config, find_label_names(loaded))
    return model


def save_model(
    model: nn.Module,
    output: str | os.PathLike,
    data_config: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Write a model folder, whole or not at all, weights as safetensors.

    Args:
        model: Model made by `timm.create_model`.
        output: Folder to make.
        data_config: Input size, mean, std and resizing it was trained with.
        label_names: Class names in the order of their index, unknown if None.
    """
    with write_dir_atomic(output) as folder:
        write_model(model, folder, data_config, label_names)
    return Path(output)


def write_model(
    model: nn.Module,
    folder: Path,
    data_config: dict[str, Any] | None,
    label_names: Sequence[str] | None,
    pretrained_cfg: dict[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors into a folder: what `save_model` and `hub.publish.write_repo` share.

    Args:
        model: See `save_model`.
        folder: Folder that exists.
        data_config: See `save_model`.
        label_names: See `save_model`.
        pretrained_cfg: Entries of the pretrained cfg in the place of the model's own.
    """
    model_config: dict[str, Any] = {'pretrained_cfg': pretrained_cfg or {}}
    if label_names:
        model_config['label_names'] = list(label_names)
    save_for_hf(model, str(folder), model_config=model_config, safe_serialization=True, data_config=data_config)
