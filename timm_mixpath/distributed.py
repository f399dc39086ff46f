"""Evaluations shared among the processes of a torchrun."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from .errors import RunError

__all__ = ['Ranks']


class Ranks:
    """Work shared among processes, such that an error in one of them is raised in all instead of blocking them.

    Args:
        rank: Rank of this process.
        world_size: Number of processes; if there are several, `torch.distributed` is initialised.

    Raises:
        RunError: `torch.distributed` is not initialised, or with other numbers.
    """

    def __init__(self, rank: int, world_size: int) -> None:
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
        """Evaluate at most one arch per rank, and return all results in all ranks."""
        if self.world_size == 1:
            return [evaluate(arch) for arch in archs]
        result: Any = None
        failure: tuple[str, Exception] | None = None
        if self.rank < len(archs):
            try:
                result = dict(evaluate(archs[self.rank]))
            except Exception as e:  # raised below
                text = f'rank {self.rank} failed to evaluate {str(archs[self.rank])!r}: {type(e).__name__}: {e}'
                failure = (text, e)
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (result, failure and failure[0]))
        if failure is not None:
            raise failure[1]
        for _, text in answers:
            if text is not None:
                raise RunError(text)
        return [answer for answer, _ in answers[: len(archs)]]
