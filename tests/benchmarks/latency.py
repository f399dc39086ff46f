"""Latency of the discovered models beside timm's own, in the runtimes that networks are deployed with.

    python tests/benchmarks/latency.py [--models mixpath_a mixnet_m ...] [--runtimes torch onnxruntime]
        [--batch-sizes 1 32] [--num-threads 1 2] [--rounds 10]

Milliseconds per batch. `torch` is eager with batch norms folded, channels last; `onnxruntime` has all of its
optimizations. All models and runtimes of one batch size and number of threads take turns in short visits, in random
order, within one process; what is printed is the median over the visits. Weights are random, they do not matter.
"""

import argparse

import timm
import torch
from common import add_common_args, print_table, setup

from timm_mixpath.models.cost import count_macs
from timm_mixpath.models.latency import measure_side_by_side
from timm_mixpath.models.runtimes import RUNTIMES, make_runner, runtime_versions

MODELS = ('mixpath_a', 'mixpath_b', 'mixnet_m', 'mobilenetv3_large_100', 'efficientnet_lite0')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME', help='timm models')
    parser.add_argument('--runtimes', nargs='+', default=['torch', 'onnxruntime'], choices=RUNTIMES)
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 32], metavar='N')
    parser.add_argument('--num-threads', nargs='+', type=int, default=[1, 2], metavar='N')
    parser.add_argument('--img-size', type=int, default=224, metavar='N')
    parser.add_argument('--rounds', type=int, default=10, metavar='N', help='visits of each (default: 10)')
    args = parser.parse_args()
    device = setup(args, 'Latency in the runtimes of deployment')
    versions = {name: version for runtime in args.runtimes for name, version in runtime_versions(runtime).items()}
    print('  ' + ', '.join(f'{name} {version}' for name, version in versions.items()))

    models = {name: timm.create_model(name, num_classes=1000).eval().to(device) for name in args.models}
    size = (3, args.img_size, args.img_size)
    times: dict[tuple, float] = {}
    for batch_size in args.batch_sizes:
        x = torch.randn(batch_size, *size, device=device)
        for threads in args.num_threads:
            keys = [(name, runtime) for name in models for runtime in args.runtimes]
            runners = [make_runner(models[name], x, runtime=runtime, num_threads=threads) for name, runtime in keys]
            found = measure_side_by_side(runners, num_threads=threads, rounds=args.rounds, seed=args.seed)
            times.update({(*key, batch_size, threads): ms for key, ms in zip(keys, found)})
            print(f'ready: batches of {batch_size}, {threads} thread(s)', flush=True)

    cases = [(r, b, t) for r in args.runtimes for b in args.batch_sizes for t in args.num_threads]
    header = ['model', 'MACs (M)', *(f'{r} b{b} t{t}' for r, b, t in cases)]
    rows = [
        [name, f'{sum(count_macs(model, size).values()) / 1e6:.1f}', *(f'{times[(name, *case)]:.1f}' for case in cases)]
        for name, model in models.items()
    ]
    print_table(header, rows)
    print(
        f'ms per batch, b: images per batch, t: threads, {args.img_size}x{args.img_size}, {args.rounds} visits of each'
    )


if __name__ == '__main__':
    main()
