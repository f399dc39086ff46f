"""Where pretrained weights come from (the Hub, the package itself, a file), and whether they fit the model.

timm loads what it finds; here tensors have to have the names and shapes of the model before any is used.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_norm_layer
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models.efficientnet import resolve_bn_args
from torch import nn

from ..spaces.space import Space
from ..utils.errors import RunError, UsageError, concise
from ..utils.hub_client import CONFIG_NAME, WEIGHTS_NAME, fetch_model
from ..utils.recipes import model_recipes
from .supernet import Supernet

__all__ = [
    'HUB_ORG',
    'OFFICIAL_ORG',
    'PREPROCESSING',
    'SOURCE_KEYS',
    'add_weights',
    'build_model',
    'check_packaged',
    'check_state_dict',
    'locate_weights',
    'packaged_weights',
    'preprocessing_beside',
    'readable',
    'space_cfg',
]


OFFICIAL_ORG = 'timm-mixpath'

# The organisation on the Hub under which the published weights live, read once, at import
HUB_ORG = os.environ.get('TIMM_MIXPATH_HUB_ORG') or OFFICIAL_ORG

# Weights that exist on the Hub as HUB_ORG/<model>.<tag>: {'<model>.<tag>': what differs from the model's own cfg}.
# The repo's config.json says the rest when it is loaded. None are published yet.
PUBLISHED: dict[str, dict[str, Any]] = {}

# Small weights that ship inside the package, <model>.<tag>/ as `push --dry-run` writes it. The SHA-256 of their
# model.safetensors stands here, so that a file that an installation or a mirror damaged is noticed.
PACKAGED: dict[str, str] = {
    'mixpath_a.imagenette': 'a7c4e86c35d1e3038c5f988d7b3c86bb338bcabeaf3cdb93cf6a41b72e53acce',
    'mixpath_b.imagenette': '9396594a4fbb27f2605cb0b2d0b802ad78cc531c4abe294629fb1aa0c4061241',
    'mixpath_lite0.in1k_ft_imagenette': '8d963fba38eda000c5790dcd08d09ed8a9beba86113eee4998acd2d4e108795b',
    'mixpath_nano.cifar10': '5fa6f27a81f4ce122e8c9772415ab8e99d0be8cd6cdf34d1873a25790cafa0c5',
}
_WEIGHTS_DIR = Path(__file__).parents[1] / 'weights'

# What in a pretrained cfg says where weights are
SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')

# How the images of a model are prepared, beside their size
PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def add_weights(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the tags of the weights that exist to pretrained cfgs.

    Args:
        cfgs: {'<model>.untrained': cfg} of a module's models; weights of other models are left out.

    Returns:
        Cfgs for `timm.models.generate_default_cfgs`. A tag with weights comes before the untrained one.
    """
    cfgs = dict(cfgs)
    bases = {name.partition('.')[0]: cfg for name, cfg in cfgs.items()}
    for name, overrides in PUBLISHED.items():
        base = bases.get(name.partition('.')[0])
        if base is not None:
            cfgs[name] = {**base, 'hf_hub_id': f'{HUB_ORG}/{name}', **overrides}
    for name, folder in packaged_weights().items():
        base = bases.get(name.partition('.')[0])
        if base is not None:
            try:
                cfg = _with_tuples(json.loads((folder / CONFIG_NAME).read_text())['pretrained_cfg'])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                cfg = {}  # an import must not fail by it; whoever loads the weights is told
            cfg.pop('tag', None)
            if cfg.get('input_size') and not cfg.get('pool_size'):  # timm leaves it out for another size
                sizes = zip(cfg['input_size'][1:], base['input_size'][1:], base['pool_size'])
                cfg['pool_size'] = tuple(math.ceil(size * pool / full) for size, full, pool in sizes)
            # Also where they are on the Hub: an installation needs no connection for what it holds
            cfgs[name] = {**base, **cfg, 'file': str(folder / WEIGHTS_NAME)}
    return cfgs


def _with_tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    """A pretrained cfg from JSON as timm's own are."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}


def config_beside(path: str | os.PathLike) -> dict[str, Any]:
    """Return what the config.json of a model folder says of weights, nothing if there is none.

    Args:
        path: The folder, or the file of the weights; what stands beside another one than model.safetensors need not
            belong to it.

    Raises:
        RunError: The config.json is damaged.
    """
    path = Path(path)
    config = path / CONFIG_NAME if path.is_dir() else path.with_name(CONFIG_NAME)
    if not (path.is_dir() or path.name == WEIGHTS_NAME) or not config.exists():
        return {}
    return _read_config(config, str(path))


def preprocessing_beside(path: str | os.PathLike) -> dict[str, Any]:
    """Return how the images of weights are prepared, see `config_beside`."""
    cfg = _with_tuples(config_beside(path).get('pretrained_cfg', {}))
    return {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None}


def packaged_weights() -> dict[str, Path]:
    """Return the folders of the weights that ship inside the package, by `<model>.<tag>`."""
    return {name: _WEIGHTS_DIR / name for name in sorted(PACKAGED)}


def check_packaged(name: str) -> Path:
    """Return the folder of weights that ship inside the package.

    Raises:
        RunError: They are missing or not what was packaged.
    """
    path = _WEIGHTS_DIR / name / WEIGHTS_NAME
    problem = f'{str(path)!r} is missing'
    if path.is_file():
        if hashlib.sha256(path.read_bytes()).hexdigest() == PACKAGED[name]:
            return path.parent
        problem = f'{str(path)!r} has another SHA-256'
    raise RunError(f'the weights of {name} inside the installed timm-mixpath are damaged ({problem}); install it again')


def space_cfg(space: Space, reduction: int, **kwargs: Any) -> dict[str, Any]:
    """Return the pretrained cfg of the models of a space, without weights.

    Args:
        space: The space.
        reduction: Stride of the last features.
        **kwargs: What else stands in it, such as `first_conv` and `classifier`.
    """
    return {
        'url': '',
        'num_classes': space.num_classes,
        'input_size': space.input_size,
        'pool_size': tuple(math.ceil(size / reduction) for size in space.input_size[1:]),
        # Images of CIFAR's size have no margin to leave out
        'crop_pct': 1.0 if min(space.input_size[1:]) <= 64 else DEFAULT_CROP_PCT,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'license': 'apache-2.0',
        **kwargs,
    }


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    num_features: int,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    bind_bn_args: bool = True,
    defaults: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model of this package through `timm.models.build_model_with_cfg`.

    Args:
        model_cls: Class of the model, or a function that makes it.
        variant: Registered name.
        pretrained: Load the weights of the pretrained cfg, located and checked by this module.
        num_features: Number of feature maps that `features_only` gives.
        filter_fn: Brings a state dict into the layout of the model and checks it.
        bind_bn_args: Bind timm's `bn_*` arguments to the `norm_layer`, for a class that knows only that.
        defaults: Arguments of the model class that a name stands for, where neither `kwargs` nor the config.json of
            the weights gives others.
        **kwargs: Arguments of the model class and of `build_model_with_cfg`.
    """
    bn_args = resolve_bn_args(kwargs) if bind_bn_args else {}
    if bn_args:
        kwargs['norm_layer'] = partial(get_norm_layer(kwargs.get('norm_layer') or nn.BatchNorm2d), **bn_args)
    model_args = locate_weights(variant, kwargs) if pretrained else {}
    for key, value in (defaults or {}).items():
        if kwargs.get(key) is None:
            kwargs[key] = value
        model_args.setdefault(key, kwargs[key])
    with readable(variant, kwargs['pretrained_cfg'] if pretrained else None):
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            feature_cfg=dict(out_indices=tuple(range(num_features)), feature_cls='getter'),
            pretrained_filter_fn=filter_fn,
            **kwargs,
        )
    if isinstance(model, Supernet):
        # For config.json: the weights have to fit when a later version has other defaults, too
        model_args = dict(m=model.space.max_paths, sum_norm=model.sum_norm) | model_args
    # timm adds the arguments that it was given itself
    model._model_args = {**getattr(model, '_model_args', {}), **model_args}
    return model


def locate_weights(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Find the weights that `pretrained=True` asks for, bring them here and check them, before timm loads them.

    A repo and a model folder say in their config.json with which arguments the model is built that their weights fit.

    Args:
        variant: Registered name of the model.
        kwargs: Arguments of `timm.models.build_model_with_cfg`. The pretrained cfg is replaced by one that names the
            files that were checked; arguments of config.json that are not given are added.

    Returns:
        The arguments that config.json gave.

    Raises:
        UsageError: The weights are those of another model, or their file does not exist.
        RunError: There are none, as timm's RuntimeError; or they can't be had, or are not what the Hub says they are.
    """
    cache_dir = kwargs.get('cache_dir')
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if any(overlay.get(key) for key in SOURCE_KEYS) and not overlay.get('source'):
        # timm lets a source of the cfg win over those of the overlay
        named = {key: overlay.get(key) for key in SOURCE_KEYS}
        cfg = resolve_pretrained_cfg(variant, cfg.to_dict(remove_source=True), named)
    if cfg.state_dict or (cfg.url and not (cfg.file or cfg.hf_hub_id)):
        kwargs['pretrained_cfg'] = cfg.to_dict()
        return {}

    if cfg.hf_hub_id and (cfg.source == 'hf-hub' or not cfg.file):
        if cfg.hf_hub_filename and not cfg.hf_hub_filename.endswith('.safetensors'):
            raise UsageError(
                f'{cfg.hf_hub_filename!r} of {cfg.hf_hub_id!r} is not a safetensors file, and others are not loaded '
                f'from the Hub; `timm-mixpath push` writes {WEIGHTS_NAME}'
            )
        folder = fetch_model(
            cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir=cache_dir, config_is_cached=cfg.source == 'hf-hub'
        )
        # The very commit that was checked: timm takes it from the cache and asks the Hub nothing more
        place = {
            'source': 'hf-hub',
            'hf_hub_id': f'{cfg.hf_hub_id.partition("@")[0]}@{folder.name}',
            'hf_hub_filename': cfg.hf_hub_filename,
        }
        where = f'hf-hub:{cfg.hf_hub_id}'
    elif cfg.file:
        path = Path(cfg.file)
        if path.parent.parent == _WEIGHTS_DIR and path.parent.name in PACKAGED:
            check_packaged(path.parent.name)
        if not path.exists():
            raise UsageError(f'weights file {str(path)!r} does not exist')
        folder = path if path.is_dir() else path.parent
        place = {'source': 'local-dir', 'file': str(path)} if path.is_dir() else {'file': str(path)}
        where = str(path)
        if not path.is_dir() and path.name != WEIGHTS_NAME:
            folder = None  # what stands beside any other file need not belong to it
    else:
        raise RunError(_no_weights(variant))

    model_args: dict[str, Any] = {}
    values = cfg.to_dict(remove_source=True)
    if folder is not None and (folder / CONFIG_NAME).exists():
        config = _read_config(folder / CONFIG_NAME, where)
        if config['architecture'] != variant:
            raise UsageError(f'{where!r} holds weights of {config["architecture"]}, not of {variant}')
        if cfg.source not in ('hf-hub', 'local-dir'):  # otherwise timm has done this
            model_args = dict(config.get('model_args') or {})
            given = {key: value for key, value in overlay.items() if key not in SOURCE_KEYS}
            own = {key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config}
            values = {**values, **_with_tuples(config['pretrained_cfg']), **own, **given}
            kwargs['pretrained_model_args'] = dict(model_args)
            for key, value in model_args.items():
                kwargs.setdefault(key, value)
    values = {key: value for key, value in values.items() if key not in SOURCE_KEYS}
    kwargs['pretrained_cfg'] = {**values, **place, 'architecture': variant}
    kwargs['pretrained_cfg_overlay'] = None
    return model_args


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if isinstance(config['architecture'], str) and isinstance(config['pretrained_cfg'], dict):
            return config
    except (KeyError, TypeError, ValueError):
        pass
    raise RunError(f'{CONFIG_NAME} of {where!r} is damaged or not one of timm')


def _no_weights(variant: str) -> str:
    recipe = next(iter(model_recipes(variant)), None)
    command = f'timm-mixpath train -c {recipe}' if recipe else f'timm-mixpath train --model {variant}'
    if others := timm.list_models(f'{variant}.*', pretrained=True):
        return f'{variant} has no weights of this tag; there are {", ".join(others)}, or files of your own'
    return (
        f'no weights of {variant} are published; train it with `{command}`, or name weights of your own: '
        "pretrained_cfg_overlay=dict(file='model.safetensors') or dict(hf_hub_id='ORG/NAME'), "
        "checkpoint_path='model_best.pth.tar' without pretrained=True, or create_model('hf-hub:ORG/NAME')"
    )


def check_state_dict(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Check names and shapes of tensors before any is used: a `pretrained_filter_fn` of timm.

    timm itself stops being strict where it adapts weights to other classes or channels.

    Raises:
        RunError: They are not those of the model.
    """
    cfg = model.pretrained_cfg
    expected = {key: value.shape for key, value in model.state_dict().items()}
    given = {key: getattr(value, 'shape', None) for key, value in state_dict.items()}
    classifier = f'{cfg.get("classifier")}.'
    if model.num_classes != cfg['num_classes']:  # timm drops the classifier
        if given.get(f'{classifier}weight', (0,))[0] == model.num_classes:
            raise RunError(
                f'the weights are for {model.num_classes} classes, but the pretrained cfg says {cfg["num_classes"]}, '
                f'so timm would drop their classifier; add num_classes={model.num_classes} to pretrained_cfg_overlay'
            )
        expected, given = (
            {key: shape for key, shape in shapes.items() if not key.startswith(classifier)}
            for shapes in (expected, given)
        )
    first_conv = f'{cfg.get("first_conv")}.weight'
    if first_conv in given and first_conv in expected and cfg['input_size'][0] != expected[first_conv][1]:
        del expected[first_conv], given[first_conv]  # timm adapts the channels
    problem = None
    if missing := expected.keys() - given.keys():
        problem = f'{min(missing)} is missing'
    elif extra := given.keys() - expected.keys():
        problem = f'the model has no {min(extra)}'
    elif wrong := [key for key in sorted(expected) if expected[key] != given[key]]:
        shape = None if given[wrong[0]] is None else tuple(given[wrong[0]])
        problem = f'{wrong[0]} has shape {shape}, the model needs {tuple(expected[wrong[0]])}'
    if problem:
        raise RunError(
            f'the weights do not fit this {cfg.get("architecture", "model")}: {problem}; it must be built as for the '
            'training, with the same arch and num_classes'
        )
    return state_dict


@contextmanager
def readable(variant: str, pretrained_cfg: dict[str, Any] | None) -> Iterator[None]:
    """Turn what is raised for an unreadable file of weights into one sentence; None names no file.

    Raises:
        RunError: The file is damaged, or would have to run code to be read.
    """
    if pretrained_cfg is None:
        yield
        return
    try:
        yield
    except (UsageError, RunError):
        raise
    except (EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        where = pretrained_cfg.get('file') or pretrained_cfg.get('hf_hub_id') or pretrained_cfg.get('url')
        raise RunError(f'weights of {variant} in {where!r} can not be loaded: {concise(e)}') from e
