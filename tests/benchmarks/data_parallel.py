"""Operations that a training step of a supernet queues: in one process, with DDP, and as this package reduces.

A process group of one process, so the counts are those of every process of a larger one. What is counted are calls of
aten operators in forward, backward and reduction (each is a launch on a GPU at least once), and among them the copies,
fills and scalings, which is what DDP adds: it broadcasts every buffer in front of a forward pass and keeps zeros for
the gradients of all parameters that the sampled arch does not have.
"""

import argparse
import copy
import tempfile
from collections import Counter

import timm
import torch
import torch.distributed as dist
from common import add_common_args, print_table, setup
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import timm_mixpath  # noqa: F401  registers the models
from timm_mixpath.train.data_parallel import SampledDataParallel

SIDES = ('alone', 'DDP', 'DDP, no buffers', 'ours')
OVERHEAD = ('aten::copy_', 'aten::zero_', 'aten::fill_', 'aten::mul', 'aten::cat', 'aten::div_', 'aten::_foreach_copy_')


def wrap(side: str, model: nn.Module) -> nn.Module:
    if side == 'alone':
        return model
    if side == 'ours':
        return SampledDataParallel(model)
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=side == 'DDP')


def count(side: str, start: nn.Module, pixels: int) -> Counter:
    wrapped = wrap(side, copy.deepcopy(start))
    x = torch.randn(2, 3, pixels, pixels).to(memory_format=torch.channels_last)
    for _ in range(2):  # DDP sets its buckets up in the first one
        wrapped(x).sum().backward()
        wrapped.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wrapped(x).sum().backward()
    return Counter({e.key: e.count for e in profiler.key_averages() if e.key.startswith('aten::')})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    names = ['mixpath_s1_supernet', 'mixpath_s2_supernet', 'mixpath_s3_supernet']
    parser.add_argument('--models', nargs='+', default=names, metavar='NAME', help=f'supernets (default: {names})')
    parser.add_argument('--img-size', type=int, default=32, metavar='N', help='pixels (default: 32)')
    args = parser.parse_args()
    setup(args, 'Calls of aten operators in a training step of a supernet')
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
        rows = []
        for name in args.models:
            model = timm.create_model(name, num_classes=10).train().to(memory_format=torch.channels_last)
            for side in SIDES:
                calls = count(side, model, args.img_size)
                rows.append([f'{name}, {side}', str(calls.total()), *(str(calls[op]) for op in OVERHEAD)])
        dist.destroy_process_group()
    print_table(['calls of a step', 'all', *(op.removeprefix('aten::') for op in OVERHEAD)], rows)


if __name__ == '__main__':
    main()
