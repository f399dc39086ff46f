"""Measured latency of a model."""

import copy

import torch
import torch.nn as nn

from ..utils.modes import eval_mode
from .cost import check_input_size

__all__ = ['measure_latency']


def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
    num_threads: int | None = None,
    min_run_time_s: float = 1.0,
    channels_last: bool = False,
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

    Returns:
        Latency of a batch in milliseconds (`latency_ms`), the median over blocks of runs.

    Raises:
        ValueError: `batch_size` or `input_size` is malformed, or the input size is not known.
    """
    from torch.utils.benchmark import Timer  # its import is slow, and warns where CUDA is installed without a GPU

    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size!r} must be positive')
    if input_size is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        if not cfg.get('input_size'):
            raise ValueError('the model has no pretrained_cfg with an input_size, give input_size')
        # A cfg keeps its channels when a model is created with others
        input_size = (getattr(model, 'in_chans', cfg['input_size'][0]), *cfg['input_size'][1:])
    input_size = check_input_size(input_size)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if channels_last:
        model = copy.deepcopy(model).to(memory_format=memory_format)

    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    reference = next(model.parameters())
    device, dtype = reference.device, reference.dtype
    # A generator of its own: measuring must not change what a training run draws next
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch_size, *input_size, device=device, dtype=dtype, generator=generator)  # (B, C, H, W)
    x = x.to(memory_format=memory_format)
    with eval_mode(model), torch.inference_mode():
        # The timer waits for the device; without num_threads it would take a single thread
        timer = Timer('model(x)', globals=dict(model=model, x=x), num_threads=num_threads)
        measurement = timer.blocked_autorange(min_run_time=min_run_time_s)
    return measurement.median * 1e3
