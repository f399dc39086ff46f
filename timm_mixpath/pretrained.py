"""Where pretrained weights come from (the Hub, the package itself, a file), and whether they are what they should be.

`huggingface_hub` checks the size of a download, not its content, and timm loads what is in the cache. Here a file has
to have the hash under which the Hub lists it, and tensors have to have the names and shapes of the model.
"""

import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base of what the HTTP library below raises, whichever it is in the installed version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import SafetensorError
from timm.layers import get_norm_layer
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._efficientnet_builder import resolve_bn_args
from torch import nn

from .errors import RunError, UsageError, concise
from .recipes import model_recipes
from .version import __version__

__all__ = [
    'HUB_ORG',
    'add_weights',
    'build_model',
    'check_state_dict',
    'fetch_model',
    'hub_errors',
    'locate_weights',
    'readable',
]

_logger = logging.getLogger(__name__)

# The organisation on the Hub under which the official weights live, read once, at import
HUB_ORG = os.environ.get('TIMM_MIXPATH_HUB_ORG') or 'timm-mixpath'

# Weights that exist on the Hub as HUB_ORG/<model>.<tag>: {'<model>.<tag>': what differs from the model's own cfg}.
# The repo's config.json says the rest when it is loaded. None are published yet.
PUBLISHED: dict[str, dict[str, Any]] = {}

# Small weights that ship inside the package: <model>.<tag>/config.json and model.safetensors, as `export` writes them
_PACKAGED = Path(__file__).parent / 'weights'

_CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')


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
    for config_path in sorted(_PACKAGED.glob(f'*.*/{_CONFIG}')):
        if config_path.parent.name.partition('.')[0] not in bases:
            continue
        cfg = dict(json.loads(config_path.read_text())['pretrained_cfg'])
        cfg.pop('tag', None)
        cfgs[config_path.parent.name] = {**cfg, 'file': str(config_path.with_name(_WEIGHTS))}
    return cfgs


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    num_features: int,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    **kwargs: Any,
) -> nn.Module:
    """Create a model of this package through `timm.models.build_model_with_cfg`.

    Args:
        model_cls: Class of the model.
        variant: Registered name.
        pretrained: Load the weights of the pretrained cfg, located and checked by this module.
        num_features: Number of feature maps that `features_only` gives.
        filter_fn: Brings a state dict into the layout of the model and checks it.
        **kwargs: Arguments of the model class and of `build_model_with_cfg`; timm's `bn_*` ones are bound to the
            `norm_layer`.
    """
    bn_args = resolve_bn_args(kwargs)
    if bn_args:
        kwargs['norm_layer'] = partial(get_norm_layer(kwargs.get('norm_layer') or nn.BatchNorm2d), **bn_args)
    model_args = locate_weights(variant, kwargs) if pretrained else {}
    with readable(variant, kwargs['pretrained_cfg']) if pretrained else nullcontext():
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            feature_cfg=dict(out_indices=tuple(range(num_features)), feature_cls='getter'),
            pretrained_filter_fn=filter_fn,
            **kwargs,
        )
    if model_args:
        model._model_args = model_args  # timm adds the arguments that it was given itself
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
    if any(overlay.get(key) for key in _SOURCES) and not overlay.get('source'):
        # timm lets a source of the cfg win over those of the overlay
        named = {key: overlay.get(key) for key in _SOURCES}
        cfg = resolve_pretrained_cfg(variant, cfg.to_dict(remove_source=True), named)
    if cfg.state_dict or (cfg.url and not (cfg.file or cfg.hf_hub_id)):
        kwargs['pretrained_cfg'] = cfg.to_dict()
        return {}

    if cfg.hf_hub_id and (cfg.source == 'hf-hub' or not cfg.file):
        if cfg.hf_hub_filename and not cfg.hf_hub_filename.endswith('.safetensors'):
            raise UsageError(
                f'{cfg.hf_hub_filename!r} of {cfg.hf_hub_id!r} is not a safetensors file, and others are not loaded '
                f'from the Hub; `timm-mixpath push` writes {_WEIGHTS}'
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
        if not path.exists():
            raise UsageError(f'weights file {str(path)!r} does not exist')
        folder = path if path.is_dir() else path.parent
        place = {'source': 'local-dir', 'file': str(path)} if path.is_dir() else {'file': str(path)}
        where = str(path)
        if not path.is_dir() and path.name != _WEIGHTS:
            folder = None  # what stands beside any other file need not belong to it
    else:
        raise RunError(_no_weights(variant))

    model_args: dict[str, Any] = {}
    values = cfg.to_dict(remove_source=True)
    if folder is not None and (folder / _CONFIG).exists():
        config = _read_config(folder / _CONFIG, where)
        if config['architecture'] != variant:
            raise UsageError(f'{where!r} holds weights of {config["architecture"]}, not of {variant}')
        if cfg.source not in ('hf-hub', 'local-dir'):  # otherwise timm has done this
            model_args = dict(config.get('model_args') or {})
            given = {key: value for key, value in overlay.items() if key not in _SOURCES}
            own = {key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config}
            values = {**values, **config['pretrained_cfg'], **own, **given}
            kwargs['pretrained_model_args'] = dict(model_args)
            for key, value in model_args.items():
                kwargs.setdefault(key, value)
    values = {key: value for key, value in values.items() if key not in _SOURCES}
    kwargs['pretrained_cfg'] = {**values, **place, 'architecture': variant}
    kwargs['pretrained_cfg_overlay'] = None
    return model_args


def fetch_model(
    hub_id: str,
    weights: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    config_is_cached: bool = False,
) -> Path:
    """Bring config.json and weights of a Hub repo into the cache, both of the same commit, and check them.

    Args:
        hub_id: `ORG/NAME`, or `ORG/NAME@REVISION`.
        weights: File with the weights.
        cache_dir: Cache, that of huggingface_hub if None.
        config_is_cached: config.json has just been downloaded, so the commit is known without asking the Hub.

    Returns:
        Folder of the cache that holds them; its name is the commit.

    Raises:
        RunError: The repo or a file can't be had, or is not what the Hub says it is.
    """
    repo_id, _, revision = hub_id.partition('@')
    with hub_errors(hub_id):
        known = None
        if config_is_cached:
            known = try_to_load_from_cache(repo_id, _CONFIG, cache_dir=cache_dir, revision=revision or None)
        if isinstance(known, str):
            if not _is_intact(Path(known), repo_id):
                # timm has parsed it already, so it can't be replaced any more
                _remove(Path(known))
                raise RunError(
                    f'{_CONFIG} of {hub_id!r} was damaged in the cache or on the way and has been removed there; '
                    'load the model again'
                )
            config = Path(known)
        else:
            config = _fetch(repo_id, _CONFIG, revision or None, cache_dir)
        return _fetch(repo_id, weights or _WEIGHTS, config.parent.name, cache_dir).parent


def _fetch(repo_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    """Download a file into the cache, or find it there; damaged ones are removed and loaded once more."""

    def download() -> Path:
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            library_name='timm-mixpath',
            library_version=__version__,
        )
        return Path(path)

    path = download()
    if _is_intact(path, repo_id):
        return path
    _remove(path)
    _logger.warning(f'{filename} of {repo_id!r} was damaged in the cache or on the way, loading it again')
    path = download()
    if _is_intact(path, repo_id):
        return path
    _remove(path)
    raise RunError(
        f'{filename} of {repo_id!r} arrived twice with another content than the Hub lists (its hash differs), and was '
        'not kept; try later or over another network, and tell the owner of the repo if it stays so'
    )


def _is_intact(path: Path, repo_id: str) -> bool:
    """Whether a file of the cache has the content that the Hub lists: its ETag is a hash of the content."""
    if path.is_symlink():
        etag = Path(os.readlink(path)).name
    else:  # no symbolic links on this file system; the Hub knows, if it can be asked
        try:
            url = hf_hub_url(repo_id, path.name, revision=path.parent.name)
            etag = get_hf_file_metadata(url, token=get_token()).etag or ''
        except (HTTPError, OSError):
            return True
    with open(path, 'rb') as f:
        if re.fullmatch('[0-9a-f]{64}', etag):
            return sha_fileobj(f).hex() == etag
        if re.fullmatch('[0-9a-f]{40}', etag):
            return git_hash(f.read()) == etag
    return True  # a mirror with ETags of its own


def _remove(path: Path) -> None:
    """Take a file out of the cache, with the blob behind it."""
    if path.is_symlink():
        path.parent.joinpath(os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if isinstance(config['architecture'], str) and isinstance(config['pretrained_cfg'], dict):
            return config
    except (KeyError, TypeError, ValueError):
        pass
    raise RunError(f'{_CONFIG} of {where!r} is damaged or not one of timm')


def _no_weights(variant: str) -> str:
    recipe = next(iter(model_recipes(variant)), None)
    command = f'timm-mixpath train -c {recipe}' if recipe else f'timm-mixpath train --model {variant}'
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
def readable(variant: str, pretrained_cfg: dict[str, Any]) -> Iterator[None]:
    """Turn what is raised for an unreadable file of weights into one sentence.

    Raises:
        RunError: The file is damaged, or would have to run code to be read.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except (EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        where = pretrained_cfg.get('file') or pretrained_cfg.get('hf_hub_id') or pretrained_cfg.get('url')
        raise RunError(f'weights of {variant} in {where!r} can not be loaded: {concise(e)}') from e


@contextmanager
def hub_errors(hub_id: str, action: str = 'load', hint: str = 'try again later') -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence each.

    Args:
        hub_id: Repo, with `@REVISION` where there is one.
        action: What is tried: 'load' or 'push to'.
        hint: What to do after an error that may pass.

    Raises:
        UsageError: The name can't be that of a repo.
        RunError: Anything else went wrong.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except HFValidationError:
        raise UsageError(f'{hub_id!r} is not the name of a Hub repo, which is ORG/NAME') from None
    except ValueError as e:  # before HTTPError: the Hub's validation of a card; a refused request is both
        if isinstance(e, HTTPError):
            raise RunError(f'can not {action} {hub_id!r}: {_reason(e, hint)}') from e
        raise UsageError(f'can not {action} {hub_id!r}: {" ".join(str(e).split())}') from e
    except (HTTPError, OSError, EntryNotFoundError, RuntimeError) as e:
        raise RunError(f'can not {action} {hub_id!r}: {_reason(e, hint)}') from e


def _reason(error: BaseException, hint: str) -> str:
    login = 'log in with `hf auth login` or set HF_TOKEN'
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload in a thread
    cause: BaseException | None = error
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, OfflineModeIsEnabled):
            return 'offline mode is on (HF_HUB_OFFLINE) and it is not in the cache; load it once with a connection'
    if isinstance(cause, GatedRepoError):
        return f'the repo is gated; ask for access on its page, then {login} with a token of that account'
    if isinstance(cause, RepositoryNotFoundError):
        token = 'your token can not see it' if get_token() else f'it is private; {login}'
        return f'there is no such repo, or {token}'
    if isinstance(cause, RevisionNotFoundError):
        return 'the repo has no such revision'
    if isinstance(cause, EntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        name = str(getattr(cause.response, 'url', '')).rpartition('/')[2]
        return f'the repo has no {name}; other files than {_CONFIG} and safetensors are not loaded'
    if isinstance(cause, OfflineModeIsEnabled):
        return 'offline mode is on (HF_HUB_OFFLINE)'
    if isinstance(cause, HfHubHTTPError):
        return _status_reason(cause, login, hint)
    if isinstance(cause, HTTPError) or isinstance(error, LocalEntryNotFoundError):
        return f'the Hub can not be reached ({concise(cause)}); check the connection and HF_ENDPOINT, or {hint}'
    if isinstance(cause, OSError) and 'onsistency check failed' in str(cause):
        return f'the file arrived incomplete and was not kept; {hint}'
    return f'{concise(cause)}; {hint}'


def _status_reason(error: HfHubHTTPError, login: str, hint: str) -> str:
    status = error.response.status_code
    said = getattr(error, 'server_message', None) or error.response.reason_phrase
    said = ' '.join(str(said).split()).rstrip('.')
    reasons: dict[int, Callable[[], str]] = {
        401: lambda: f'the Hub does not accept your token ({said}); {login} with a valid one',
        403: lambda: f'your token is not allowed to ({said}); {login} with a token that has this right',
        409: lambda: f'it is being changed by somebody else ({said}); {hint}',
        412: lambda: f'it was changed by somebody else in the meantime ({said}); {hint}',
        429: lambda: (
            f'too many requests; wait {error.response.headers.get("Retry-After", "some")} seconds, then {hint}'
        ),
    }
    if status in reasons:
        return reasons[status]()
    return f'the Hub answered {status} ({said}); {hint}'
