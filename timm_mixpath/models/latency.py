"""Measured latency of models."""

import copy
import logging
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from ..utils.modes import eval_mode
from .cost import check_input_size
from .runtimes import check_runtime, make_runner

__all__ = ['make_images', 'measure_latency', 'measure_side_by_side']


def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
    num_threads: int | None = None,
    min_run_time_s: float = 1.0,
    channels_last: bool = False,
    runtime: str | None = None,
) -> float:
    """Measure how long a model takes for one batch, in eval mode without autograd, where and in what dtype it is.

    The model is left as it was. A supernet runs its `active_arch`; for the latency of a sub-network measure what
    `extract` gives.

    Args:
        model: Any model of images.
        batch_size: Images per batch.
        input_size: Input as (channels, height, width), in pixels; that of `model.pretrained_cfg` if None.
        num_threads: CPU threads, as many as torch is set to if None.
        min_run_time_s: Measure for at least this long, in seconds.
        channels_last: Measure a copy of the model in the channels-last memory format.
        runtime: Measure it as it would be deployed, see `make_runner`: `'torch'`, `'compile'` or `'onnxruntime'`. The
            model as it is if None.

    Returns:
        Latency of a batch in milliseconds (`latency_ms`), the median over blocks of runs.

    Raises:
        ValueError: `batch_size` or `input_size` is malformed, the input size is not known, or there is no such
            runtime.
        ImportError: The runtime is not installed.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size!r} must be positive')
    if runtime is not None:
        check_runtime(runtime)
    if input_size is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        if not cfg.get('input_size'):
            raise ValueError('the model has no pretrained_cfg with an input_size, give input_size')
        # A cfg keeps its channels when a model is created with others
        input_size = (getattr(model, 'in_chans', cfg['input_size'][0]), *cfg['input_size'][1:])

    def measure(run: Callable[[], Any]) -> float:
        return _timer(run, num_threads).blocked_autorange(min_run_time=min_run_time_s).median * 1e3

    x = make_images(model, batch_size, check_input_size(input_size))
    if runtime is not None:
        return measure(make_runner(model, x, runtime=runtime, num_threads=num_threads))
    if channels_last:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    with eval_mode(model), torch.inference_mode():
        return measure(lambda: model(x))


def make_images(model: nn.Module, batch_size: int, input_size: tuple[int, int, int]) -> torch.Tensor:
    """Return random images [B, C, H, W] on the device and in the dtype of a model."""
    reference = next(model.parameters())
    # A generator of its own: measuring must not change what a training run draws next
    generator = torch.Generator(reference.device).manual_seed(0)
    return torch.randn(batch_size, *input_size, device=reference.device, dtype=reference.dtype, generator=generator)


def measure_side_by_side(
    runners: Sequence[Callable[[], Any]],
    *,
    num_threads: int | None = None,
    rounds: int = 10,
    min_visit_s: float = 0.03,
    seed: int = 0,
) -> list[float]:
    """Measure functions against each other, so that a machine that gets faster or slower on the way hits all alike.

    In every round each function has a visit, in random order: it runs for `min_visit_s` or three times. What a round
    took longer than others on the median over functions is taken out of it.

    Args:
        runners: Functions without arguments, see `make_runner`.
        num_threads: CPU threads of torch, as many as it is set to if None.
        rounds: Number of visits of each.
        min_visit_s: How long a visit should take, in seconds.
        seed: Seed of the order.

    Returns:
        Time of one run of each in milliseconds, the median over rounds.
    """
    timers = [_timer(run, num_threads) for run in runners]
    numbers: list[int] = []
    for timer in timers:
        timer.timeit(2)  # memory is allocated and code compiled in the first runs
        number = 1
        while (taken := timer.timeit(number).mean) * number < min_visit_s / 10:
            number *= 4
        numbers.append(min(10_000, max(3, round(min_visit_s / taken))))
    draw = random.Random(seed)
    order = list(range(len(timers)))
    times: list[list[float]] = [[] for _ in timers]  # ms, [function][round]
    for _ in range(rounds):
        draw.shuffle(order)
        for i in order:
            times[i].append(timers[i].timeit(numbers[i]).mean * 1e3)
    medians = [statistics.median(own) for own in times]
    slowness = [statistics.median(own[r] / m for own, m in zip(times, medians)) for r in range(rounds)]
    return [statistics.median(t / s for t, s in zip(own, slowness)) for own in times]


def _timer(run: Callable[[], Any], num_threads: int | None) -> Any:
    # Its import is slow, and warns where CUDA is installed without a GPU
    logger = logging.getLogger('torch.utils.cpp_extension')
    level = logger.level
    logger.setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    logger.setLevel(level)
    # The timer waits for the device; without num_threads it would take a single thread
    return Timer('run()', globals=dict(run=run), num_threads=num_threads or torch.get_num_threads())
