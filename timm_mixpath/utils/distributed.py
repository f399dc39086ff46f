"""The device of a process, and work that is shared among the processes of a torchrun."""

import itertools
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device
from timm.utils.distributed import is_distributed_env, world_info_from_env

from .errors import RunError, UsageError, as_usage_error
from .memory import keep_freed_memory

__all__ = ['Ranks', 'WorkQueue', 'init_device', 'open_process']


def init_device(args: Namespace) -> torch.device:
    """Open the device and, under torchrun, the process group, as timm's train.py does.

    A process group that is open already is used as it is.

    Args:
        args: `device` is read, the GPU if there is one and it is None; `device`, `distributed`, `rank`, `local_rank`
            and `world_size` are set.

    Raises:
        UsageError: The device does not exist.
    """
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    args.device = str(args.device)  # a torch.device is welcome, what is stored of a run is text
    _check_slurm()
    with as_usage_error(f'device {args.device!r} can not be used'):
        if dist.is_available() and dist.is_initialized():
            args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
            args.local_rank = int(os.environ.get('LOCAL_RANK', 0))
            args.distributed = args.world_size > 1
            if args.distributed and args.device == 'cuda':
                args.device = f'cuda:{args.local_rank}'
            device = torch.device(args.device)
        else:
            device = init_distributed_device(args)
        torch.empty(0, device=device)
    return device


def _check_slurm() -> None:
    """Check that tasks of Slurm can find each other; within torchrun its own variables count."""
    tasks = os.environ.get('SLURM_NTASKS', '1')
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if is_distributed_env() and 'WORLD_SIZE' not in os.environ and missing:
        raise UsageError(
            f'Slurm says that this is one of {tasks} tasks, and {" and ".join(missing)} of the first one is not set: '
            'start all with srun and export both, or start torchrun, or unset SLURM_NTASKS for a single process'
        )


@contextmanager
def open_process(device: str | torch.device | None, process: Namespace | None = None) -> Iterator[Namespace]:
    """Open the device, and close the process group of torchrun at the end, if it was not open before.

    Args:
        device: Device, the GPU if there is one and None is given.
        process: Where to set what `init_device` sets, a new namespace if None.

    Yields:
        It.

    Raises:
        UsageError: The device does not exist.
    """
    process = Namespace() if process is None else process
    process.device = device
    was_open = dist.is_available() and dist.is_initialized()
    init_device(process)
    if torch.device(process.device).type == 'cpu':
        keep_freed_memory()
    try:
        yield process
    finally:
        if process.distributed and not was_open:
            dist.destroy_process_group()


class Ranks:
    """Work shared among processes, such that an error in one of them is raised in all instead of blocking them.

    Args:
        rank: Rank of this process.
        world_size: Number of processes; if there are several, `torch.distributed` is initialised.
        together: All processes evaluate every arch, each on its share of the images, in the place of archs of their
            own.

    Raises:
        RunError: `torch.distributed` is not initialised, or with other numbers.
    """

    def __init__(self, rank: int, world_size: int, together: bool = False) -> None:
        if world_size > 1:
            if not (dist.is_available() and dist.is_initialized()):
                raise RunError(f'world_size={world_size} needs torch.distributed to be initialised')
            if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
                raise RunError(
                    f'rank {rank} of {world_size} was given, torch.distributed has {dist.get_rank()} of '
                    f'{dist.get_world_size()}'
                )
        self.rank = rank
        self.world_size = world_size
        self.together = together

    @property
    def num_at_once(self) -> int:
        """How many archs are evaluated at once."""
        return 1 if self.together else self.world_size

    def gather(self, call: Callable[[], Any], what: str = '') -> list[Any]:
        """Call in all ranks and return the results of all, by rank, in each of them; an error is raised in all.

        Args:
            call: What to call.
            what: What it does, for the message in the other ranks: ' to read'.
        """
        if self.world_size == 1:
            return [call()]
        result: Any = None
        failure: tuple[str, Exception] | None = None
        try:
            result = call()
        except Exception as e:  # raised below
            failure = (f'rank {self.rank} failed{what}: {type(e).__name__}: {e}', e)
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (result, failure and failure[0]))
        if failure is not None:
            raise failure[1]
        for _, text in answers:
            if text is not None:
                raise RunError(text)
        return [answer for answer, _ in answers]

    def interleave(self, call: Callable[[], Sequence[Any]]) -> list[Any]:
        """Call in all ranks, of which each has every `world_size`-th item, and return all items in their order."""
        parts = self.gather(call)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Call in rank 0 and return the result, or raise the error, in all ranks."""
        if self.world_size == 1:
            return call()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = call()
            except Exception as e:  # raised below
                box[1] = e
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def map(self, evaluate: Callable[[Any], Mapping[str, Any]], archs: Sequence[str]) -> list[Mapping[str, Any]]:
        """Evaluate at most `num_at_once` archs, and return all results in all ranks."""
        if self.world_size == 1 or self.together:
            return [evaluate(arch) for arch in archs]

        arch = archs[self.rank] if self.rank < len(archs) else None
        return self.gather(lambda: None if arch is None else dict(evaluate(arch)), f' to evaluate {str(arch)!r}')[
            : len(archs)
        ]


_calls = itertools.count()  # keys of two tables in one program must differ


class WorkQueue:
    """The processes of a torchrun, which share a list of work and otherwise know nothing of each other.

    There is no process group: its timeouts are not made for hours of silence, and readers of streamed data sets would
    take one for a sign that the images are shared out.
    """

    _FOREVER = timedelta(days=365)  # torchrun ends the others when one dies

    def __init__(self) -> None:
        self.local_rank, self.rank, self.world_size = 0, 0, 1
        self._store: Any = None
        if is_distributed_env():
            _check_slurm()
            self.local_rank, self.rank, self.world_size = world_info_from_env()
            store, _, _ = next(dist.rendezvous('env://', self.rank, self.world_size, timeout=self._FOREVER))
            self._store = dist.PrefixStore(f'timm_mixpath/table/{next(_calls)}', store)

    def device(self, device: str | None) -> str | None:
        """Return the device of this process."""
        if self.world_size == 1:
            return device
        kind = (device or ('cuda' if torch.cuda.is_available() else 'cpu')).partition(':')[0]
        return kind if kind == 'cpu' else f'{kind}:{self.local_rank}'

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Call in rank 0 and return the result, or raise the error, in all ranks; it must be JSON."""
        if self._store is None:
            return call()
        if self.rank > 0:
            answer = json.loads(self._store.get('first'))
            if 'error' in answer:
                raise (UsageError if answer['usage'] else RunError)(answer['error'])
            return answer['result']
        try:
            result = call()
        except Exception as e:
            answer = {'error': str(e), 'usage': isinstance(e, UsageError)}
            self._store.set('first', json.dumps(answer))
            raise
        self._store.set('first', json.dumps({'result': result}))
        return result

    def share(self, count: int) -> Iterator[int]:
        """Give every number below `count` to one process, the next to the one that asks first."""
        if self._store is None:
            yield from range(count)
            return
        while (index := self._store.add('next', 1) - 1) < count:
            yield index

    def gather(self, lines: list[str]) -> list[str]:
        """Return the lines of all in rank 0, which waits for the others, and none in the others.

        A rank that ends with a failure makes torchrun end the others, so none may before all are through.
        """
        if self._store is None:
            return lines
        self._store.set(f'done/{self.rank}', json.dumps(lines))
        if self.rank > 0:
            return []
        keys = [f'done/{rank}' for rank in range(self.world_size)]
        self._store.wait(keys, self._FOREVER)
        return [line for key in keys for line in json.loads(self._store.get(key))]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let a training not see that there are other processes."""
        before = os.environ.get('WORLD_SIZE')
        if self.world_size > 1:
            os.environ['WORLD_SIZE'] = '1'
        try:
            yield
        finally:
            if self.world_size > 1:
                os.environ.pop('WORLD_SIZE')
                if before is not None:
                    os.environ['WORLD_SIZE'] = before
