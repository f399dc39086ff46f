"""Options of a training, those of timm's train.py, from a command line, a recipe or Python."""

import argparse
import os
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import ParseKwargs

from ..models.compiled import check_compile
from ..utils.errors import UsageError
from ..utils.numbers import check_at_least, parse_epochs, parse_float, parse_share
from ..utils.precision import add_amp_options
from ..utils.recipes import find_recipe
from .data import HOLDOUT_SPLIT
from .distill import add_distillation_options, check_distillation

__all__ = [
    'CPU_KERNELS_HELP',
    'KeyValue',
    'add_data_options',
    'add_train_options',
    'apply_config',
    'check_values',
    'default_args',
    'make_storable',
    'mixup_active',
]


# Options that say where and how a run was executed, not what comes out of it
LOCAL_OPTIONS = frozenset({
    'checkpoint_hist', 'config', 'cpu_kernels', 'data_dir', 'dataset_download', 'device', 'device_modules',
    'experiment', 'local_rank', 'log_interval', 'no_prefetcher', 'no_resume_opt', 'output', 'pin_mem',
    'log_tensorboard', 'log_wandb', 'recovery_interval', 'resume', 'use_multi_epochs_loader', 'wandb_project',
    'wandb_resume_id', 'wandb_tags', 'workers',
})  # fmt: skip

CPU_KERNELS_HELP = 'compile and use a faster gradient of depthwise convolutions on the CPU, needs a C++ compiler'


class KeyValue(ParseKwargs):
    """timm's `ParseKwargs`, with a message for what is not of the form key=value."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        for value in values:
            if value and '=' not in value:
                parser.error(f'argument {option_string}: {value!r} is not of the form key=value')
        super().__call__(parser, namespace, values, option_string)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images come from and how they are read."""
    add = parser.add_argument_group('data').add_argument
    add('--data-dir', metavar='DIR', help='root folder of the data set')
    add('--dataset', default='', metavar='NAME', help='type/name as in timm, a folder or tar of class folders if empty')
    add('--train-split', default='train', metavar='NAME', help='training split (default: train)')
    add('--val-split', default='validation', metavar='NAME',
        help=f'validation split, none if empty; {HOLDOUT_SPLIT} for the images of --search-holdout '
             '(default: validation)')  # fmt: skip
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ data sets that support it')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', default=None, metavar='MODE', help='PIL mode of the images (default: RGB, L for 1 channel)')
    add(
        '--input-key',
        default=None,
        metavar='KEY',
        help="key of the images in wds/, hfds/ and hfids/ data sets, endings of a folder's, as '.webp;.png'",
    )
    add('--target-key', default=None, metavar='KEY', help='key of the class indices in them')
    add('--train-num-samples', type=int, default=None, metavar='N', help='images of the training split of a stream')
    add('--val-num-samples', type=int, default=None, metavar='N', help='images of the validation split of a stream')
    add('--search-holdout', type=parse_share, default=None, metavar='SHARE',
        help='share of the training images kept away from a supernet, for the search '
             '(default: 0.1 for a supernet, 0 for other models; not an option of timm\'s train.py)')  # fmt: skip
    add('--cache-images', action='store_true',
        help='decode the training images once and keep them in memory, at the input size; the augmentation is a shift '
             'by up to an eighth and --hflip, other augmentation options are refused or have no effect (for small '
             'images on a CPU; not an option of timm\'s train.py)')  # fmt: skip
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--use-multi-epochs-loader', action='store_true',
        help='processes that load images live on over epochs, a run that goes on augments otherwise')  # fmt: skip


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `timm-mixpath train`."""
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML recipe, a file or a name of `recipes`')
    add_data_options(parser)

    add = parser.add_argument_group('model').add_argument
    add('--model', default='', metavar='NAME', help='any timm model')
    add('--model-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE', help='for example arch=...')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', default='', metavar='PATH', help='file of the weights for --pretrained or --warm-start')
    add('--warm-start', default='', metavar='NAME',
        help='start from the weights of this model of timm (local-dir:DIR, hf-hub:ORG/NAME), on which the supernet or '
             'network stands: mixnet_m for S2 and S3')  # fmt: skip
    add('--initial-checkpoint', default='', metavar='PATH', help='load this checkpoint into the model')
    add('--resume', default='', metavar='PATH',
        help='go on with a run: its last.pth.tar; auto: the latest checkpoint of --output/--experiment')  # fmt: skip
    add('--recovery-interval', type=int, default=0, metavar='N',
        help='write a checkpoint every N updates within an epoch (default: 0, only on SIGTERM or SIGUSR1)')  # fmt: skip
    add('--no-resume-opt', action='store_true', help='do not restore the optimizer')
    add('--num-classes', type=int, default=None, metavar='N', help="number of classes (default: the model's)")
    add('--gp', default=None, metavar='POOL', help='global pooling')
    add('--img-size', type=int, default=None, metavar='N', help="image size in pixels (default: the model's)")
    add('--in-chans', type=int, default=None, metavar='N', help='input channels (default: 3)')
    add('--input-size', default=None, nargs=3, type=int, metavar='N', help='channels, height, width')
    add('--crop-pct', type=parse_float, default=None, metavar='N', help='centre crop share in validation')
    add(
        '--crop-mode',
        default=None,
        choices=('center', 'squash', 'border'),
        help="of images that are no squares, in validation, as in timm's validate.py (default: the model's)",
    )
    add('--mean', type=parse_float, nargs='+', default=None, metavar='MEAN', help='mean of the pixel values')
    add(
        '--std', type=parse_float, nargs='+', default=None, metavar='STD', help='standard deviation of the pixel values'
    )
    add('--interpolation', default='', metavar='NAME', help='resize interpolation')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images per step and process')
    add('-vb', '--validation-batch-size', type=int, default=None, metavar='N', help='images per validation step')
    add('--channels-last', action='store_true', help='channels_last memory format, faster on CPU and GPU')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='forward passes per optimizer step')
    add('--head-init-scale', type=parse_float, default=None, metavar='N', help='multiply the initial classifier by N')
    add('--head-init-bias', type=parse_float, default=None, metavar='N', help='initial bias of the classifier')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')

    group = parser.add_argument_group('device')
    add = group.add_argument
    add('--device', default=None, metavar='NAME', help='cuda, cpu, ... (default: cuda if there is a GPU, else cpu)')
    add('--device-modules', default=None, nargs='+', metavar='MODULE', help='Python modules to import first')
    add('--cpu-kernels', action='store_true', help=CPU_KERNELS_HELP)
    add('--torchcompile', nargs='?', const='inductor', default=None, metavar='BACKEND',
        help='compile the model with torch.compile (inductor); of a supernet, what its archs are made of')  # fmt: skip
    add('--torchcompile-mode', default=None, metavar='MODE', help='mode of torch.compile')
    add_amp_options(group)
    add('--no-ddp-bb', action='store_true', help='DDP does not broadcast buffers (of supernets it never does)')
    add('--local_rank', default=0, type=int, help=argparse.SUPPRESS)

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME', help='timm optimizer')
    add('--opt-eps', type=parse_float, default=None, metavar='EPS')
    add('--opt-betas', type=parse_float, nargs='+', default=None, metavar='BETA')
    add('--momentum', type=parse_float, default=0.9, metavar='M')
    add('--weight-decay', type=parse_float, default=2e-5)
    add('--clip-grad', type=parse_float, default=None, metavar='NORM', help='gradient clipping')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    add('--layer-decay', type=parse_float, default=None)
    add('--opt-kwargs', nargs='*', default={}, action=KeyValue, metavar='KEY=VALUE')

    add = parser.add_argument_group('learning rate schedule').add_argument
    add('--sched', default='cosine', metavar='NAME', help='timm scheduler')
    add('--sched-on-updates', action='store_true', help='step the schedule per update instead of per epoch')
    add('--lr', type=parse_float, default=None, help='learning rate, overrides --lr-base')
    add('--lr-base', type=parse_float, default=0.1, help='lr = lr_base * global batch size / lr_base_size')
    add('--lr-base-size', type=int, default=256)
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'))
    add('--lr-cycle-mul', type=parse_float, default=1.0)
    add('--lr-cycle-decay', type=parse_float, default=0.5)
    add('--lr-cycle-limit', type=int, default=1)
    add('--lr-k-decay', type=parse_float, default=1.0)
    add('--warmup-lr', type=parse_float, default=1e-5)
    add('--min-lr', type=parse_float, default=0)
    add('--epochs', type=int, default=300, metavar='N')
    add('--start-epoch', type=int, default=None, metavar='N')
    add('--decay-milestones', default=[90, 180, 270], type=int, nargs='+')
    add('--decay-epochs', type=parse_float, default=90)
    add('--warmup-epochs', type=parse_epochs, default=5, metavar='N', help='may be a fraction with --sched-on-updates')
    add('--warmup-prefix', action='store_true')
    add('--cooldown-epochs', type=int, default=0)
    add('--patience-epochs', type=int, default=10)
    add('--decay-rate', '--dr', type=parse_float, default=0.1)

    add = parser.add_argument_group('augmentation and regularization').add_argument
    add('--no-aug', action='store_true', help='no training augmentation')
    add('--train-crop-mode', default=None, metavar='MODE', help='rrc, rkrc, rkrr')
    add('--scale', type=parse_float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='random resized crop, area')
    add('--ratio', type=parse_float, nargs='+', default=[3.0 / 4.0, 4.0 / 3.0], help='random resized crop, aspect')
    add('--hflip', type=parse_float, default=0.5)
    add('--vflip', type=parse_float, default=0.0)
    add('--color-jitter', type=parse_float, default=0.4)
    add('--color-jitter-prob', type=parse_float, default=None)
    add('--grayscale-prob', type=parse_float, default=None)
    add('--gaussian-blur-prob', type=parse_float, default=None)
    add('--aa', default=None, metavar='NAME', help='AutoAugment or RandAugment policy')
    add('--reprob', type=parse_float, default=0.0, help='random erasing probability')
    add('--remode', default='pixel')
    add('--recount', type=int, default=1)
    add('--mixup', type=parse_float, default=0.0)
    add('--cutmix', type=parse_float, default=0.0)
    add('--cutmix-minmax', type=parse_float, nargs='+', default=None)
    add('--mixup-prob', type=parse_float, default=1.0)
    add('--mixup-switch-prob', type=parse_float, default=0.5)
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    add('--mixup-off-epoch', default=0, type=int)
    add('--smoothing', type=parse_float, default=0.1, help='label smoothing')
    add('--bce-loss', action='store_true', help='binary cross-entropy, class by class')
    add('--bce-sum', action='store_true', help='sum it over the classes in the place of their mean')
    add('--bce-target-thresh', type=parse_float, default=None, metavar='P', help='soft targets above P count as 1')
    add('--bce-pos-weight', type=parse_float, default=None, metavar='W', help='weight of the positive targets')
    add(
        '--aug-repeats',
        type=parse_float,
        default=0,
        metavar='N',
        help='augmentations of an image in a batch of all processes',
    )
    add('--train-interpolation', default='random')
    add('--drop', type=parse_float, default=0.0, help='dropout rate')
    add('--drop-path', type=parse_float, default=None, help='stochastic depth rate')

    add_distillation_options(parser)

    add = parser.add_argument_group('batch norm').add_argument
    add('--bn-momentum', type=parse_float, default=None)
    add('--bn-eps', type=parse_float, default=None)
    add(
        '--frozen-bn',
        action='store_true',
        help='batch norms keep the statistics that they have; weights and biases train',
    )
    add('--sync-bn', action='store_true', help='synchronized batch norm')
    add('--dist-bn', default='reduce', choices=('broadcast', 'reduce', ''))

    add = parser.add_argument_group('model EMA').add_argument
    add('--model-ema', action='store_true', help='moving average of the weights')
    add('--model-ema-decay', type=parse_float, default=0.9998)
    add('--model-ema-warmup', action='store_true')

    add = parser.add_argument_group('run').add_argument
    add('--seed', type=int, default=42, help='seed of weights, data order, augmentation, and of the sampled archs')
    add('--worker-seeding', default='all', choices=('all', 'part'))
    add('--log-interval', type=int, default=50, metavar='N', help='steps between log lines')
    add('--log-wandb', action='store_true', help='log the metrics of every epoch to Weights & Biases')
    add('--wandb-project', default=None, metavar='NAME', help='project of the run there')
    add('--wandb-tags', default=[], nargs='+', metavar='TAG', help='tags of the run')
    add('--wandb-resume-id', default='', metavar='ID', help='with --resume: the run there that goes on')
    add('--log-tensorboard', action='store_true',
        help='log them for TensorBoard, in the folder of the run (not an option of timm\'s train.py)')  # fmt: skip
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    add('--pin-mem', action='store_true')
    add('--no-prefetcher', action='store_true')
    add('--output', default='', metavar='PATH', help='output folder (default: ./output/train)')
    add('--experiment', default='', metavar='NAME', help='sub-folder of the run (default: date-model-size)')
    add('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='metric of model_best')


def apply_config(parser: argparse.ArgumentParser, path: str | Path) -> dict[str, Any]:
    """Make the keys of a YAML recipe the defaults of a parser, as timm's train.py does.

    Returns:
        The recipe.

    Raises:
        UsageError: The file can't be read, is no mapping, or has a key or value that the parser does not know.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise UsageError(f'recipe {str(path)!r} can not be read: {e.strerror}') from None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f'recipe {str(path)!r} is not valid YAML: {e}'.replace('\n', ' ')) from None
    if not isinstance(config, dict):
        raise UsageError(f'recipe {str(path)!r} must map option names to values')
    actions = _options(parser)
    for key, value in config.items():
        if key not in actions:
            raise UsageError(
                f'recipe {str(path)!r}: {key!r} is not an option of `timm-mixpath train`; see `timm-mixpath train -h`, '
                'keys have underscores, for example batch_size'
            )
        config[key] = _convert(value, actions[key], f'recipe {str(path)!r}: {key}')
    parser.set_defaults(**config)
    return config


def _convert(value: Any, action: argparse.Action, what: str) -> Any:
    """Check a value of a recipe, or of Python, as argparse would check a word of the command line."""
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise UsageError(f'{what} must be a mapping, not {value!r}')
        return value
    if value is None and action.default is None:
        return value
    is_list = action.nargs in ('+', '*', 3)
    if is_list != isinstance(value, list):
        raise UsageError(f'{what} is {value!r}, expected a {"list" if is_list else "single value"}')
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UsageError(f'{what} is {value!r}, expected true or false')
        return value
    kind = action.type or str
    values = value if is_list else [value]
    if not all(v is None or isinstance(v, (str, int, float, date)) for v in values):  # YAML reads 2024-01-01 as a date
        raise UsageError(f'{what} is {value!r}, expected {"a list of " if is_list else ""}text or numbers')
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise UsageError(f'{what} is {value!r}, expected {action.nargs} values')
    try:  # YAML reads 1e-5 as text
        converted = [kind(v) if kind in (int, str) else kind(str(v)) for v in values]
        if kind is int and any(
            isinstance(v, bool) or (isinstance(v, float) and v != c) for v, c in zip(values, converted)
        ):
            raise ValueError
        if any(v is None or (kind is str and isinstance(v, bool)) for v in values):
            raise ValueError
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        names = {parse_float: 'float', parse_epochs: 'float', parse_share: 'a share such as 0.1 or 10%'}
        wanted = names.get(kind) or kind.__name__
        raise UsageError(f'{what} is {value!r}, expected {"a list of " if is_list else ""}{wanted}') from None
    if action.choices and not set(converted) <= set(action.choices):
        raise UsageError(f'{what} is {value!r}, allowed are {", ".join(map(repr, action.choices))}')
    return converted if is_list else converted[0]


def default_args(**overrides: Any) -> argparse.Namespace:
    """Return the options of `timm-mixpath train` at their defaults, for `train` without a command line.

    Args:
        **overrides: Options that differ, by their names with underscores. `config`, a recipe's name or path, sets the
            defaults of the others, as on the command line; set afterwards it does nothing.

    Raises:
        UsageError: There is no such option or recipe, or the option can not have this value.
    """
    parser = _train_parser()
    actions = _options(parser)
    for name in overrides:
        if name not in actions:
            raise UsageError(f'{name!r} is not an option of timm_mixpath train')
    checked = {name: _checked(value, actions[name]) for name, value in overrides.items()}
    if checked.get('config'):
        apply_config(parser, find_recipe(checked['config']))
    return Namespace(**{**vars(parser.parse_args([])), **checked})


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return parser


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.default != argparse.SUPPRESS}


def _as_yaml(value: Any) -> Any:
    """Return a value of Python as YAML would give it: numbers of NumPy and torch, tuples, paths, devices, too."""
    if isinstance(value, str):
        return str(value)  # an Arch is a text of its own class
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, dict):
        # Tuples remain: those of a command line are, and a resumed run has to have the same
        return {k: tuple(map(_as_yaml, v)) if isinstance(v, tuple) else _as_yaml(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [_as_yaml(v) for v in value]
    if isinstance(value, torch.device):
        return str(value)
    return value


def _checked(value: Any, action: argparse.Action) -> Any:
    """Check a value of Python as that of a recipe is."""
    name = action.dest
    if value is None and name == 'color_jitter':
        return 0.0  # timm's word for none
    if value is None and not action.default:
        return action.default  # that of an option that is off
    value = _convert(_as_yaml(value), action, name)
    for key, part in value.items() if isinstance(value, dict) else ():
        try:
            yaml.safe_dump(part)
        except yaml.YAMLError:
            raise UsageError(f'{name}: {key}={part!r} can not be stored; give a name, numbers or a list') from None
    return value


def make_storable(args: Namespace) -> None:
    """Make the options storable in a checkpoint that loads with weights_only.

    Raises:
        UsageError: An option can not have the value that it has.
    """
    actions = _options(_train_parser())
    for key, value in vars(args).items():
        if key in actions:
            setattr(args, key, _checked(value, actions[key]))
        elif isinstance(value, os.PathLike):
            setattr(args, key, os.fspath(value))
    if args.data_dir:
        args.data_dir = os.path.abspath(args.data_dir)  # a later search may start from another folder
    if args.class_map and os.path.exists(args.class_map):  # otherwise timm looks for it in the data folder
        args.class_map = os.path.abspath(args.class_map)


_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

# Options of timm's augmentations and loaders that are names
_NAMES = {
    'interpolation': _INTERPOLATIONS,
    'train_interpolation': (*_INTERPOLATIONS, 'random'),
    'train_crop_mode': ('', 'rrc', 'rkrc', 'rkrr'),
    'remode': ('', 'const', 'rand', 'pixel'),
}


def check_values(args: Namespace) -> None:
    if not args.model:
        raise UsageError('no model: pass --model NAME, or a recipe with -c (`timm-mixpath recipes` lists them)')
    positive = ('batch_size', 'grad_accum_steps', 'checkpoint_hist', 'epochs', 'val_interval', 'log_interval')
    check_at_least(args, dict.fromkeys((*positive, 'validation_batch_size', 'in_chans'), 1))
    if args.workers < 0:
        raise UsageError(f'--workers {args.workers} must not be negative')
    if mixup_active(args) and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size} must be even with --mixup or --cutmix, which mix pairs')
    if args.cache_images and (mixup_active(args) or args.aa or args.reprob or args.vflip):
        raise UsageError(
            '--cache-images shifts and flips images and does nothing else; leave it out, or --mixup, --cutmix, --aa, '
            '--reprob and --vflip'
        )
    for name, allowed in _NAMES.items():
        if (value := getattr(args, name) or '') not in allowed:
            known = ', '.join(filter(None, allowed))
            raise UsageError(f'--{name.replace("_", "-")} {value!r} is unknown, known are {known}')
    for name in ('scale', 'ratio'):
        value = getattr(args, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            given = ' '.join(f'{number:g}' for number in value)
            raise UsageError(f'--{name} {given} must be two positive numbers, the smaller one first')
    if not 0 <= args.seed < 2**31:
        raise UsageError(f'--seed {args.seed} is out of range, allowed are 0 to {2**31 - 1}')
    if args.clip_grad is not None and args.clip_grad <= 0:
        raise UsageError(f'--clip-grad {args.clip_grad} must be positive')
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint!r} is not a file')
    check_distillation(args)
    if args.torchcompile:
        check_compile(args.torchcompile, args.torchcompile_mode)
    elif args.torchcompile_mode:
        raise UsageError(
            f'--torchcompile-mode {args.torchcompile_mode} has no effect without --torchcompile, give both'
        )
    for switch, names in (
        ('bce_loss', ('bce_sum', 'bce_target_thresh', 'bce_pos_weight')),
        ('log_wandb', ('wandb_project', 'wandb_tags', 'wandb_resume_id')),
    ):
        given = [name for name in names if getattr(args, name)]
        if given and not getattr(args, switch):
            one, other = (f'--{name.replace("_", "-")}' for name in (given[0], switch))
            raise UsageError(f'{one} has no effect without {other}, give both or none')
    if args.wandb_resume_id and not args.resume:
        raise UsageError(f'--wandb-resume-id {args.wandb_resume_id} goes on with a run and needs --resume')
    if args.warmup_epochs < 0:
        raise UsageError(f'--warmup-epochs {args.warmup_epochs} must not be negative')
    if args.warmup_epochs != int(args.warmup_epochs) and not args.sched_on_updates:
        raise UsageError(
            f'--warmup-epochs {args.warmup_epochs} is part of an epoch, which --sched-on-updates allows; without it '
            'the learning rate changes between epochs only'
        )
    if args.warmup_epochs != int(args.warmup_epochs) and args.warmup_prefix:
        raise UsageError(
            f'--warmup-epochs {args.warmup_epochs} is part of an epoch, and --warmup-prefix puts it in front of the '
            'others: make it a whole number'
        )
    if args.sched == 'step' and args.decay_epochs <= 0:
        raise UsageError(f'--decay-epochs {args.decay_epochs:g} must be positive')
    if args.start_epoch is not None and args.start_epoch < 0:
        raise UsageError(f'--start-epoch {args.start_epoch} must not be negative')
    if args.cooldown_epochs and args.sched not in ('cosine', 'tanh', 'poly'):
        raise UsageError(
            f'--cooldown-epochs {args.cooldown_epochs} has no effect with --sched {args.sched}, leave it out'
        )
    if args.recovery_interval < 0:
        raise UsageError(f'--recovery-interval {args.recovery_interval} must not be negative')
    if args.resume and args.sched == 'plateau':
        raise UsageError('--sched plateau can not be resumed: what it has seen is not in the checkpoint')


def mixup_active(args: Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
