"""From a pretrained network of timm to one that fits a budget, on images of one's own."""

import argparse
import json
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader
from timm.models import get_pretrained_cfg

from ..hub.export import save_model
from ..models.backbone import check_backbone, check_weights, describe_origin
from ..models.cost import cost_table, count_macs
from ..models.latency import measure_latency
from ..models.latency_table import LatencyTable
from ..models.pretrained import PREPROCESSING
from ..models.warm_start import warm_start
from ..search.accuracy import evaluate, prepare_device
from ..search.blend import SHARES, inherit_blended, inherit_refitted
from ..search.config import SearchConfig
from ..search.front import print_result
from ..search.images import SearchData
from ..search.pareto import require_pymoo
from ..search.pool import ArchPool, check_limits
from ..search.run import search_checkpoint
from ..train.checkpoint import create_model, load_model, write_checkpoint
from ..train.data import open_dataset
from ..train.loop import train_or_resume
from ..train.options import CPU_KERNELS_HELP, default_args, make_storable
from ..utils.distributed import open_process
from ..utils.errors import UsageError, as_usage_error
from ..utils.numbers import parse_count, parse_float
from ..utils.tables import format_table, write_json
from .common import add_latency_limit, describe_job, from_args, job_folder, setup_logging, user_images

__all__ = ['SUPERNET_EPOCHS', 'AdaptConfig', 'add_adapt', 'run_adapt', 'run_adapt_command']

_logger = logging.getLogger(__name__)

# Epochs of a supernet that is trained, unless told otherwise
SUPERNET_EPOCHS = 5

# A winner that starts with all but so many points of the backbone's top-1 is trained as gently as the backbone was:
# recipes/warm_start/README.md
_NEAR = 3.0


@dataclass(frozen=True)
class AdaptConfig:
    """What to adapt to what.

    Attributes:
        backbone: Network of timm, see `timm_mixpath.list_backbones`.
        backbone_weights: File of its weights, those that timm has on the Hub if None.
        data_dir: Root of an image data set with a training and a validation split.
        dataset: Type and name as in timm.
        train_split: Training split; a tenth of it scores archs in the search and trains nothing.
        val_split: Validation split, for the final accuracies only.
        dataset_download: Download the data set where timm can.
        img_size: Size that the images are brought to, in pixels; the backbone's if None.
        max_macs: Limit of the search, for images of `img_size`.
        max_params: Limit of the search.
        max_latency: Limit of the search, in milliseconds per batch of the latency table.
        latency_table: File of a `LatencyTable` of the space around the backbone.
        m: Largest number of paths that are summed.
        finetune_epochs: Epochs of the backbone.
        winner_epochs: Epochs of the winner; the less it costs than the backbone, the more it gains by them. 0 for none:
            what the backbone's features give it by least squares.
        supernet_epochs: Epochs of the supernet, 0 to search it as it starts. None takes 0 where the backbone is outside
            the limits, `SUPERNET_EPOCHS` where it is inside them: at the start nothing is better than the backbone, and
            kernels that are larger compute the same.
        batch_size: Images per step.
        generations: Generations of the search.
        num_images: Number of images to score archs with, at most.
        recalibration_images: Training images to recalibrate the batch norms of every candidate with, 0 for none.
        refit_images: Training images on which the blocks of the winner are brought near the backbone's before
            it is trained, see `timm_mixpath.refit`, 0 for none; not behind a supernet that was trained.
        lr: Learning rate of AdamW for the supernet and the winner; a quarter of it for the backbone, and for a winner
            that starts within 3 points of the backbone's top-1.
        distill: The fine-tuned backbone teaches the supernet and the winner.
        seed: Seed of everything.
        reuse: Folder of an earlier job with the same images and the same training of the backbone, which is used, as is
            a supernet that was trained for as many epochs. What follows is done again, for another limit.
        workers: Processes that load images.
        device: Device, the GPU if there is one and None is given.
        cpu_kernels: Train with faster gradients on the CPU, see `models.cpu_kernels`.
    """

    backbone: str
    backbone_weights: str | None = None
    data_dir: str | None = None
    dataset: str = ''
    train_split: str = 'train'
    val_split: str = 'validation'
    dataset_download: bool = False
    img_size: int | None = None
    max_macs: int | None = None
    max_params: int | None = None
    max_latency: float | None = None
    latency_table: str | None = None
    m: int = 2
    finetune_epochs: int = 3
    winner_epochs: int = 8
    supernet_epochs: int | None = None
    batch_size: int = 32
    generations: int = 10
    num_images: int = 500
    recalibration_images: int = 256
    refit_images: int = 512
    lr: float = 1e-3
    distill: bool = True
    seed: int = 0
    reuse: str | None = None
    workers: int = 2
    device: str | None = None
    cpu_kernels: bool = False


def run_adapt(config: AdaptConfig, output: str | os.PathLike) -> Path:
    """Fine-tune a backbone, search around it, fine-tune the winner and compare the two.

    The supernet starts as an exact copy of the fine-tuned backbone. To find smaller networks it is searched as it is;
    with `supernet_epochs` it is trained first, and what the winner inherits is blended with what it started from
    (`search.blend`). The backbone teaches the supernet and the winner. A job that was cut off goes on where it stopped.

    Args:
        config: What to do.
        output: Folder for `backbone/`, `supernet/`, `search/`, `inherited/`, `winner/`, `model/` and `summary.json`;
            without `backbone/` and `supernet/` where another job's are used.

    Returns:
        The model folder of the winner, for `timm.create_model('local-dir:...', pretrained=True)`.

    Raises:
        UsageError: The backbone or the data does not exist, a value is out of range, a limit excludes every arch, or
            the output belongs to another job.
        RunError: There are no weights, a training failed, or files can't be read or written.
    """
    require_pymoo()  # not after minutes of training
    check_backbone(config.backbone)
    if config.backbone_weights:
        check_weights(config.backbone, config.backbone_weights)
    if config.data_dir is None and not config.dataset:
        raise UsageError('no images: pass --data-dir DIR with train/ and validation/, or --dataset NAME')
    # The search would find its own only behind hours of training
    at_least = dict.fromkeys(('img_size', 'finetune_epochs', 'batch_size', 'num_images'), 1)
    at_least |= dict.fromkeys(('recalibration_images', 'refit_images', 'supernet_epochs', 'winner_epochs'), 0)
    for option, least in at_least.items():
        if (number := getattr(config, option)) is not None and number < least:
            raise UsageError(f'--{option.replace("_", "-")} {number} must be at least {least}')
    if not 0 < config.lr < math.inf:
        raise UsageError(f'--lr {config.lr} must be a positive number')
    search_config = SearchConfig(
        population=24,
        offspring=12,
        generations=config.generations,
        # Around a backbone the loss ranks archs of equal cost better than the error does: recipes/ranking/README.md
        objectives={'loss': 1.0, 'latency' if config.latency_table else 'macs': 1.0},
        max_macs=config.max_macs,
        max_params=config.max_params,
        max_latency=config.max_latency,
        seed=config.seed,
    )
    images, classes, num_images = user_images(config, config.data_dir)
    pretrained_cfg = get_pretrained_cfg(config.backbone)
    size = pretrained_cfg.input_size[1] if config.img_size is None else config.img_size
    name = config.backbone.partition('.')[0]
    kwargs = dict(backbone=name, m=config.m)
    finetuning = dict(lr=config.lr / 4)
    # A new classifier of timm's usual size sends large gradients into what is pretrained
    head = {} if len(classes) == pretrained_cfg.num_classes else dict(head_init_scale=0.01, head_init_bias=0.0)
    supernet = timm.create_model('mixpath_supernet', num_classes=len(classes), device='meta', **kwargs)
    with as_usage_error(f'image size {size} is out of range'):
        table = cost_table(supernet, (3, size, size))
    own_arch = supernet.space.default_arch
    own_macs = table.macs(own_arch)
    low, high = table.bounds('macs')
    latency = None
    if config.latency_table:
        latency = LatencyTable.load(config.latency_table)
        latency.add_to(table)
    check_limits(search_config, table)
    if config.supernet_epochs is None:
        is_within = ArchPool(supernet.space, table, search_config).violation(own_arch) == 0
        config = replace(config, supernet_epochs=SUPERNET_EPOCHS if is_within else 0)
    if not config.supernet_epochs and not config.recalibration_images:
        raise UsageError(
            '--recalibration-images 0 leaves archs of a supernet that is not trained near chance, so nothing can be '
            f'chosen; recalibrate, or train it with --supernet-epochs {SUPERNET_EPOCHS}'
        )
    reused = _reused(config, Path(config.reuse)) if config.reuse else {}
    _logger.info(
        f'{config.backbone} has {own_macs / 1e6:.1f} M MACs at {size}x{size} pixels, the networks around it '
        f'{low / 1e6:.1f} to {high / 1e6:.1f} M'
    )
    if config.max_macs and (smaller := _smaller_images(name, len(classes), size, config.max_macs)):
        _logger.info(
            f'With images of {smaller}x{smaller} pixels the backbone itself has less than {config.max_macs / 1e6:g} M '
            f'MACs: where details matter little, an --img-size of {smaller} or a little more is the better way there'
        )

    with job_folder(output, config, 'adapt.json') as output:
        # The supernet and the winner know the name of the backbone only, not the tag, whose preprocessing may differ
        images |= dict(mean=list(pretrained_cfg.mean), std=list(pretrained_cfg.std))
        images |= dict(interpolation=pretrained_cfg.interpolation, crop_pct=pretrained_cfg.crop_pct)
        images |= dict(crop_mode=pretrained_cfg.crop_mode)
        images |= dict(num_classes=len(classes), img_size=size)
        job = _Job(config, output, images, classes, latency, reused)
        stages = _Stages(_shares(config, num_images))
        with stages('Fine-tuning the backbone'):
            # A file of weights is of no tag
            model, weights = (name, config.backbone_weights) if config.backbone_weights else (config.backbone, '')
            backbone = job.train(
                'backbone',
                model=model,
                pretrained=True,
                pretrained_path=weights,
                epochs=config.finetune_epochs,
                **finetuning,
                **head,
            )
            teacher = job.save(job.checkpoint('backbone'), job.folder('backbone') / 'model')
        made = 'Training the supernet, which starts as' if config.supernet_epochs else 'Making the supernet,'
        with stages(f'{made} a copy of it'):
            checkpoint = job.supernet(teacher, kwargs)
        with stages('Searching'):
            result = search_checkpoint(
                checkpoint,
                output / 'search',
                search_config,
                SearchData(num_images=config.num_images),
                recalibration_images=config.recalibration_images,
                workers=config.workers,
                device=config.device,
                latency_table=config.latency_table,
            )
        arch = str(result.chosen.arch)
        if result.chosen.arch == own_arch:
            advice = '' if config.supernet_epochs else f'; --supernet-epochs {SUPERNET_EPOCHS} looks beyond it'
            _logger.warning(
                f'The search chose the backbone itself, of what it tried nothing scored better: a lower limit makes it '
                f'look for smaller networks{advice}'
            )
        with stages('Fine-tuning the winner' if config.winner_epochs else 'Making the winner'):
            trained = inherited = job.inherit(arch, checkpoint, teacher)
            if config.winner_epochs:
                is_near = backbone - (100 - result.chosen.error) < _NEAR
                winner = job.train(
                    'winner',
                    model='mixpath',
                    model_kwargs=dict(backbone=name, arch=arch),
                    initial_checkpoint=str(inherited / 'model.safetensors'),
                    epochs=config.winner_epochs,
                    **(finetuning if is_near else {}),
                    **job.distillation,
                )
                trained = job.checkpoint('winner')
            else:
                winner = job.validate(inherited)
            folder = job.save(trained, output / 'model', teacher)

        rows = [
            job.row(f'{config.backbone}, fine-tuned', job.checkpoint('backbone'), backbone),
            job.row('winner', trained, winner),
        ]
        write_json(output / 'summary.json', dict(arch=arch, input_size=[3, size, size], rows=rows))
        print()
        print_result(result, output / 'search')
        print(f'\n{_format(rows, size, config, latency)}')
        print(f"\ntimm.create_model('local-dir:{folder}', pretrained=True)  # after `import timm, timm_mixpath`")
        return folder


# Options on which the training of the supernet depends, but not that of the backbone
_OF_THE_SUPERNET = ('supernet_epochs', 'm', 'distill')

# Options that may differ between a job and the one whose backbone it uses
_NOT_OF_THE_BACKBONE = frozenset({
    'max_macs', 'max_params', 'max_latency', 'latency_table', 'generations', 'num_images', 'recalibration_images',
    'refit_images', 'reuse', 'workers', 'device', 'cpu_kernels', 'winner_epochs', *_OF_THE_SUPERNET,
})  # fmt: skip


def _reused(config: AdaptConfig, folder: Path) -> dict[str, Path]:
    """Check that a job can go on from what another one trained; return the folders of the trainings that it takes."""
    mine, jobs = describe_job(asdict(config)), {}
    while folder not in jobs:
        try:
            jobs[folder] = describe_job(json.loads((folder / 'adapt.json').read_text()))
        except (OSError, ValueError):
            raise UsageError(f'--reuse {str(folder)!r} is not the output folder of an adapt job') from None
        folder = Path(jobs[folder].get('reuse') or folder)  # of which it took what it did not train itself
    for name in mine:
        if name not in _NOT_OF_THE_BACKBONE and (other := jobs[folder].get(name)) != mine[name]:
            raise UsageError(
                f'--reuse {str(folder)!r} has another {name} ({other!r}, now {mine[name]!r}), and so another backbone'
            )
    reused = {'backbone': folder / 'backbone'}
    for folder, other in jobs.items():
        if (folder / 'supernet').exists() and all(other.get(name) == mine[name] for name in _OF_THE_SUPERNET):
            return {**reused, 'supernet': folder / 'supernet'}
    return reused


class _Job:
    """The trainings of a job, with what they share."""

    def __init__(
        self,
        config: AdaptConfig,
        output: Path,
        images: dict[str, Any],
        classes: list[str],
        latency: LatencyTable | None,
        reused: dict[str, Path],
    ) -> None:
        self.config = config
        self.classes = classes
        self.reused = reused
        self.latency = latency
        self.output = output
        self.common = dict(
            **images,
            search_holdout=0.1,
            batch_size=config.batch_size,
            device=config.device,
            workers=config.workers,
            seed=config.seed,
            channels_last=True,
            cpu_kernels=config.cpu_kernels,
            opt='adamw',
            lr=config.lr,
            weight_decay=0.02,
            clip_grad=5.0,
            sched_on_updates=True,
            warmup_epochs=0.2,
            smoothing=0.0,
            scale=[0.5, 1.0],
            color_jitter=0.0,
            train_interpolation='bilinear',
            checkpoint_hist=1,
            log_interval=50,
        )
        self.distillation: dict[str, Any] = {}
        if config.distill:
            self.distillation = dict(kd_model_name=f'local-dir:{self.folder("backbone") / "model"}')

    def folder(self, experiment: str) -> Path:
        """Where a training is, in this job's folder or in that of the job that is reused."""
        own = self.output / experiment
        # What the other job gets only later does not take the place of what this one has begun
        return own if own.exists() else self.reused.get(experiment, own)

    def checkpoint(self, experiment: str) -> Path:
        return self.folder(experiment) / 'last.pth.tar'

    def train(self, experiment: str, **options: Any) -> float:
        """Train, or go on; return the validation accuracy of the last epoch in percent."""
        place = dict(output=str(self.folder(experiment).parent), experiment=experiment)
        args: Namespace = default_args(**{**self.common, **options, **place})
        args.val_interval = args.epochs
        return float(train_or_resume(args)['eval_top1'])

    def supernet(self, teacher: Path, kwargs: dict[str, Any]) -> Path:
        """Train the supernet, or make what it starts as; return its checkpoint."""
        options = dict(model='mixpath_supernet', model_kwargs=kwargs)
        path = self.checkpoint('supernet')
        if self.config.supernet_epochs:
            start = dict(pretrained=True, pretrained_path=str(teacher / 'model.safetensors'))
            self.train('supernet', epochs=self.config.supernet_epochs, **options, **start, **self.distillation)
        elif not path.exists():
            args: Namespace = default_args(**self.common, **options)
            make_storable(args)
            args.label_names = self.classes
            model = create_model(args)
            warm_start(model, timm.create_model(f'local-dir:{teacher}', pretrained=True))
            path.parent.mkdir(exist_ok=True)
            write_checkpoint(path, model, args)
        return path

    def inherit(self, arch: str, checkpoint: Path, teacher: Path) -> Path:
        """Write the model folder of what an arch inherits, made the best of."""
        folder, config = self.output / 'inherited', self.config
        if not folder.exists():
            source = timm.create_model(f'local-dir:{teacher}', pretrained=True)
            common: dict[str, Any] = dict(workers=config.workers, device=config.device)
            common['data'] = SearchData(num_images=config.num_images)
            if not config.supernet_epochs and config.refit_images:
                blend = inherit_refitted(checkpoint, arch, source, num_images=config.refit_images, **common)
            else:
                shares = SHARES if config.supernet_epochs else SHARES[:1]
                common['recalibration_images'] = config.recalibration_images
                blend = inherit_blended(checkpoint, arch, source, shares=shares, **common)
            save_model(blend.model, folder, blend.loaded.data_config, blend.loaded.label_names)
        return folder

    def validate(self, folder: Path) -> float:
        """Top-1 of a model folder on the validation split, in percent."""
        loaded, config = load_model(folder), self.config
        data_config = {key: loaded.data_config[key] for key in ('input_size', *PREPROCESSING)}
        split = open_dataset(config.dataset, config.data_dir or '', config.val_split, download=config.dataset_download)
        with open_process(config.device) as process:
            model = loaded.model.to(device=process.device, memory_format=torch.channels_last)
            size, _ = prepare_device(process.device, None, None)
            how: dict[str, Any] = dict(is_training=False, use_prefetcher=False, num_workers=config.workers)
            loader = create_loader(split, batch_size=size, **data_config, **how)
            return evaluate(model, ((x.to(process.device), y.to(process.device)) for x, y in loader))['top1']

    def save(self, trained: Path, folder: Path, source: Path | None = None) -> Path:
        """Write the model folder of a checkpoint or another folder, whose weights go back to those of `source`."""
        if not folder.exists():
            loaded = load_model(trained)
            before = load_model(source).model.pretrained_cfg if source else loaded.model.pretrained_cfg
            origin = describe_origin(self.config.backbone, self.config.backbone_weights or '')
            notes = tuple(dict.fromkeys((origin, *(before.get('notes') or ()))))
            loaded.model.pretrained_cfg = {**loaded.model.pretrained_cfg, 'notes': notes}
            save_model(loaded.model, folder, loaded.data_config, loaded.label_names)
        return folder

    def row(self, name: str, trained: Path, top1: float) -> dict[str, Any]:
        loaded = load_model(trained)
        size = loaded.data_config['input_size']
        how: dict[str, Any] = dict(channels_last=True)
        if (table := self.latency) is not None:
            how = dict(runtime=table.runtime, num_threads=table.threads, batch_size=table.batch_size)
        return dict(
            name=name,
            top1=round(top1, 2),
            macs=sum(count_macs(loaded.model, size).values()),
            params=sum(p.numel() for p in loaded.model.parameters()),
            latency_ms=round(measure_latency(loaded.model, input_size=size, **how), 2),
        )


def _smaller_images(name: str, num_classes: int, size: int, max_macs: int) -> int | None:
    """Largest size of images below `size` with which a network is within a limit; None if it is with `size`."""
    network = timm.create_model(name, num_classes=num_classes, device='meta').eval()
    for smaller in (size, *range((size - 1) // 16 * 16, 31, -16)):
        if sum(count_macs(network, (3, smaller, smaller)).values()) <= max_macs:
            return smaller if smaller < size else None
    return None


class _Stages:
    """Numbers the stages of a job, and says how long the rest may take.

    Args:
        shares: Expected duration of every stage, in any unit.
    """

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares
        self.index = 0
        self.elapsed = 0.0  # of the stages that took their time, not of those that were done before
        self.counted = 0.0

    @contextmanager
    def __call__(self, text: str) -> Iterator[None]:
        """The next stage, called `text`, runs in the context."""
        rest = ''
        if self.counted:
            seconds = self.elapsed / self.counted * sum(self.shares[self.index :])
            rest = f' (about {max(1, round(seconds / 60))} min to the end)'
        share = self.shares[self.index]
        self.index += 1
        _logger.info(f'{self.index}/{len(self.shares)} {text}{rest}')
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        if seconds > 2:
            self.elapsed += seconds
            self.counted += share


def _shares(config: AdaptConfig, num_images: int) -> list[float]:
    """Expected durations in forward passes of one image; a training step is about three."""
    evaluations = 24 + 12 * config.generations
    per_arch = min(config.num_images, num_images // 10) + config.recalibration_images
    teaching = 1 if config.distill else 0
    return [
        config.finetune_epochs * num_images * 3,
        config.supernet_epochs * num_images * (3 + teaching),
        evaluations * per_arch,
        config.winner_epochs * num_images * (3 + teaching),
    ]


def _format(rows: list[dict[str, Any]], size: int, config: AdaptConfig, latency: LatencyTable | None) -> str:
    header = ('', 'top-1 (%)', 'MACs (M)', 'params (M)', 'ms')
    cells = [
        (
            r['name'],
            f'{r["top1"]:.2f}',
            f'{r["macs"] / 1e6:.1f}',
            f'{r["params"] / 1e6:.3f}',
            f'{r["latency_ms"]:.2f}',
        )
        for r in rows
    ]
    behind = f' behind {config.supernet_epochs} epochs of its supernet' if config.supernet_epochs else ''
    winner = f'for {config.winner_epochs}{behind}' if config.winner_epochs else f'not at all{behind}'
    where = f'{torch.get_num_threads()} thread(s)' if latency is None else f'as the latency table: {latency.describe()}'
    return (
        f'{format_table([header, *cells], "<>")}\n'
        f'top-1 on the validation split; MACs for one image of {size}x{size} pixels; ms measured on this machine, '
        f'{where}. On the same images the backbone was fine-tuned for {config.finetune_epochs} epochs, the winner '
        f'{winner}.'
    )


def add_adapt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--backbone', required=True, metavar='NAME', help='network of timm, for example mobilenetv3_large_100')
    add('--backbone-weights', metavar='FILE', help='its weights as timm has them (default: downloaded)')
    add('--output', required=True, metavar='DIR', help='output folder')
    add('--data-dir', metavar='DIR', help='your images, in train/CLASS/ and validation/CLASS/')
    add('--dataset', default='', metavar='NAME', help='type/name as in timm')
    add('--train-split', default='train', metavar='NAME')
    add('--val-split', default='validation', metavar='NAME')
    add('--dataset-download', action='store_true', help='download torch/ data sets')
    add('--img-size', type=int, metavar='N', help="pixels (default: the backbone's)")
    add('--max-macs', type=parse_count, metavar='N', help='limit of the search, for example 200M')
    add('--max-params', type=parse_count, metavar='N')
    add_latency_limit(parser)
    add('--m', type=int, default=2, metavar='N', help='largest number of paths that are summed (default: 2)')
    add('--finetune-epochs', type=int, default=3, metavar='N', help='of the backbone (default: 3)')
    add('--winner-epochs', type=int, default=8, metavar='N', help='of the winner, 0 for none (default: 8)')
    add(
        '--supernet-epochs',
        type=int,
        metavar='N',
        help='train the supernet before it is searched (default: 0, search it as it starts, where the backbone is '
        f'outside the limits, else {SUPERNET_EPOCHS})',
    )
    add('-b', '--batch-size', type=int, default=32, metavar='N', help='images per step (default: 32)')
    add('--generations', type=int, default=10, metavar='N', help='generations of the search (default: 10)')
    add('--num-images', type=parse_count, default=500, metavar='N', help='images to score archs with (default: 500)')
    add('--recalibration-images', type=parse_count, default=256, metavar='N', help='0 for none (default: 256)')
    add(
        '--refit-images',
        type=parse_count,
        default=512,
        metavar='N',
        help="to bring the winner's features near the backbone's with, 0 for none (default: 512)",
    )
    add(
        '--lr',
        type=parse_float,
        default=1e-3,
        help='learning rate of supernet and winner, four times that of the backbone and of a winner that is nearly as '
        'good from the start (default: 0.001)',
    )
    add('--no-distill', dest='distill', action='store_false', help='the backbone teaches neither supernet nor winner')
    add('--seed', type=int, default=0)
    add(
        '--reuse',
        metavar='DIR',
        help='take the backbone of this earlier job, and its supernet if trained alike, for another limit',
    )
    add('-j', '--workers', type=int, default=2, metavar='N')
    add('--device', metavar='NAME')
    add('--cpu-kernels', action='store_true', help=CPU_KERNELS_HELP)


def run_adapt_command(args: argparse.Namespace) -> None:
    setup_logging()
    run_adapt(from_args(AdaptConfig, args), args.output)
