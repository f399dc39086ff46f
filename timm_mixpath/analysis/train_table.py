"""Stand-alone training of many archs of a space into a table of accuracies: the ground truth of a ranking.

The folder of a table holds `table.json` (what it is a table of), `runs/` (one training each, with the `result.json` it
ends with) and `table.csv`, which follows from them. A training counts as done when its result is there, so a run that
was cut off goes on with the same call and loses nothing.

Under torchrun every process trains archs of its own, alone, so a table does not depend on the number of processes.
"""

import hashlib
import json
import logging
import math
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from ..models.cost import count_macs
from ..spaces.arch import Arch
from ..train.checkpoint import create_model, resolve_data
from ..train.data import open_dataset
from ..train.loop import train_or_resume
from ..train.options import LOCAL_OPTIONS, default_args
from ..utils.distributed import WorkQueue
from ..utils.errors import RunError, UsageError, concise
from ..utils.files import lock_file, new_output_dir
from ..utils.tables import write_csv, write_json
from ..version import __version__
from .arch_lists import arch_space, check_archs

__all__ = ['train_table']

_logger = logging.getLogger(__name__)


_FORMAT = 'timm-mixpath table'
_COLUMNS = ('arch', 'accuracy', 'accuracy_std', 'seeds', 'epochs', 'params', 'macs', 'train_loss', 'accuracies')


# Options of a single training, with what a table has instead
_REFUSED = {
    'resume': 'the same command goes on with what it has begun',
    'no_resume_opt': 'a training that was cut off goes on exactly',
    'start_epoch': 'a training that was cut off goes on by itself',
    'output': 'its folder is --table-dir',
    'experiment': 'its trainings are named by their archs',
}


def train_table(
    args: Namespace,
    archs: Sequence[Arch | str],
    table_dir: str | os.PathLike,
    *,
    seeds: Sequence[int] | None = None,
    drop_checkpoints: bool = False,
    verbose: bool = False,
) -> Path:
    """Train every arch of a list from scratch, once per seed, and write the accuracies of the last epochs.

    The columns of the table are `arch`; `accuracy`, the mean over the seeds of the validation metric in percent, and
    `accuracy_std`, empty for one seed; `seeds`, those it was trained with; `epochs`, `params`, `macs`, and
    `train_loss`, that of the last epoch; and `accuracies`, one per seed.

    A call that was cut off goes on where it stopped when it is repeated; the list and the seeds may grow. Under
    torchrun every process trains archs of its own.

    Args:
        args: Options of every training, as for `train`; the model is a sub-network model such as `mixpath_nano`.
        archs: The archs.
        table_dir: Folder of the table.
        seeds: Seeds to train every arch with, `args.seed` alone if None.
        drop_checkpoints: Delete the checkpoints of trainings that have ended.
        verbose: Log what `train` logs, not one line per training alone.

    Returns:
        The path of `table.csv`.

    Raises:
        UsageError: An option or an arch is wrong, the folder holds a table of other options, or another process is
            at it.
        RunError: Trainings failed; all others are in the table, and the same call tries those again.
    """
    args = Namespace(**vars(args))
    _check_options(args)
    space = arch_space(args)
    archs = check_archs([(f'arch {i}', str(arch)) for i, arch in enumerate(archs)], space, 'list of archs')
    if not archs:
        raise UsageError('the list of archs is empty')
    seeds = list(dict.fromkeys([args.seed] if seeds is None else seeds))
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise UsageError(f'seed {seed} is out of range, allowed are 0 to {2**31 - 1}')
    table = _Table(Path(table_dir), args, archs, seeds)
    team = WorkQueue()
    args.device = team.device(args.device)

    with ExitStack() as stack:

        def open_table() -> dict[str, Any]:
            if args.dataset_download and team.world_size > 1:  # one process downloads, the others find the files
                open_dataset(args.dataset, args.data_dir, args.train_split, download=True)
            return _open(table, stack)

        todo = team.from_first(open_table)
        jobs = table.jobs(todo['archs'])
        pending = [jobs[i] for i in todo['pending']]
        if team.rank == 0:
            if drop_checkpoints:
                for job in jobs:
                    if table.result(job) is not None:
                        table.drop_checkpoints(job)
            done = f', {len(jobs) - len(pending)} of them done' if len(pending) < len(jobs) else ''
            _logger.info(f'{len(jobs)} trainings{done}, output in {table.folder}')

        failures: list[str] = []
        started = time.monotonic()
        with team.alone(), nullcontext() if verbose else _quiet():
            for trained, index in enumerate(team.share(len(pending))):
                job, start = pending[index], time.monotonic()
                line = f'{jobs.index(job) + 1}/{len(jobs)}  {job.short}  seed {job.seed}'
                try:
                    result = _train(args, table, job)
                except (OSError, RuntimeError) as e:  # one arch may need more memory than there is
                    failures.append(f'{job.arch}, seed {job.seed}: {concise(e)}')
                    _logger.error(f'{line}  failed: {concise(e)}', exc_info=not isinstance(e, RunError))
                    continue
                table.write()
                if drop_checkpoints:
                    table.drop_checkpoints(job)
                now = time.monotonic()
                left = math.ceil((len(pending) - index - 1) / team.world_size) * (now - started) / (trained + 1)
                took, rest = (
                    tqdm.format_interval(now - start),
                    f', about {tqdm.format_interval(left)} left' if left else '',
                )
                metric = args.eval_metric.replace('top', 'top-')
                _logger.info(f'{line}  {metric} {result["accuracy"]:.2f} %  ({took}{rest})')
        failures = team.gather(failures)
        if team.rank == 0:
            table.write()  # a kill may have come between a result and its line
    if failures:
        raise RunError(
            f'{len(failures)} of {len(pending)} trainings failed, the first is {failures[0]} (the same command tries '
            'them again)'
        )
    return table.path


def _open(table: '_Table', stack: ExitStack) -> dict[str, Any]:
    """Lock a table for as long as the stack lasts, and find what is left to do."""
    stack.enter_context(new_output_dir(table.folder))
    stack.enter_context(table.left_as_found())
    stack.enter_context(_lock(table.folder))
    archs = table.open()
    return {'archs': archs, 'pending': [i for i, job in enumerate(table.jobs(archs)) if table.result(job) is None]}


def _check_options(args: Namespace) -> None:
    default = default_args()
    for name, reason in _REFUSED.items():
        if getattr(args, name) != getattr(default, name):
            raise UsageError(f'--{name.replace("_", "-")} can not be used for a table: {reason}')
    if args.sched == 'plateau':
        raise UsageError('--sched plateau can not be resumed, which a table needs; choose another one')
    if not args.val_split:
        raise UsageError('a table needs images to measure accuracies with: --val-split must not be empty')
    if args.eval_metric == 'loss':
        raise UsageError('--eval-metric loss is no accuracy, a table can be of top1 or top5')


def _train(args: Namespace, table: '_Table', job: '_Job') -> dict[str, Any]:
    """Train one arch, or go on with it, and write its result."""
    folder = table.run_dir(job)
    args = Namespace(**vars(args))
    args.seed = job.seed
    args.model_kwargs = {**args.model_kwargs, 'arch': job.arch}
    args.output, args.experiment = str(folder.parent), folder.name
    summary = train_or_resume(args)
    model = create_model(args, device='meta').to('meta').eval()
    result = {
        'arch': job.arch,
        'seed': job.seed,
        'metric': args.eval_metric,
        'accuracy': float(summary[f'eval_{args.eval_metric}']),
        'epochs': int(summary['epoch']) + 1,
        'params': sum(p.numel() for p in model.parameters()),
        'macs': sum(count_macs(model, resolve_data(args, model)['input_size']).values()),
        'train_loss': float(summary['train_loss']),
        'versions': {'timm_mixpath': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
    }
    write_json(folder / 'result.json', result)
    return result


@dataclass(frozen=True)
class _Job:
    """One training: an arch, its place in the table, and a seed."""

    index: int
    arch: str
    seed: int

    @property
    def short(self) -> str:
        return self.arch if len(self.arch) <= 48 else f'{self.arch[:45]}...'

    @property
    def name(self) -> str:
        return f'{self.index:03d}-{hashlib.sha1(self.arch.encode()).hexdigest()[:8]}-seed{self.seed}'


class _Table:
    """The files of a table."""

    def __init__(self, folder: Path, args: Namespace, archs: list[str], seeds: list[int]) -> None:
        self.folder, self.path = folder, folder / 'table.csv'
        self.archs, self.seeds = archs, seeds
        names = vars(default_args()).keys() - LOCAL_OPTIONS - _REFUSED.keys() - {'seed', 'val_interval'}
        options = {name: getattr(args, name) for name in sorted(names)}
        # Compared with what comes back from the file
        self.options = json.loads(json.dumps(options, default=str))
        self.data_dir = os.path.abspath(args.data_dir) if args.data_dir else None
        self._jobs: list[_Job] = []

    @contextmanager
    def left_as_found(self) -> Iterator[None]:
        """Leave nothing of a new table behind an exception, as of a wrong option, before anything was trained."""
        names = ('table.json', '.lock')
        is_new = not any((self.folder / name).exists() for name in names)
        try:
            yield
        except BaseException:
            if is_new and not (self.folder / 'runs').exists():
                for name in names:
                    (self.folder / name).unlink(missing_ok=True)
            raise

    def open(self) -> list[str]:
        """Make the table, or check that it is of the same trainings.

        Returns:
            Its archs: those that it had, then those that have been added.

        Raises:
            UsageError: It is a table of other trainings, or of archs or seeds that are missing now.
        """
        path, archs = self.folder / 'table.json', self.archs
        runs = self.folder / 'runs'
        if path.exists():
            # Until something has been trained, a command may be corrected
            if any(runs.glob('*/*.pth.tar')) or any(runs.glob('*/result.json')):
                archs = self._merge(path)
        elif self.path.exists() or runs.exists():
            raise UsageError(
                f'{str(self.folder)!r} holds a table.csv or runs of something else and is not overwritten; choose '
                'another --table-dir'
            )
        content = dict(format=_FORMAT, data_dir=self.data_dir, options=self.options, seeds=self.seeds, archs=archs)
        write_json(path, content)
        return archs

    def _merge(self, path: Path) -> list[str]:
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            if content['format'] != _FORMAT:
                raise ValueError
            options, data_dir = dict(content['options']), content['data_dir']
            seeds, archs = list(content['seeds']), list(content['archs'])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f'{str(path)!r} is damaged; choose another --table-dir') from None
        remedy = 'choose another --table-dir'
        default = vars(default_args())
        for name, now in self.options.items():
            before = options.get(name, default[name])  # an option that is newer than the table was at its default
            if before != now:
                raise UsageError(
                    f'{str(self.folder)!r} holds a table of trainings with --{name.replace("_", "-")} {before}, now '
                    f'it is {now}; {remedy}'
                )
        for what, before, now in (('seed', seeds, self.seeds), ('arch', archs, self.archs)):
            missing = [value for value in before if value not in set(now)]
            if missing:
                raise UsageError(
                    f'{str(self.folder)!r} holds a table with {what} {missing[0]}, which is not in the list now, and '
                    f'the list of {what}s can only grow; add it, or {remedy}'
                )
        if data_dir != self.data_dir:
            _logger.warning(f'The images of the table were in {data_dir}, now they are read from {self.data_dir}')
        known = set(archs)
        return archs + [arch for arch in self.archs if arch not in known]

    def jobs(self, archs: list[str]) -> list[_Job]:
        """Return all trainings: all archs with the first seed, then all with the next."""
        self._jobs = [_Job(index, arch, seed) for seed in self.seeds for index, arch in enumerate(archs)]
        return self._jobs

    def run_dir(self, job: _Job) -> Path:
        return self.folder / 'runs' / job.name

    def result(self, job: _Job) -> dict[str, Any] | None:
        """Return the result of a training, None if it has not ended."""
        try:
            result = json.loads((self.run_dir(job) / 'result.json').read_text(encoding='utf-8'))
            numbers = [result[name] for name in ('accuracy', 'epochs', 'params', 'macs', 'train_loss')]
            is_whole = all(type(number) in (int, float) for number in numbers)
            return result if is_whole and (result['arch'], result['seed']) == (job.arch, job.seed) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop_checkpoints(self, job: _Job) -> None:
        for path in self.run_dir(job).glob('*.pth.tar'):
            path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write table.csv of all results there are."""
        written: list[dict[str, Any]] = []
        # Processes of a torchrun write the same file. Each looks again after it has written: the last one to do so
        # has either seen all results, or finds the missing one then.
        jobs = sorted(self._jobs, key=lambda job: job.index)
        while (results := [result for result in map(self.result, jobs) if result is not None]) != written:
            write_csv(self.path, _COLUMNS, _rows(results))
            written = results


def _rows(results: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    by_arch: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_arch.setdefault(result['arch'], []).append(result)
    rows: list[tuple[Any, ...]] = []
    for arch, group in by_arch.items():
        accuracies = [result['accuracy'] for result in group]
        rows.append(
            (
                arch,
                # Equal counts of right images must stay equal, which their sums in floating point need not be
                round(statistics.fmean(accuracies), 6),
                round(statistics.stdev(accuracies), 6) if len(group) > 1 else '',
                ' '.join(str(result['seed']) for result in group),
                *(group[0][name] for name in ('epochs', 'params', 'macs')),
                round(statistics.fmean(result['train_loss'] for result in group), 6),
                ' '.join(f'{accuracy:.6g}' for accuracy in accuracies),
            )
        )
    return rows


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Refuse a second command on a table; the lock ends with the process."""
    with open(folder / '.lock', 'a') as file:
        # The loaders' processes outlive a killed one for a moment, and must not keep the lock
        if not lock_file(file, inherited=False):
            raise UsageError(
                f'another command is working on {str(folder)!r}; wait for it, or choose another --table-dir'
            )
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a training says to itself, but for warnings."""
    loggers = [logging.getLogger(name) for name in ('timm', 'timm_mixpath.train')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
