"""From a pretrained network of timm to one that fits a budget, on images of one's own."""

import argparse
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader
from timm.models import get_pretrained_cfg
from torch import nn

from ..hub.export import save_model
from ..models.backbone import describe_origin
from ..models.cost import count_macs
from ..models.latency import measure_latency
from ..models.latency_table import LatencyTable
from ..models.pretrained import PREPROCESSING
from ..models.warm_start import warm_start
from ..search.accuracy import evaluate, prepare_device
from ..search.blend import SHARES, Blend, inherit_blended, inherit_refitted
from ..search.config import SearchConfig
from ..search.front import print_result
from ..search.images import SearchData
from ..search.pareto import require_pymoo
from ..search.result import SearchResult
from ..search.run import search_checkpoint
from ..spaces.arch import Arch
from ..spaces.backbone import BackboneSpace
from ..train.checkpoint import create_model, load_model, read_checkpoint, write_checkpoint
from ..train.loop import train_or_resume
from ..train.options import CPU_KERNELS_HELP, default_args, make_storable
from ..utils.distributed import open_process
from ..utils.errors import UsageError
from ..utils.numbers import parse_count, parse_float, parse_share
from ..utils.precision import add_amp_options
from ..utils.tables import format_table, read_csv, write_json
from .adapt_config import AdaptConfig, as_begun, check_config, find_reused
from .adapt_plan import SizedSearch, is_backbone_alone, plan_searches, share_evaluations
from .common import (
    add_latency_limit,
    add_user_images,
    check_single_process,
    from_args,
    job_folder,
    open_user_images,
    setup_logging,
    user_images,
)

__all__ = ['SUPERNET_EPOCHS', 'AdaptConfig', 'add_adapt', 'run_adapt', 'run_adapt_command']

_logger = logging.getLogger(__name__)

# Epochs of a supernet that is trained, unless told otherwise
SUPERNET_EPOCHS = 5

# A winner that has all but so many points of the backbone's top-1 in the search, before it is fitted, is trained as
# gently as the backbone was: recipes/warm_start/README.md
_NEAR = 5.0


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
    check_single_process('adapt')
    check_config(config)
    config = as_begun(config, output)
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
    name = config.backbone.partition('.')[0]
    kwargs = dict(backbone=name, m=config.m)
    finetuning = dict(lr=config.lr / 4)
    # A new classifier of timm's usual size sends large gradients into what is pretrained
    head = {} if len(classes) == pretrained_cfg.num_classes else dict(head_init_scale=0.01, head_init_bias=0.0)
    supernet = timm.create_model('mixpath_supernet', num_classes=len(classes), device='meta', **kwargs)
    latency = LatencyTable.load(config.latency_table) if config.latency_table else None
    part = supernet.space.without_more() if config.reduce_only and not config.supernet_epochs else None
    searches = plan_searches(supernet, config.backbone, config.sizes, search_config, config.search_floor, latency, part)
    if config.supernet_epochs is None:
        config = replace(config, supernet_epochs=SUPERNET_EPOCHS if is_backbone_alone(searches) else 0)
    if not config.supernet_epochs and not config.recalibration_images:
        raise UsageError(
            '--recalibration-images 0 leaves archs of a supernet that is not trained near chance, so nothing can be '
            f'chosen; recalibrate, or train it with --supernet-epochs {SUPERNET_EPOCHS}'
        )
    searches = share_evaluations(searches, is_trained=config.supernet_epochs > 0)
    reused = find_reused(config, Path(config.reuse)) if config.reuse else {}

    with job_folder(output, config, 'adapt.json') as output:
        # The supernet and the winner know the name of the backbone only, not the tag, whose preprocessing may differ
        images |= dict(mean=list(pretrained_cfg.mean), std=list(pretrained_cfg.std))
        images |= dict(interpolation=pretrained_cfg.interpolation, crop_pct=pretrained_cfg.crop_pct)
        images |= dict(crop_mode=pretrained_cfg.crop_mode)
        images |= dict(num_classes=len(classes), img_size=config.sizes[-1])
        job = _Job(config, output, images, classes, latency, searches, reused)
        stages = _Stages(_shares(config, searches, num_images))
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
            if config.supernet_epochs:
                part = None
            results = {search.img_size: job.search(search, checkpoint, part) for search in searches}
        with stages('Fine-tuning the winner' if config.winner_epochs else 'Making the winner'):
            inherited, size = job.inherit(results, checkpoint, teacher)
            result = results[size]
            arch = str(result.chosen.arch)
            if result.chosen.arch == supernet.space.default_arch and is_backbone_alone(searches):
                advice = '' if config.supernet_epochs else f'; --supernet-epochs {SUPERNET_EPOCHS} looks beyond it'
                _logger.warning(
                    f'The search chose the backbone itself, of what it tried nothing scored better: a lower limit '
                    f'makes it look for smaller networks{advice}'
                )
            trained = inherited
            if config.winner_epochs:
                is_near = backbone - (100 - result.chosen.error) < _NEAR
                winner = job.train(
                    'winner',
                    model='mixpath',
                    model_kwargs=dict(backbone=name, arch=arch),
                    img_size=size,
                    initial_checkpoint=str(inherited / 'model.safetensors'),
                    epochs=config.winner_epochs,
                    **(finetuning if is_near else {}),
                    **job.distillation(size),
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
        print_result(result, job.search_folder(size))
        print(f'\n{_format(rows, config, latency)}')
        print(f"\ntimm.create_model('local-dir:{folder}', pretrained=True)  # after `import timm, timm_mixpath`")
        return folder


class _Job:
    """The trainings of a job, with what they share."""

    def __init__(
        self,
        config: AdaptConfig,
        output: Path,
        images: dict[str, Any],
        classes: list[str],
        latency: LatencyTable | None,
        searches: list[SizedSearch],
        reused: dict[str, Path],
    ) -> None:
        self.config = config
        self.classes = classes
        self.reused = reused
        self.latency = latency
        self.searches = searches
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
            amp=config.amp,
            amp_dtype=config.amp_dtype,
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

    def distillation(self, img_size: int) -> dict[str, Any]:
        """Return the options by which the backbone teaches a network; it gets images that are smaller enlarged."""
        if not self.config.distill:
            return {}
        options: dict[str, Any] = dict(kd_model_name=f'local-dir:{self.folder("backbone") / "model"}')
        if img_size < self.common['img_size']:
            options['kd_teacher_img_size'] = self.common['img_size']
        return options

    def folder(self, experiment: str) -> Path:
        """Where a training is, in this job's folder or in that of the job that is reused."""
        own = self.output / experiment
        # What the other job gets only later does not take the place of what this one has begun
        return own if own.exists() else self.reused.get(experiment, own)

    def checkpoint(self, experiment: str) -> Path:
        return self.folder(experiment) / 'last.pth.tar'

    def train(self, experiment: str, **options: Any) -> float:
        """Train, or go on; return the validation accuracy of the last epoch in percent."""
        if (folder := self.folder(experiment)) != self.output / experiment:
            # It has ended, and may be where nothing can be written
            return float(read_csv(folder / 'summary.csv')[-1]['eval_top1'])
        place = dict(output=str(self.output), experiment=experiment)
        args: Namespace = default_args(**{**self.common, **options, **place})
        args.val_interval = args.epochs
        return float(train_or_resume(args)['eval_top1'])

    def supernet(self, teacher: Path, kwargs: dict[str, Any]) -> Path:
        """Train the supernet, or make what it starts as; return its checkpoint."""
        options: dict[str, Any] = dict(model='mixpath_supernet', model_kwargs=kwargs)
        path = self.checkpoint('supernet')
        if self.config.supernet_epochs:
            start = dict(pretrained=True, pretrained_path=str(teacher / 'model.safetensors'))
            options |= {**start, **self.distillation(self.common['img_size'])}
            self.train('supernet', epochs=self.config.supernet_epochs, **options)
        elif not path.exists():
            args: Namespace = default_args(**self.common, **options)
            make_storable(args)
            args.label_names = self.classes
            # What it knows it has from the backbone
            args.held_out = getattr(read_checkpoint(self.checkpoint('backbone'))['args'], 'held_out', None)
            model = create_model(args)
            warm_start(model, timm.create_model(f'local-dir:{teacher}', pretrained=True))
            path.parent.mkdir(exist_ok=True)
            write_checkpoint(path, model, args)
        return path

    def search_folder(self, img_size: int) -> Path:
        """Where the search with images of a size is."""
        folder = self.output / 'search'
        return folder if len(self.searches) == 1 else folder / str(img_size)

    def search(self, search: SizedSearch, checkpoint: Path, part: BackboneSpace | None) -> SearchResult:
        """Search with images of one size, the whole space or a part of it, or go on."""
        return search_checkpoint(
            checkpoint,
            self.search_folder(search.img_size),
            search.config,
            SearchData(num_images=self.config.num_images),
            img_size=search.img_size,
            recalibration_images=self.config.recalibration_images,
            workers=self.config.workers,
            device=self.config.device,
            amp_dtype=self.config.amp_dtype if self.config.amp else None,
            latency_table=self.config.latency_table,
            space=part,
        )

    def inherit(self, results: dict[int, SearchResult], checkpoint: Path, teacher: Path) -> tuple[Path, int]:
        """Write the model folder of what a chosen arch inherits, made the best of.

        Args:
            results: Searches by the size of their images. The size is taken that gives the lowest loss.
            checkpoint: Supernet that was searched.
            teacher: Model folder of the backbone that it started from.

        Returns:
            The folder, and the size in pixels.
        """
        folder = self.output / 'inherited'
        if not folder.exists():
            source = timm.create_model(f'local-dir:{teacher}', pretrained=True)
            best: Blend | None = None
            for size, result in results.items():
                if len(results) > 1:
                    _logger.info(f'{size}x{size} pixels: {result.chosen.macs / 1e6:.1f} M MACs, {result.chosen.arch}')
                blend = self._blend(result.chosen.arch, size, checkpoint, source)
                if best is None or blend.score['loss'] < best.score['loss']:
                    best = blend
            if len(results) > 1:
                pixels = best.loaded.data_config['input_size'][1]
                _logger.info(f'Images of {pixels}x{pixels} pixels give the lowest loss')
            save_model(best.model, folder, best.loaded.data_config, best.loaded.label_names)
        return folder, load_model(folder).data_config['input_size'][1]

    def _blend(self, arch: Arch, img_size: int, checkpoint: Path, source: nn.Module) -> Blend:
        config = self.config
        common: dict[str, Any] = dict(workers=config.workers, device=config.device, img_size=img_size)
        common['data'] = SearchData(num_images=config.num_images)
        if not config.supernet_epochs and config.refit_images:
            return inherit_refitted(checkpoint, arch, source, num_images=config.refit_images, **common)
        shares = SHARES if config.supernet_epochs else SHARES[:1]
        common['recalibration_images'] = config.recalibration_images
        return inherit_blended(checkpoint, arch, source, shares=shares, **common)

    def validate(self, folder: Path) -> float:
        """Top-1 of a model folder on the validation split, in percent."""
        loaded, config = load_model(folder), self.config
        data_config = {key: loaded.data_config[key] for key in ('input_size', *PREPROCESSING)}
        split = open_user_images(self.common, config.val_split)
        with open_process(config.device) as process:
            model = loaded.model.to(device=process.device, memory_format=torch.channels_last)
            size, autocast = prepare_device(process.device, None, config.amp_dtype if config.amp else None)
            how: dict[str, Any] = dict(is_training=False, use_prefetcher=False, num_workers=config.workers)
            loader = create_loader(split, batch_size=size, **data_config, **how)
            batches = ((x.to(process.device), y.to(process.device)) for x, y in loader)
            return evaluate(model, batches, autocast=autocast)['top1']

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
        macs = sum(count_macs(loaded.model, size).values())
        how: dict[str, Any] = dict(channels_last=True)
        if (table := self.latency) is not None and not table.why_not_here():
            how = dict(runtime=table.runtime, num_threads=table.threads, batch_size=table.batch_size)
            loaded.model.to(table.device)
        return dict(
            name=name,
            img_size=size[1],
            top1=round(top1, 2),
            macs=macs,
            params=sum(p.numel() for p in loaded.model.parameters()),
            latency_ms=round(measure_latency(loaded.model, input_size=size, **how), 2),
        )


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


def _shares(config: AdaptConfig, searches: list[SizedSearch], num_images: int) -> list[float]:
    """Expected durations in forward passes of one image; a training step is about three."""
    # The search is with images of the size that the backbone has, or smaller ones
    pixels = config.sizes[-1] ** 2
    evaluations = sum(search.config.num_evaluations * search.img_size**2 / pixels for search in searches)
    per_arch = min(config.num_images, num_images // 10) + config.recalibration_images
    teaching = 1 if config.distill else 0
    return [
        config.finetune_epochs * num_images * 3,
        config.supernet_epochs * num_images * (3 + teaching),
        evaluations * per_arch,
        config.winner_epochs * num_images * (3 + teaching),
    ]


def _format(rows: list[dict[str, Any]], config: AdaptConfig, latency: LatencyTable | None) -> str:
    header = ('', 'pixels', 'top-1 (%)', 'MACs (M)', 'params (M)', 'ms')
    cells = [
        (
            r['name'],
            str(r['img_size']),
            f'{r["top1"]:.2f}',
            f'{r["macs"] / 1e6:.1f}',
            f'{r["params"] / 1e6:.3f}',
            f'{r["latency_ms"]:.2f}',
        )
        for r in rows
    ]
    behind = f' behind {config.supernet_epochs} epochs of its supernet' if config.supernet_epochs else ''
    winner = f'for {config.winner_epochs}{behind}' if config.winner_epochs else f'not at all{behind}'
    where = f'{torch.get_num_threads()} thread(s)'
    if latency is not None and (reason := latency.why_not_here()):
        where += f' (not as the latency table: {reason})'
    elif latency is not None:
        where = f'as the latency table: {latency.describe()}'
    return (
        f'{format_table([header, *cells], "<>")}\n'
        f'top-1 on the validation split; MACs for one image; ms measured on this machine, {where}. On the '
        f'same images the backbone was fine-tuned for {config.finetune_epochs} epochs, the winner {winner}.'
    )


def add_adapt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--backbone', required=True, metavar='NAME', help='network of timm, for example mobilenetv3_large_100')
    add('--backbone-weights', metavar='FILE', help='its weights as timm has them (default: downloaded)')
    add('--output', required=True, metavar='DIR', help='output folder')
    add_user_images(add, 'your images, in train/CLASS/ and validation/CLASS/')
    add('--img-size', type=int, nargs='+', metavar='N',
        help="pixels (default: the backbone's); of several, the best for the limits is chosen")  # fmt: skip
    add('--max-macs', type=parse_count, metavar='N', help='limit of the search, for example 200M')
    add('--max-params', type=parse_count, metavar='N')
    add_latency_limit(parser)
    add(
        '--search-floor',
        type=parse_share,
        metavar='SHARE',
        help='do not look at networks below this share of the limit where the backbone is above it '
        '(default: %(default)s)',
    )
    add('--m', type=int, metavar='N', help='largest number of paths that are summed (default: %(default)s)')
    add(
        '--reduce-only',
        action='store_true',
        help="look at no kernel larger than the backbone's and at no sum of paths in a supernet that is not trained, "
        'which can not tell what they are good for',
    )
    add('--finetune-epochs', type=int, metavar='N', help='of the backbone (default: %(default)s)')
    add('--winner-epochs', type=int, metavar='N', help='of the winner, 0 for none (default: %(default)s)')
    add(
        '--supernet-epochs',
        type=int,
        metavar='N',
        help='train the supernet before it is searched (default: 0, search it as it starts, where the backbone is '
        f'outside the limits, else {SUPERNET_EPOCHS})',
    )
    add('-b', '--batch-size', type=int, metavar='N', help='images per step (default: %(default)s)')
    add(
        '--generations',
        type=int,
        metavar='N',
        help='generations of the search, which several image sizes share (default: %(default)s)',
    )
    add('--num-images', type=parse_count, metavar='N', help='images to score archs with (default: %(default)s)')
    add('--recalibration-images', type=parse_count, metavar='N', help='0 for none (default: %(default)s)')
    add(
        '--refit-images',
        type=parse_count,
        metavar='N',
        help="to bring the winner's features near the backbone's with, 0 for none (default: %(default)s)",
    )
    add(
        '--lr',
        type=parse_float,
        help='learning rate of supernet and winner, four times that of the backbone and of a winner that is nearly as '
        'good from the start (default: %(default)s)',
    )
    add('--no-distill', dest='distill', action='store_false', help='the backbone teaches neither supernet nor winner')
    add('--seed', type=int)
    add(
        '--reuse',
        metavar='DIR',
        help='take the backbone of this earlier job, and its supernet if trained alike, for another limit',
    )
    add('-j', '--workers', type=int, metavar='N')
    add('--device', metavar='NAME')
    add_amp_options(parser)
    add('--cpu-kernels', action='store_true', help=CPU_KERNELS_HELP)
    parser.set_defaults(**{f.name: f.default for f in fields(AdaptConfig) if f.default is not MISSING})


def run_adapt_command(args: argparse.Namespace) -> None:
    setup_logging()
    run_adapt(from_args(AdaptConfig, args), args.output)
