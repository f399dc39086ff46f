"""Training checkpoints: written atomically, loaded without unpickling anything but weights and plain values."""

import hashlib
import logging
import os
import shutil
from argparse import Namespace
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import adapt_input_conv, clean_state_dict, get_model_args, load_state_dict
from timm.utils import CheckpointSaver
from torch import nn

from ..models.backbone import BackboneNet, BackboneSupernet, describe_origin, is_backbones
from ..models.pretrained import PREPROCESSING, SOURCE_KEYS, config_beside, preprocessing_beside, readable
from ..models.supernet import Supernet
from ..utils.errors import RunError, UsageError, as_usage_error, concise
from ..utils.files import needs_room, write_atomic
from ..utils.hub_client import fetch_model
from .recovery import RECOVERY

_logger = logging.getLogger(__name__)

__all__ = [
    'AtomicCheckpointSaver',
    'LoadedModel',
    'check_model_name',
    'create_model',
    'keep_preprocessing',
    'load_model',
    'load_supernet',
    'load_weights',
    'note_origin',
    'note_start',
    'own_model',
    'read_checkpoint',
    'resolve_data',
    'set_img_size',
    'state_dict_sha256',
    'write_checkpoint',
]


def _writing(path: str | os.PathLike) -> AbstractContextManager[None]:
    return needs_room(
        f'checkpoint {os.fspath(path)!r}',
        'what was there before is whole, make room on the disk and go on from it',
    )


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver without its moment, between unlink and rename, in which `last.pth.tar` does not exist."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with _writing(save_path):
            try:
                super()._save(save_path, epoch, metric)
                with open(save_path, 'rb') as f:
                    os.fsync(f.fileno())
            except BaseException:
                Path(save_path).unlink(missing_ok=True)
                raise

    def recover(self, epoch: int, progress: dict[str, Any]) -> None:
        """Write a checkpoint within an epoch, whole or not at all.

        To whom does not know `progress`, the options' entry, it is one after the epoch before.

        Args:
            epoch: The epoch.
            progress: How far it is, plain values.
        """
        path = os.path.join(self.recovery_dir, RECOVERY)
        options = self.args
        self.args = Namespace(**vars(options), progress=progress)
        try:
            self._save(f'{path}.tmp', epoch - 1)
        finally:
            self.args = options
        os.replace(f'{path}.tmp', path)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """See timm's; what was written within the epoch is not needed any more."""
        result = super().save_checkpoint(epoch, metric)
        Path(self.recovery_dir, RECOVERY).unlink(missing_ok=True)
        return result

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:  # no hard links on this file system
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)


@dataclass
class LoadedModel:
    """A model from a checkpoint, with what it was trained with.

    Attributes:
        model: The model, in eval mode on the CPU.
        args: Options of its training, empty for a model folder.
        data_config: Input size, mean, std and resizing, see `timm.data.resolve_data_config`.
        epoch: Last epoch it was trained for, None if unknown.
        metric: Value of the training's `eval_metric` after that epoch, None if unknown.
        is_ema: The weights are the averaged ones.
    """

    model: nn.Module
    args: Namespace
    data_config: dict[str, Any]
    epoch: int | None = None
    metric: float | None = None
    is_ema: bool = False

    @property
    def label_names(self) -> list[str] | None:
        """Class names that it was trained with, in the order of their index; None if that is not known."""
        if vars(self.args):  # the cfg of a checkpoint's model is that of the name it was made from
            return getattr(self.args, 'label_names', None)
        names = self.model.pretrained_cfg.get('label_names')
        return list(map(str, names)) if isinstance(names, list | tuple) else None  # a config.json may have numbers


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a training checkpoint, ours or of timm's train.py.

    Raises:
        UsageError: It does not exist, or is not a training checkpoint.
        RunError: It is damaged, or would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f'checkpoint {str(path)!r} does not exist'
            if not path.exists()
            else f'{str(path)!r} is not a file; pass the last.pth.tar in it'
        )
    try:
        with torch.serialization.safe_globals([Namespace]):  # what timm's saver puts beside tensors
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError:
        raise RunError(
            f'{str(path)!r} is no checkpoint, or holds more than tensors and plain values: it would have to run code '
            'to be read (weights_only=False), which is never done; take the last.pth.tar or model_best.pth.tar of a run'
        ) from None
    except Exception:  # torch raises half a dozen types for a file that is no checkpoint, with words of its own inside
        raise RunError(
            f'{str(path)!r} is not a readable checkpoint, it is damaged, cut off or something else; pass the '
            'last.pth.tar or model_best.pth.tar of a run'
        ) from None
    is_one = isinstance(checkpoint, dict) and {'state_dict', 'args'} <= checkpoint.keys()
    if not is_one or not isinstance(checkpoint['args'], Namespace) or not hasattr(checkpoint['args'], 'model'):
        raise UsageError(
            f"{str(path)!r} is not a training checkpoint, it has no 'state_dict' and 'args' of a training; "
            'pass the last.pth.tar or model_best.pth.tar of a run'
        )
    return checkpoint


def write_checkpoint(path: str | os.PathLike, model: nn.Module, args: Namespace) -> None:
    """Write a checkpoint of a model before its training, whole or not at all.

    Args:
        path: File.
        model: Model.
        args: Options of its training, with plain values only.

    Raises:
        RunError: It can't be written.
    """
    with _writing(path), write_atomic(path) as temporary, open(temporary, 'wb') as f:
        torch.save({'arch': args.model, 'state_dict': model.state_dict(), 'args': args}, f)
        f.flush()
        os.fsync(f.fileno())


def load_model(path: str | os.PathLike, *, use_ema: bool = True, like: Namespace | None = None) -> LoadedModel:
    """Load a model of a training checkpoint (ours or of timm's train.py), of a model folder or of a Hub repo.

    Args:
        path: `*.pth.tar` file, a folder with `config.json` and `model.safetensors`, `hf-hub:ORG/NAME[@REVISION]`, or
            weights alone, as timm's clean_checkpoint.py and avg_checkpoints.py write them, with `like`.
        use_ema: Prefer the averaged weights where there are any.
        like: Options of a training that say what weights alone are of. The number of classes is that of the weights
            if it is None. It is not asked where a checkpoint tells by itself.

    Raises:
        UsageError: No such file, or not a checkpoint of a known model.
        RunError: The file is damaged, its weights do not fit its model, or the Hub does not give it.
    """
    name = str(path)
    path = fetch_model(name.removeprefix('hf-hub:')) if name.startswith('hf-hub:') else Path(path)
    if path.is_dir():
        if not (path / 'config.json').exists():
            raise UsageError(f'{str(path)!r} is not a model folder, it has no config.json')
        try:
            model = timm.create_model(f'local-dir:{path}', pretrained=True)
        except Exception as e:  # a config.json of others may hold anything, and timm raise as much
            raise RunError(f'model {name!r} can not be loaded: {concise(e)}') from None
        return LoadedModel(model.eval(), Namespace(), resolve_data_config({}, model=model))

    checkpoint = _read_any(path, like)
    args = checkpoint['args']
    model = create_model(args)
    # What the cfg of its name says of weights is of those that are published, not of these
    of_others = {'tag', 'license', 'label_names', 'label_descriptions', 'notes', *SOURCE_KEYS}
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in of_others}
    note_origin(model, args)
    key = 'state_dict_ema' if use_ema and checkpoint.get('state_dict_ema') is not None else 'state_dict'
    try:
        model.load_state_dict(clean_state_dict(checkpoint[key]))
    except RuntimeError as e:
        details = ' '.join(line.strip() for line in str(e).splitlines()[1:3])
        raise RunError(f'weights of {str(path)!r} do not fit {args.model}: {details[:300]}') from None
    data_config = resolve_data(args, model)
    return LoadedModel(
        model.eval(), args, data_config, checkpoint.get('epoch'), checkpoint.get('metric'), key == 'state_dict_ema'
    )


def note_origin(model: nn.Module, args: Namespace) -> None:
    """Keep with a model from which weights its training started, as the licence of those goes on to be theirs.

    Args:
        model: Model whose pretrained cfg gets the `notes` that a card shows.
        args: Options of its training. `origin` is set, as long as what they name is there: it is looked at when a
            training starts, or when a checkpoint of timm's train.py is loaded, and its checkpoints keep it.
    """
    if getattr(args, 'origin', None) is None:
        args.origin = _find_origin(model, args)
    if args.origin:
        model.pretrained_cfg['notes'] = tuple(args.origin)


def note_start(args: Namespace) -> None:
    """Keep with a training what the one held out whose weights it starts from.

    Args:
        args: Options of the training. `start_held_out` is set: the `data.split_record` of that training, empty if it
            held nothing out, None if that is not known, as with weights alone.
    """
    path = args.initial_checkpoint or (args.pretrained_path if args.pretrained or args.warm_start else '')
    args.start_held_out = None
    before = _training_of(path) if path else None
    # Versions that kept no record do not tell which images they held out
    if before is not None and (hasattr(before, 'held_out') or not getattr(before, 'search_holdout', None)):
        args.start_held_out = getattr(before, 'held_out', None) or {}


def _find_origin(model: nn.Module, args: Namespace) -> list[str]:
    path, name = getattr(args, 'pretrained_path', ''), getattr(args, 'warm_start', '')
    kwargs = getattr(args, 'model_kwargs', None) or {}
    if getattr(args, 'pretrained', False):
        source = getattr(args, 'model_source', '') or args.model
        cfg = None if ':' in source else timm.get_pretrained_cfg(source)
        # A file holds the weights of the backbone of such a model, unless it says that they are its own
        is_of_backbone = isinstance(model, BackboneNet | BackboneSupernet)
        if path and is_of_backbone:
            is_of_backbone = _what_is_beside(path).get('architecture') != args.model
        if ':' in source or (cfg is not None and (path or cfg.has_weights) and not (path and is_of_backbone)):
            name = source
        elif is_of_backbone:
            name = kwargs.get('backbone', model.space.name)
    notes: list[str] = [describe_origin(name, path)] if name else []
    if path or name.startswith('local-dir:'):
        notes += _notes_of(path or name.removeprefix('local-dir:'))
    elif ':' in name:
        notes += model.pretrained_cfg.get('notes') or ()
    if initial := getattr(args, 'initial_checkpoint', ''):
        notes += _notes_of(initial)
    return list(dict.fromkeys(notes))


def _what_is_beside(path: str) -> dict[str, Any]:
    """The config.json of weights, nothing where it is damaged or out of reach: a checkpoint loads without it."""
    try:
        return config_beside(path)
    except (OSError, RunError):
        return {}


def _notes_of(path: str) -> list[str]:
    """What a model folder, the file in it or a training checkpoint says of where its weights came from."""
    if config := _what_is_beside(path):
        return [str(note) for note in config['pretrained_cfg'].get('notes') or ()]
    return list(getattr(_training_of(path), 'origin', None) or ())


def _training_of(path: str) -> Namespace | None:
    """The options of a training checkpoint, None for weights alone, which say nothing."""
    try:
        return read_checkpoint(path)['args']
    except (OSError, UsageError, RunError):
        return None


def load_weights(model: nn.Module, path: str, args: Namespace) -> None:
    """Start a training from the weights of `--initial-checkpoint`, averaged ones where there are any.

    A classifier of another number of classes is left out, and a first convolution adapted to other channels, as timm
    does with pretrained weights. The images are normalised as they were for these weights, where the file tells and
    the options don't.

    Args:
        model: Model.
        path: Training checkpoint, state dict or safetensors file.
        args: Options of the training; mean and std are set as said.

    Raises:
        RunError: The file can't be read, or is of another network; the message says what differs.
    """
    try:
        state_dict = load_state_dict(path)
    except Exception as e:  # torch and safetensors raise half a dozen types for a file that is no checkpoint
        raise RunError(f'--initial-checkpoint {path!r} can not be read: {concise(e)}') from None
    own = model.state_dict()
    shapes = {key: getattr(value, 'shape', None) for key, value in state_dict.items()}
    cfg = model.pretrained_cfg or {}
    left_out: set[str] = set()
    names = cfg.get('classifier') or ()
    for name in (names,) if isinstance(names, str) else names:
        weight = f'{name}.weight'
        if weight in own and weight in shapes and own[weight].shape != shapes[weight]:
            _logger.warning(
                f'the classifier of {path!r} is for {shapes[weight][0]} classes and not for {own[weight].shape[0]}: it '
                'is left out, and learned anew'
            )
            left_out |= {key for key in own if key.startswith(f'{name}.')}
    first = f'{cfg.get("first_conv")}.weight'
    if first in own and first in shapes and own[first].shape[1] != shapes[first][1] and shapes[first][1] == 3:
        state_dict[first] = adapt_input_conv(own[first].shape[1], state_dict[first])
        _logger.warning(f'{first} of {path!r} is adapted to {own[first].shape[1]} input channels')
    state_dict = {key: value for key, value in state_dict.items() if key not in left_out}
    try:
        model.load_state_dict({**{key: own[key] for key in left_out}, **state_dict})
    except RunError:
        raise
    except RuntimeError as e:
        problem = _what_differs(path, args)
        if not problem and is_backbones(state_dict, model):
            problem = f'it holds weights of its backbone; start from them with --pretrained --pretrained-path {path}'
        problem = problem or ' '.join(line.strip() for line in str(e).splitlines()[1:3])[:300]
        raise RunError(f'--initial-checkpoint {path!r} does not fit {args.model}: {problem}') from None
    _normalise_alike(path, args, own[first].shape[1] if first in own else 3)
    if args.head_init_scale not in (None, 1) and not left_out:
        _logger.warning(
            f"--head-init-scale {args.head_init_scale} scales the classifier of {path!r}, too, as in timm's train.py; "
            '--head-init-scale 1 leaves it as it is'
        )


def _normalise_alike(path: str, args: Namespace, in_chans: int) -> None:
    try:
        before = preprocessing_beside(path) or vars(read_checkpoint(path)['args'])
    except (UsageError, RunError):
        return  # weights alone say nothing of images
    for name in ('mean', 'std'):
        then, now = (None if value is None else list(value) for value in (before.get(name), getattr(args, name)))
        if then is None or len(then) != in_chans:
            continue
        if now is None:
            setattr(args, name, then)
        elif now != then:
            _logger.warning(f'{path!r} is of images with --{name} {then}, this training has {now}')


def _what_differs(path: str, args: Namespace) -> str | None:
    """What a training checkpoint says of its model that these options don't, None if nothing."""
    try:
        before = read_checkpoint(path)['args']
    except (UsageError, RunError):
        return None
    wanted, found = ({'model': a.model, **a.model_kwargs} for a in (before, args))
    for key in ('seed', 'sampling', 'nested_init'):  # they change nothing about the weights
        wanted.pop(key, None), found.pop(key, None)
    different = [key for key in dict.fromkeys([*wanted, *found]) if wanted.get(key) != found.get(key)]
    if not different:
        return None
    return ', '.join(f'its {key} is {wanted.get(key)}, this run has {found.get(key)}' for key in different)


def _read_any(path: Path, like: Namespace | None) -> dict[str, Any]:
    """Read a training checkpoint, or weights alone together with the options that say what they are of."""
    is_weights = path.suffix == '.safetensors'
    if not is_weights:
        try:
            return read_checkpoint(path)
        except UsageError:
            if not path.is_file():
                raise
    if like is None or not like.model:
        raise UsageError(
            f'{str(path)!r} is not a training checkpoint, so it does not say what its weights are of; pass --model '
            'NAME and --model-kwargs, or --config, the recipe or the args.yaml of the training'
        )
    try:
        state_dict = load_state_dict(str(path))
    except Exception as e:
        raise RunError(f'weights in {str(path)!r} can not be read: {concise(e)}') from None
    args = Namespace(**vars(like))
    if args.num_classes is None:
        check_model_name(args.model)
        classifier = timm.models.resolve_pretrained_cfg(args.model).classifier
        weight = state_dict.get(f'{classifier}.weight')
        args.num_classes = None if weight is None else len(weight)
    return {'args': args, 'state_dict': state_dict}


def create_model(args: Namespace, **overrides: Any) -> nn.Module:
    """Create the model that training options describe, as timm's train.py does.

    Args:
        args: Training options.
        **overrides: Arguments of `timm.create_model` that take precedence.

    Raises:
        UsageError: Unknown model, or a value that it does not take.
    """
    in_chans = getattr(args, 'in_chans', None)
    if in_chans is None:
        input_size = getattr(args, 'input_size', None)
        in_chans = input_size[0] if input_size else 3
    check_model_name(args.model)
    file = readable(args.model, overrides.get('pretrained_cfg_overlay'))
    with as_usage_error(f'model {args.model!r} can not be created'), file:
        kwargs = dict(
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            **args.model_kwargs,
        )
        return timm.create_model(args.model, **{**kwargs, **overrides})


def own_model(args: Namespace, model: nn.Module) -> None:
    """Make the options of a training tell its model by themselves, where a folder or a repo told it.

    `--model local-dir:DIR` and `hf-hub:ORG/NAME`, and the weights of `--pretrained`, take arch and widths from a
    config.json that may not be there any more when the checkpoint is used. `model_source` keeps where the model came
    from.

    Args:
        args: Options; `model`, `model_kwargs` and `gp` are set where they come from there.
        model: The model that was made with them.
    """
    if ':' in args.model:
        args.model_source, args.model = args.model, model.pretrained_cfg['architecture']
    elif not args.pretrained or args.resume:  # a checkpoint that is resumed has told it
        return
    given = dict(get_model_args(model) or {})
    args.gp = args.gp or given.get('global_pool')
    own = ('num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'global_pool', 'seed')
    args.model_kwargs = {**{key: value for key, value in given.items() if key not in own}, **args.model_kwargs}
    for option, key in (('bn_momentum', 'bn_momentum'), ('bn_eps', 'bn_eps')):
        if key in args.model_kwargs:
            setattr(args, option, args.model_kwargs.pop(key))


def keep_preprocessing(args: Namespace, model: nn.Module) -> None:
    """Make the options of a training tell by themselves how the images of its model are prepared.

    Where they leave it open it is what the model's cfg says when it is made, which depends on the weights that it
    starts from. A model of that name, made for the checkpoint, need not have the same.
    """
    data_config = resolve_data(args, model)
    for name in PREPROCESSING:
        value = data_config.get(name)
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if args.input_size is None:
        # Not as input size where it can be said otherwise: that would win over an --img-size given beside an args.yaml
        args.in_chans, height, width = data_config['input_size']
        if height == width:
            args.img_size = height
        else:
            args.input_size = list(data_config['input_size'])


def resolve_data(args: Namespace, model: nn.Module) -> dict[str, Any]:
    """Return input size, mean, std and resizing, see `timm.data.resolve_data_config`.

    Unlike there, `in_chans` alone changes the channels of the input.

    Raises:
        UsageError: A value is out of range.
    """
    values = dict(vars(args))
    in_chans = values.get('in_chans')
    if in_chans is not None and values.get('input_size') is None:
        height, width = model.pretrained_cfg['input_size'][1:]
        size = values.get('img_size')
        values['input_size'] = (in_chans, size or height, size or width)
    channels = (values.get('input_size') or model.pretrained_cfg['input_size'])[0]
    for name in ('mean', 'std'):
        if values.get(name) is not None and len(values[name]) not in (1, channels):
            raise UsageError(f'--{name} has {len(values[name])} values, the input {channels} channels')
    with as_usage_error('input size, mean, std or crop is out of range'):
        data_config = resolve_data_config(values, model=model)
    if min(data_config['input_size']) < 1:
        raise UsageError(f'input size {data_config["input_size"]} must be three positive numbers')
    for name in ('mean', 'std'):
        if len(data_config[name]) != channels:
            # a default for RGB, of which other inputs take the average
            data_config[name] = (sum(data_config[name]) / len(data_config[name]),) * channels
    return data_config


def check_model_name(name: str) -> None:
    """Raise UsageError for a name that timm does not know."""
    if ':' not in name and not timm.is_model(timm.models.split_model_name_tag(name)[0]):
        known = ', '.join(timm.list_models('mixpath*'))
        raise UsageError(f'unknown model {name!r}; mixpath models are {known}, timm.list_models() lists all')


def load_supernet(
    checkpoint: str | os.PathLike,
    what: str,
    recalibration_images: int,
    like: Namespace | None = None,
    img_size: int | None = None,
) -> LoadedModel:
    """Load the supernet that a search or ranking is of, for images of a size, see `load_model` and `set_img_size`."""
    if recalibration_images < 0:
        raise UsageError(f'number of recalibration images {recalibration_images} must not be negative')
    loaded = load_model(checkpoint, like=like)
    if not isinstance(loaded.model, Supernet):
        raise UsageError(f'{str(checkpoint)!r} holds {type(loaded.model).__name__}, a {what} needs a supernet')
    set_img_size(loaded, img_size)
    return loaded


def set_img_size(loaded: LoadedModel, img_size: int | None) -> None:
    """Make a model one for images of another size than those of its training, unless `img_size` is None.

    Raises:
        UsageError: The size is not positive.
    """
    if img_size is None:
        return
    if img_size < 1:
        raise UsageError(f'image size {img_size} must be positive')
    loaded.data_config = {
        **loaded.data_config,
        'input_size': (loaded.data_config['input_size'][0], img_size, img_size),
    }


def state_dict_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return a fingerprint of tensors by name."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
