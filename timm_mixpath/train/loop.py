"""A training loop of timm's public parts, for supernets and for ordinary models.

It takes the options of timm's train.py (see `options.py`), and adds what a search needs: a held-out search split, a
run that resumes bit for bit on the CPU, and a stop at the first loss that is not finite.
"""

import logging
import math
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm import utils
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import get_pretrained_cfg, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask, evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils.summary import trim_summary
from torch import nn

from ..models.cpu_kernels import use_cpu_kernels
from ..models.layers import keep_layout_of_gradient, run_out_of_place
from ..models.pretrained import PREPROCESSING, readable
from ..models.supernet import Supernet
from ..models.warm_start import warm_start
from ..utils.distributed import open_process
from ..utils.errors import RunError, UsageError, as_usage_error, concise
from ..utils.files import new_output_dir, write_atomic
from ..utils.modules import import_modules
from ..utils.precision import autocast_context
from ..utils.progress import progress_bar
from ..utils.tables import read_csv
from .checkpoint import (
    AtomicCheckpointSaver,
    create_model,
    keep_preprocessing,
    load_weights,
    note_origin,
    note_start,
    own_model,
    read_checkpoint,
    resolve_data,
)
from .data import iterate
from .distill import create_distillation_task
from .loaders import create_loaders, open_data
from .metrics_log import open_metrics_log
from .options import LOCAL_OPTIONS, check_values, default_args, make_storable, mixup_active
from .recovery import RECOVERY, StopSignal, batches_behind, latest_checkpoint, outlive_signals, resolve_auto, run_dir
from .task import create_task

__all__ = ['TrainResult', 'fill_momentum', 'train', 'train_or_resume']

_logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run left behind.

    Attributes:
        output_dir: Folder of checkpoints, `args.yaml` and `summary.csv`; None on other ranks than the first.
        best_metric: Best validation metric, top-1 in percent by default.
        best_epoch: Its epoch.
        metrics: Training and validation metrics of the last epoch. Of a run that had ended before they are those of its
            summary.csv, and other ranks than the first have none.
    """

    output_dir: Path | None
    best_metric: float | None = None
    best_epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """What a training is made of, beside its options.

    Attributes:
        task: What is trained.
        loader_train: Training images.
        loader_val: Validation images, None for none.
        mixup_fn: Mixup that the loader does not do itself.
        optimizer: The optimizer.
        scheduler: Its schedule, None for none.
        loss_scaler: For gradients in float16, None elsewhere.
        autocast: Context of a forward pass.
        saver: Writes checkpoints; None on other ranks than the first.
        output_dir: Folder of the run; None on other ranks than the first.
        start_epoch: First epoch.
        num_epochs: Number of epochs.
        eval_metric: What the best checkpoint is best in.
        stop: Whether the process was asked to end.
        progress: How far the first epoch is already, empty if it begins.
    """

    task: TrainingTask
    loader_train: Any
    loader_val: Any
    mixup_fn: Mixup | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss_scaler: Any
    autocast: Callable[[], Any]
    saver: AtomicCheckpointSaver | None
    output_dir: Path | None
    start_epoch: int
    num_epochs: int
    eval_metric: str
    stop: StopSignal
    progress: dict[str, Any] = field(default_factory=dict)


def train(args: Namespace) -> TrainResult:
    """Train a model.

    The generators of torch, NumPy and `random` are seeded, as by timm's train.py, and stay where the run leaves them.

    Args:
        args: Options, see `options.add_train_options`; `default_args` gives a set to start from.

    Raises:
        UsageError: A model, data set or value that does not exist.
        RunError: The loss is not finite, the output can't be written, or the data can't be read.
    """
    args = Namespace(**vars(args))
    make_storable(args)
    import_modules(args.device_modules or ())
    check_values(args)
    is_auto = args.resume == 'auto'
    args.resume = resolve_auto(args.resume, args.output, args.experiment)
    if is_auto and args.resume:
        args.start_epoch = None  # where the run began
    progress: dict[str, Any] = {}
    if args.resume:
        before = read_checkpoint(args.resume)['args']
        check_resumed(args, before)
        progress = getattr(before, 'progress', {})
    stop = StopSignal()
    with stop.listening(), open_process(args.device, args), _cpu_kernels(args):
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        run = _set_up(args, stop, progress)
        try:
            return _train_epochs(args, run)
        except RuntimeError:
            if stop.number is not None and not utils.is_primary(args):  # the first process has left
                raise stop.stopped('with the others') from None
            raise


def train_or_resume(args: Namespace) -> dict[str, str]:
    """Train, or go on from the last checkpoint of `args.output` and `args.experiment` if there is one.

    Args:
        args: See `train`.

    Returns:
        The last row of the run's summary.csv, as text; also of one that was cut off behind its last epoch.

    Raises:
        UsageError: See `train`.
        RunError: See `train`.
    """
    folder = Path(args.output) / args.experiment
    args = Namespace(**{**vars(args), 'resume': str(latest_checkpoint(folder) or '')})
    train(args)
    return read_csv(folder / 'summary.csv')[-1]


@contextmanager
def _cpu_kernels(args: Namespace) -> Iterator[None]:
    if not args.cpu_kernels:
        yield  # those that the user's own code is using remain in use
        return
    if torch.device(args.device).type != 'cpu':
        raise UsageError(f'--cpu-kernels has no effect on device {args.device!r}, leave it out')
    before = use_cpu_kernels()
    try:
        yield
    finally:
        use_cpu_kernels(before)


def _pretrained_kwargs(args: Namespace) -> dict[str, Any]:
    if not args.pretrained:
        if args.pretrained_path and not args.warm_start:
            raise UsageError(
                f'--pretrained-path {args.pretrained_path} has no effect without --pretrained or --warm-start, give one'
            )
        return {}
    if args.warm_start:
        raise UsageError(
            f'--pretrained and --warm-start {args.warm_start} both name weights to start from, leave one out'
        )
    overlay = {'file': args.pretrained_path} if args.pretrained_path else None
    return {'pretrained': True, 'pretrained_cfg_overlay': overlay}


def _warm_start(model: nn.Module, args: Namespace) -> None:
    name = args.warm_start
    overlay = {'file': args.pretrained_path} if args.pretrained_path else None
    with as_usage_error(f'--warm-start {name!r} can not be loaded'), readable(name, overlay):
        if ':' not in name and not overlay and not getattr(get_pretrained_cfg(name), 'has_weights', False):
            raise ValueError('timm has no pretrained weights of that name')
        source = timm.create_model(name, pretrained=True, in_chans=model.in_chans, pretrained_cfg_overlay=overlay)
    warm_start(model, source)


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a fused SGD the momentum of every parameter, 0 at first.

    It makes one with the first gradient, and takes either all of them or none: in a supernet they come one by one.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group['momentum'] and not group['dampening']:
            for parameter in group['params']:
                state = optimizer.state[parameter]
                if state.get('momentum_buffer') is None:
                    state['momentum_buffer'] = torch.zeros_like(parameter)


def _init_head(model: nn.Module, args: Namespace) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if not hasattr(head, 'weight') or head.bias is None:
        raise UsageError(f'model {args.model!r} has no linear classifier for --head-init-scale and --head-init-bias')
    with torch.no_grad():
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            head.bias.fill_(args.head_init_bias)


def _set_up(args: Namespace, stop: StopSignal, progress: dict[str, Any]) -> _Run:
    # Before anything that takes time, as it may be of another run, or not writable
    with new_output_dir(_output_dir(args)) if utils.is_primary(args) else nullcontext() as output_dir:
        return _make_run(args, stop, progress, output_dir)


def _make_run(args: Namespace, stop: StopSignal, progress: dict[str, Any], output_dir: Path | None) -> _Run:
    device, primary = torch.device(args.device), utils.is_primary(args)

    # Model, task, optimizer, in the order of timm's train.py
    utils.random_seed(args.seed, args.rank)
    # A run that goes on has the weights of its checkpoint, and needs no others
    model = create_model(args, **({} if args.resume else _pretrained_kwargs(args)))
    own_model(args, model)
    if args.warm_start and not args.resume:
        _warm_start(model, args)
    if args.initial_checkpoint and not args.resume:
        load_weights(model, args.initial_checkpoint, args)
    note_origin(model, args)
    if not args.resume:
        note_start(args)
    keep_preprocessing(args, model)
    _init_head(model, args)
    args.num_classes = model.num_classes
    if isinstance(model, Supernet) and 'seed' not in args.model_kwargs:
        model.seed = args.model_kwargs['seed'] = args.seed
    run_out_of_place(model)
    if args.grad_checkpointing:
        with as_usage_error(f'--grad-checkpointing does not work for model {args.model!r}, leave it out'):
            model.set_grad_checkpointing(enable=True)
    data_config = resolve_data(args, model)
    train_set, val_set = open_data(args, model, data_config)
    if primary:
        _logger.info(f'Model {args.model}: {sum(p.numel() for p in model.parameters()):,} parameters')
        val_text = f'{len(val_set):,} validation images' if val_set is not None else 'no validation'
        _logger.info(f'Data: {len(train_set):,} training images, {val_text}, input {data_config["input_size"]}')

    if args.distributed and args.sync_bn and device.type == 'cpu':
        raise UsageError(
            '--sync-bn works on GPUs only, torch has no synchronised batch norm for the CPU; leave it out, --dist-bn '
            'reduce (the default) averages the statistics of the processes after every epoch'
        )
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
        keep_layout_of_gradient(model)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # nothing left to distribute
        model = convert_sync_batchnorm(model)

    autocast = autocast_context(device.type, args.amp_dtype if args.amp else None)
    loss_scaler = None
    if args.amp and device.type == 'cuda' and args.amp_dtype == 'float16':
        loss_scaler = utils.NativeScaler(device=device.type)

    with as_usage_error('an augmentation or loader option is out of range'):
        loader_train, loader_val, mixup_fn = create_loaders(args, data_config, train_set, val_set, device)
    for loader in (loader_train, loader_val):
        outlive_signals(loader)
    if len(loader_train) == 0:
        raise UsageError(
            f'{len(train_set)} training images do not fill one batch of {args.batch_size} on {args.world_size} '
            'process(es), incomplete batches are dropped; lower --batch-size'
        )
    _resolve_lr(args)

    bce: dict[str, Any] = {}
    if args.bce_loss:
        bce = dict(loss_type='bce', bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum)
        bce['pos_weight'] = args.bce_pos_weight
    with as_usage_error(f'the loss can not be created with --smoothing {args.smoothing}'):
        criterion = create_classification_loss(smoothing=args.smoothing, soft_targets=mixup_active(args), **bce)
        criterion.to(device)  # it may hold the weight of the positive targets
    if args.kd_model_name:
        task = create_distillation_task(model, criterion, args, data_config, device=device, verbose=primary)
    else:
        task = create_task(model, criterion, device=device, verbose=primary)
    with as_usage_error(f'optimizer {args.opt!r} can not be created'):
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(args), **args.opt_kwargs)

    resume_epoch = None
    if args.resume:
        resume_epoch = _resume(args, task, optimizer, loss_scaler)
    if args.opt_kwargs.get('fused'):
        fill_momentum(optimizer)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        device_ids = None if device.type == 'cpu' else [device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)

    updates_per_epoch = _updates_per_epoch(args, loader_train)
    if args.start_epoch not in (None, resume_epoch):
        progress = {}  # of another epoch
    progress = _continued(args, progress, len(loader_train), updates_per_epoch) if progress else {}
    eval_metric = args.eval_metric if loader_val is not None else 'loss'
    decreasing = eval_metric == 'loss'
    with as_usage_error(f'schedule {args.sched!r} can not be created'):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch
        )
    start_epoch = next((e for e in (args.start_epoch, resume_epoch) if e is not None), 0)
    if not args.resume and start_epoch >= num_epochs:
        raise UsageError(f'--start-epoch {start_epoch} leaves nothing to train of {num_epochs} epochs, lower it')
    if scheduler is not None and start_epoch > 0 and not args.sched_on_updates:
        scheduler.step(start_epoch)
    if scheduler is not None and args.sched_on_updates:
        updates = start_epoch * updates_per_epoch + progress.get('updates', 0)
        if updates:
            scheduler.step_update(updates)

    saver = None
    if primary:
        saver = AtomicCheckpointSaver(
            model=model,
            optimizer=optimizer,
            args=args,
            amp_scaler=loss_scaler,
            checkpoint_dir=str(output_dir),
            recovery_dir=str(output_dir),
            decreasing=decreasing,
            max_history=args.checkpoint_hist,
            task=task,
        )
        if args.resume and Path(args.resume).resolve().parent == output_dir.resolve():
            saver.load_state_dict_from_checkpoint(args.resume)
    return _Run(
        task=task,
        loader_train=loader_train,
        loader_val=loader_val,
        mixup_fn=mixup_fn,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_scaler=loss_scaler,
        autocast=autocast,
        saver=saver,
        output_dir=output_dir,
        start_epoch=start_epoch,
        num_epochs=num_epochs,
        eval_metric=eval_metric,
        stop=stop,
        progress=progress,
    )


# What decides which images the batches of an epoch have
_SHARING = ('batch_size', 'world_size', 'grad_accum_steps')


def _continued(args: Namespace, progress: dict[str, Any], num_batches: int, num_updates: int) -> dict[str, Any]:
    """Where a stopped run stands within its epoch: behind its last batch, if the batches are what they were."""
    changed = {
        name: f'{name} {progress[name]} -> {getattr(args, name)}'
        for name in _SHARING
        if progress.get(name, getattr(args, name)) != getattr(args, name)
    }
    before = progress.get('num_batches', num_batches)
    if progress['batches'] >= before:  # stopped in the validation, nothing of the epoch is left
        loss_sum = progress['loss_sum'] / progress['batches'] * num_batches
        return dict(batches=num_batches, updates=num_updates, loss_sum=loss_sum)
    if before != num_batches:
        changed['num_batches'] = f'batches per epoch {before} -> {num_batches}'
    if not changed:
        return progress
    if utils.is_primary(args):
        _logger.warning(
            f'the epoch that {args.resume!r} was stopped in is begun again, as its batches are others now: '
            f'{", ".join(changed.values())}'
        )
    return {}


def _updates_per_epoch(args: Namespace, loader: Any) -> int:
    return math.ceil(len(loader) / args.grad_accum_steps)


def _train_epochs(args: Namespace, run: _Run) -> TrainResult:
    primary, saver, output_dir = utils.is_primary(args), run.saver, run.output_dir
    result = TrainResult(output_dir)
    if saver is not None:
        result.best_metric, result.best_epoch = saver.best_metric, saver.best_epoch
    if args.resume and run.start_epoch >= run.num_epochs:
        if primary:
            _logger.info(
                f'{args.resume!r} has ended after {run.start_epoch} epochs and nothing is left to train; a larger '
                '--epochs goes on'
            )
            result.metrics = _last_metrics(output_dir / 'summary.csv')
        return result

    if primary:
        with write_atomic(output_dir / 'args.yaml') as path:
            # options alone, without what was found out on the way, so that `-c args.yaml` repeats the run
            known = vars(default_args()).keys() - {'config', 'resume', 'wandb_resume_id'}
            options = {k: v for k, v in vars(args).items() if k in known}
            path.write_text(yaml.safe_dump(options, default_flow_style=False))
        trim_summary(output_dir / 'summary.csv', run.start_epoch)
        _logger.info(
            f'Training epochs {run.start_epoch} to {run.num_epochs - 1} on {args.device}, output in {output_dir}'
        )

    with open_metrics_log(args, output_dir, run.start_epoch) if primary else nullcontext() as log:
        _train_all(args, run, result, log)
    return result


def _last_metrics(summary: Path) -> dict[str, float]:
    last = read_csv(summary)[-1:] if summary.exists() else []
    known = ((name, value) for row in last for name, value in row.items() if name and value)
    return {name: float(value) for name, value in known if name.startswith(('train_', 'eval_'))}


def _train_all(args: Namespace, run: _Run, result: TrainResult, log: Callable[..., None] | None) -> None:
    """Train the epochs that are left, and note in `result` how it went; `log` takes metrics in the first process."""
    primary, task, saver, output_dir = utils.is_primary(args), run.task, run.saver, run.output_dir
    for epoch in range(run.start_epoch, run.num_epochs):
        _start_epoch(args, run.loader_train, epoch)
        train_metrics = _train_one_epoch(args, run, epoch)
        if args.distributed and args.dist_bn:
            utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
        if (epoch + 1) % args.val_interval != 0 and epoch + 1 != run.num_epochs:
            if saver is not None:
                saver.save_checkpoint(epoch)
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, metric=None)
            continue

        val_metrics = None
        if run.loader_val is not None:
            ema = task.has_ema()
            if ema and args.distributed and args.dist_bn:
                utils.distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')
            try:
                val_metrics = _validate(args, run, epoch, train_metrics['loss'], ema=ema)
            except RunError:  # an image that can't be read must not cost the epoch
                _recover_trained(args, run, epoch, train_metrics['loss'])
                raise
            if not math.isfinite(val_metrics['loss']):  # the last step may have broken what its loss did not show
                raise RunError(
                    _not_finite(epoch, _updates_per_epoch(args, run.loader_train), val_metrics['loss'], output_dir)
                )
        metric = (val_metrics or train_metrics)[run.eval_metric]
        if saver is not None:
            lrs = [group['lr'] for group in run.optimizer.param_groups]
            utils.update_summary(
                epoch,
                train_metrics,
                val_metrics,
                filename=output_dir / 'summary.csv',
                lr=sum(lrs) / len(lrs),
                log_wandb=args.log_wandb,
            )
            result.best_metric, result.best_epoch = saver.save_checkpoint(epoch, metric=metric)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        result.metrics = {f'train_{k}': v for k, v in train_metrics.items()}
        result.metrics.update({f'eval_{k}': v for k, v in (val_metrics or {}).items()})
        if primary:
            log(epoch, {**result.metrics, 'lr': sum(lrs) / len(lrs)})
            shown = '  '.join(f'{k} {v:.4g}' for k, v in result.metrics.items())
            _logger.info(f'Epoch {epoch}: {shown}')


def check_resumed(args: Namespace, before: Namespace) -> None:
    """Check that a resumed run goes on with the model and the images it had, and take the rest from the checkpoint."""
    source = getattr(before, 'model_source', None)
    if source is not None and ':' in args.model:
        if args.model != source:
            raise UsageError(f'--resume {args.resume!r} is a run of {source}, not of {args.model}')
        # What the folder or repo said is in the checkpoint, so it need not be there any more
        args.model, args.model_source = before.model, source
        told = ('gp', 'bn_momentum', 'bn_eps')
    else:
        told = ()
    if not args.input_size:
        size = getattr(before, 'input_size', None)
        if args.img_size is None:
            told += ('in_chans', 'img_size', 'input_size')
        elif args.in_chans is None:
            args.in_chans = size[0] if size else getattr(before, 'in_chans', None)
    for name in (*told, *PREPROCESSING):
        if not getattr(args, name, None):
            setattr(args, name, getattr(before, name, None))
    if args.model != before.model:
        raise UsageError(f'--resume {args.resume!r} is a checkpoint of {before.model}, not of {args.model}')
    # train.py knows neither a hold-out nor a seed of the sampling
    holdout = getattr(before, 'search_holdout', None) or 0.0
    if args.search_holdout is None:
        args.search_holdout = holdout
    if args.search_holdout != holdout:
        raise UsageError(
            f'--search-holdout {args.search_holdout} differs from the {holdout} that {args.resume!r} was trained with: '
            'the model has seen images that would be held out, or the reverse'
        )
    kwargs = dict(before.model_kwargs)
    if args.model.endswith('_supernet'):
        kwargs.setdefault('seed', 0)
    for key, value in args.model_kwargs.items():
        if kwargs.get(key) != value:
            raise UsageError(
                f'--model-kwargs {key}={value} differs from what {args.resume!r} was trained with ({kwargs.get(key)})'
            )
    args.model_kwargs = kwargs
    args.label_names = getattr(before, 'label_names', None)
    args.origin = getattr(before, 'origin', None)
    args.held_out = getattr(before, 'held_out', None)
    args.start_held_out = getattr(before, 'start_held_out', None)
    if args.opt != before.opt and not args.no_resume_opt:
        raise UsageError(
            f'--opt {args.opt} differs from the {before.opt} of {args.resume!r}, whose state it can not go on with; '
            f'give --opt {before.opt}, --no-resume-opt to go on with a new optimizer, or start anew from the '
            f'weights with --initial-checkpoint {args.resume}'
        )
    if getattr(before, 'model_ema', False) and not args.model_ema:
        raise UsageError(
            f'{args.resume!r} has averaged weights, which a run without --model-ema would drop; give --model-ema, or '
            f'start anew from them with --initial-checkpoint {args.resume}'
        )
    _warn_of_changes(args, before)
    if not args.output and not args.experiment:
        folder = Path(args.resume).resolve().parent
        args.output, args.experiment = str(folder.parent), folder.name
    if not hasattr(before, 'val_split'):
        return
    now, then = _ranked_by(args), _ranked_by(before)
    is_same_folder = Path(args.resume).resolve().parent == run_dir(args.output, args.experiment).resolve()
    if is_same_folder and now != then:
        raise UsageError(
            f'the checkpoints beside {args.resume!r} are ranked by {then}, this run would rank them by {now}: keep '
            '--val-split and --eval-metric, or go on in a folder of its own with another --experiment'
        )


def _ranked_by(args: Namespace) -> str:
    if not getattr(args, 'val_split', ''):
        return 'the training loss'
    return f'{getattr(args, "eval_metric", "top1")} on the validation images'


def _warn_of_changes(args: Namespace, before: Namespace) -> None:
    """Name the options with which a run goes on in another way than it began."""
    # checked above, found out on the way, of no effect on the weights, or what one resumes for
    left_out = {'model', 'model_kwargs', 'search_holdout', 'start_epoch', 'dist_bn'}
    left_out |= {'pretrained', 'pretrained_path', 'warm_start', 'initial_checkpoint'}
    left_out |= {'head_init_scale', 'head_init_bias'}  # of what the checkpoint's weights take the place of
    left_out |= {'val_interval', 'val_split', 'val_num_samples', 'validation_batch_size'}
    left_out |= {'epochs', 'class_map', *LOCAL_OPTIONS}
    # where they are not given, a run finds them out of its model, its images or other options, and keeps what it found
    found_out = {'lr', 'num_classes', 'in_chans', 'img_size', 'input_size', 'input_img_mode', 'gp', *PREPROCESSING}
    of_optimizer = {'lr', 'momentum', 'weight_decay', 'opt_eps', 'opt_betas', 'opt_kwargs', 'layer_decay'}
    changed: dict[str, str] = {}
    for name in sorted(vars(default_args()).keys() - left_out):
        now, then = getattr(args, name, None), getattr(before, name, None)
        if then is None and name in PREPROCESSING:
            continue  # of earlier versions, which did not keep what they found out
        if now is None and name in found_out:
            continue
        # train.py of timm and older versions do not know all names; what they do not know of the teacher they do not do
        if (hasattr(before, name) or name == 'kd_teacher_img_size') and _plain(now) != _plain(then):
            changed[name] = f'--{name.replace("_", "-")} {then} -> {now}'
    if changed:
        kept = ', '.join(f'--{name.replace("_", "-")}' for name in changed if name in of_optimizer)
        note = f'; {kept} of the checkpoint stay in effect unless --no-resume-opt is given' if kept else ''
        if args.no_resume_opt:
            note = ''
        _logger.warning(f'{args.resume!r} was trained with other options: {", ".join(changed.values())}{note}')


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _output_dir(args: Namespace) -> Path:
    name = args.experiment or '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model)])
    output_dir = run_dir(args.output, name)
    last = latest_checkpoint(output_dir)
    if last is not None and not (args.resume and Path(args.resume).resolve().parent == output_dir.resolve()):
        raise UsageError(
            f'{str(output_dir)!r} holds a run already and is not overwritten; go on with it by --resume {last}, or '
            'choose another --experiment or --output'
        )
    return output_dir


def _resolve_lr(args: Namespace) -> None:
    if args.lr is not None:
        return
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def _resume(args: Namespace, task: TrainingTask, optimizer: Any, loss_scaler: Any) -> int | None:
    restore = not args.no_resume_opt
    try:
        resume_epoch = resume_task_checkpoint(
            task,
            args.resume,
            loss_scaler=loss_scaler if restore else None,
            log_info=utils.is_primary(args),
        )
    except (RuntimeError, ValueError, EOFError, OSError) as e:
        raise RunError(
            f'--resume {args.resume!r} does not fit {args.model}: {" ".join(str(e).split())[:300]}'
        ) from None
    if restore and (state := read_checkpoint(args.resume).get('optimizer')) is not None:
        try:
            optimizer.load_state_dict(state)
        except (RuntimeError, ValueError, LookupError) as e:
            raise UsageError(
                f'the state of the optimizer in --resume {args.resume!r} does not fit ({concise(e)}); give --opt, '
                '--weight-decay, --layer-decay and --opt-kwargs as the run had them, or --no-resume-opt to go on with '
                'a new optimizer'
            ) from None
    return resume_epoch


def _start_epoch(args: Namespace, loader: Any, epoch: int) -> None:
    # Seeded by epoch, so that an epoch's data order and augmentation do not depend on the ones before it: that is
    # what makes a resumed run equal to an unbroken one.
    utils.random_seed((args.seed * 1_000_003 + epoch * 7_919) % 2**31, args.rank)
    for owner in (loader, loader.dataset, loader.sampler):
        if hasattr(owner, 'set_epoch'):
            owner.set_epoch(epoch)


def _train_one_epoch(args: Namespace, run: _Run, epoch: int) -> OrderedDict[str, float]:
    task, loader, optimizer, mixup_fn = run.task, run.loader_train, run.optimizer, run.mixup_fn
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
    primary = utils.is_primary(args)
    module = task.get_trainable_module()
    module.train()
    if args.frozen_bn:
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.eval()
    optimizer.zero_grad()

    num_batches = len(loader)
    accum_steps = args.grad_accum_steps
    second_order = getattr(optimizer, 'is_second_order', False)
    last_accum_steps = num_batches % accum_steps or accum_steps
    updates_per_epoch = _updates_per_epoch(args, loader)
    # Behind what a stopped run has seen of the epoch
    seen = run.progress if epoch == run.start_epoch else {}
    first_batch = seen.get('batches', 0)
    num_updates = epoch * updates_per_epoch + seen.get('updates', 0)
    # Stays on the device, reading it would wait for every step
    loss_sum = torch.full((), seen.get('loss_sum', 0.0), device=task.device)
    loss_avg = seen.get('loss_sum', 0.0) / max(first_batch, 1)
    num_samples = 0
    start = time.monotonic()
    progress = progress_bar(updates_per_epoch, f'Epoch {epoch}', leave=False, disable=not primary)
    progress.update(seen.get('updates', 0))
    for batch_index, (input, target) in enumerate(batches_behind(loader, first_batch), first_batch):
        if args.no_prefetcher:
            input, target = input.to(task.device), target.to(task.device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        update_index = batch_index // accum_steps
        last_group = update_index == updates_per_epoch - 1
        steps = last_accum_steps if last_group else accum_steps
        need_update = batch_index + 1 == num_batches or (batch_index + 1) % accum_steps == 0

        with nullcontext() if need_update else task.no_sync():
            with run.autocast(), _in_words(args, len(input)):
                loss = task(input, target)['loss']
            scaled_loss = loss / steps if steps > 1 else loss
            clip_parameters = None
            if args.clip_grad is not None:
                clip_parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            if run.loss_scaler is not None:
                run.loss_scaler(
                    scaled_loss,
                    optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=clip_parameters,
                    create_graph=second_order,
                    need_update=need_update,
                )
            else:
                scaled_loss.backward(create_graph=second_order)
                if need_update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(clip_parameters, value=args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        loss_sum += loss.detach()
        num_samples += input.shape[0] * args.world_size
        if not need_update:
            continue

        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if update_index % args.log_interval == 0 or last_group:
            loss_avg = _mean_over_ranks(args, loss_sum / (batch_index + 1))
            if not math.isfinite(loss_avg):
                raise RunError(_not_finite(epoch, update_index, loss_avg, run.output_dir))
            lr = optimizer.param_groups[0]['lr']
            speed = num_samples / (time.monotonic() - start)
            progress.set_postfix_str(f'loss {loss_avg:.3f}, {speed:.0f} images/s')
            if primary and progress.disable:
                _logger.info(
                    f'Train: {epoch} [{update_index:>4d}/{updates_per_epoch}]  Loss: {loss_avg:#.4g}  '
                    f'LR: {lr:.3e}  {speed:.1f} images/s'
                )
        progress.update()
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=num_updates, metric=None)
        is_due = args.recovery_interval and (update_index + 1) % args.recovery_interval == 0 and not last_group
        if is_due or run.stop.number is not None:
            _recover(args, run, epoch, batch_index + 1, update_index + 1, loss_sum)
    progress.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return OrderedDict(loss=loss_avg)


@contextmanager
def _in_words(args: Namespace, batch_size: int) -> Iterator[None]:
    """Say what is wrong with the images of a step where torch's error does not."""
    try:
        yield
    except ValueError as e:
        if 'more than 1 value per channel' not in str(e):
            raise
        raise UsageError(
            f'a batch of {batch_size} image(s) is too small for batch norms, which see one value per channel '
            f'({concise(e)}); pass a larger --batch-size or --img-size'
        ) from None
    except (IndexError, RuntimeError) as e:  # of a stream nothing tells the classes beforehand
        if 'out of bounds' not in str(e):
            raise
        raise UsageError(
            f"a class index of the images is not one of the model's {args.num_classes} classes ({concise(e)}); pass "
            '--num-classes N'
        ) from None


def _recover(
    args: Namespace, run: _Run, epoch: int, batches: int, updates: int, loss_sum: torch.Tensor | float
) -> None:
    """Write a checkpoint within an epoch, and end if that was asked for.

    Weights are the same in all processes, so the first one writes alone. The others go on until it has left: it may
    wait for them in a step.
    """
    if run.saver is None:
        return
    loss = float(loss_sum)
    if math.isfinite(loss):  # otherwise the checkpoint that there is is the better one
        progress = {name: getattr(args, name) for name in _SHARING}
        progress |= dict(batches=batches, updates=updates, loss_sum=loss, num_batches=len(run.loader_train))
        run.saver.recover(epoch, progress)
    if run.stop.number is not None:
        raise run.stop.stopped(f'behind batch {batches} of epoch {epoch}, which are in {run.output_dir / RECOVERY}')


def _recover_trained(args: Namespace, run: _Run, epoch: int, train_loss: float) -> None:
    """Write a checkpoint of an epoch of which the validation alone is left, see `_recover`."""
    batches = len(run.loader_train)
    _recover(args, run, epoch, batches, _updates_per_epoch(args, run.loader_train), train_loss * batches)


def _not_finite(epoch: int, step: int, loss: float, output_dir: Path | None) -> str:
    last = output_dir / 'last.pth.tar' if output_dir else None
    kept = f'the last good checkpoint is {last}' if last and last.exists() else 'there is no checkpoint yet'
    return (
        f'the loss is {loss} in epoch {epoch}, step {step}: training stops, {kept}; start again with a lower --lr or '
        'with --clip-grad (a --resume keeps the old learning rate unless --no-resume-opt is given)'
    )


def _mean_over_ranks(args: Namespace, value: torch.Tensor) -> float:
    return (utils.reduce_tensor(value, args.world_size) if args.distributed else value).item()


def _validate(args: Namespace, run: _Run, epoch: int, train_loss: float, *, ema: bool) -> OrderedDict[str, float]:
    task, loader = run.task, run.loader_val
    model = task.get_eval_model(ema=ema)
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    with torch.inference_mode():
        for input, target in iterate(loader):
            if run.stop.number is not None:
                _recover_trained(args, run, epoch, train_loss)
            if args.no_prefetcher:
                input, target = input.to(task.device), target.to(task.device)
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with run.autocast():
                output = model(input)
            evaluator.update(output, target)
    return evaluator.compute(distributed=args.distributed)
