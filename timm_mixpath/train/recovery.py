"""What lets a training that was stopped within an epoch go on behind the last batch that it saw."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..utils.errors import Stopped, UsageError
from .data import iterate

__all__ = [
    'RECOVERY',
    'StopSignal',
    'batches_behind',
    'latest_checkpoint',
    'outlive_signals',
    'resolve_auto',
    'run_dir',
]


RECOVERY = 'recovery.pth.tar'

# With which schedulers ask a process to end; Windows has no SIGUSR1
_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]


class StopSignal:
    """Notes that the process was asked to end, so that it can do so behind a training step.

    Schedulers send SIGTERM, or SIGUSR1 where they were told to, some time before they kill. Outside the main thread,
    where Python takes no signals, nothing is noted.

    Attributes:
        number: Number of the signal that came, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number

    @contextmanager
    def listening(self) -> Iterator['StopSignal']:
        """Within the context the signals are noted and have no other effect."""
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def stopped(self, where: str) -> Stopped:
        """Return what to raise, with a sentence on where the training stands."""
        name = signal.Signals(self.number).name
        return Stopped(
            f'stopped by {name} {where}; the same command goes on, of `train` with --resume auto', self.number
        )


class _OutliveSignals:
    """Lets a process that loads images live on when everybody is asked to end: the training needs it for a moment.

    What the training itself sends at its end is obeyed at once, or it would wait for this process for ever.

    Args:
        init: What else such a process does at its start.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        if hasattr(signal, 'sigwaitinfo'):
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # for the thread that waits for them, too
            threading.Thread(target=_obey_the_training, args=(os.getppid(),), daemon=True).start()
        else:
            for number in _SIGNALS:
                signal.signal(number, _end_later)
        if self.init is not None:
            self.init(worker)


def _obey_the_training(training: int) -> None:
    is_asked = False
    while True:
        info = signal.sigwaitinfo(_SIGNALS)
        if is_asked or info.si_pid == training:
            os._exit(128 + info.si_signo)
        is_asked = True


def _end_later(*_: Any) -> None:
    """The same where nobody tells who sent a signal."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(30)


def outlive_signals(loader: Any) -> None:
    """Let the processes of a `DataLoader`, or of one of timm's that has it inside, ignore a first signal to end."""
    inner = getattr(loader, 'loader', loader)
    if isinstance(inner, DataLoader):
        inner.worker_init_fn = _OutliveSignals(inner.worker_init_fn)


class _Behind:
    """A sampler without its first indices."""

    def __init__(self, sampler: Iterable[int], start: int) -> None:
        self.sampler = sampler
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return islice(self.sampler, self.start, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.start


def batches_behind(loader: Any, start: int) -> Iterator[Any]:
    """Iterate over the batches of an epoch behind the first ones, which are not even read where that can be avoided.

    Args:
        loader: A `DataLoader`, one of timm's that has it inside, or any iterable of batches.
        start: Batches to leave out.

    Raises:
        RunError: Images can't be read.
    """
    inner = getattr(loader, 'loader', loader)
    can_skip = (
        start > 0
        and isinstance(inner, DataLoader)
        and not isinstance(inner.dataset, IterableDataset)
        and type(inner.batch_sampler) is BatchSampler
    )
    if not can_skip:
        yield from islice(iterate(loader), start, None)
        return
    batch_sampler = inner.batch_sampler
    sampler = batch_sampler.sampler
    batch_sampler.sampler = _Behind(sampler, start * batch_sampler.batch_size)
    try:
        yield from iterate(loader)
    finally:
        batch_sampler.sampler = sampler


def run_dir(output: str, name: str) -> Path:
    """Return the folder of a run of a name."""
    return Path(output or './output/train') / name


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the checkpoint of a run that is furthest: that within an epoch, or that of the last one; None for none."""
    found = [path for path in (Path(folder) / 'last.pth.tar', Path(folder) / RECOVERY) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def resolve_auto(resume: str, output: str, experiment: str) -> str:
    """Return the checkpoint that `--resume auto` stands for, '' where there is none yet.

    Raises:
        UsageError: The folder of the run has no fixed name.
    """
    if resume != 'auto':
        return resume
    if not experiment:
        raise UsageError('--resume auto needs --experiment NAME: without it every run gets a folder of its own')
    latest = latest_checkpoint(run_dir(output, experiment))
    return '' if latest is None else str(latest)
