"""Scoring candidates in a search: `SupernetEvaluator` against a plain loop over a loader.

    python tests/benchmarks/search_evaluation.py [--archs 20] [--model mixpath_nano_supernet] [--num-images N]
        [--data-dir DIR --train-split SPLIT] [--threads N] [--device cuda]

What is compared, on the same images held out from a training split, in the same batches, for the same archs:

- ours: what `timm-mixpath search` does. Images are decoded once by `load_batches` and stay in memory, the supernet is
  in the channels-last format, and `SupernetEvaluator` has folded its batch norms into the convolutions once.
- plain: the supernet as it is, in eval and inference mode and torch's default memory format, and the images read for
  every candidate through one timm `create_loader` whose worker processes live on.
- plain, in memory: the same supernet on images in memory. It tells what of the difference the decoding makes.

The supernet has random weights, batch norms with affine parameters of their own and statistics of the training images.
The sides take turns arch by arch within one process. Every candidate's loss must agree to 1e-4, relative, and its
top-1 to one image, since rounding can turn a tie.

How to read it: ratios are side / ours in time, above 1 ours is faster. "per arch" is the median of the ratios of single
archs with their range. What each side does once, before the first candidate, stands below the table and is not in it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from common import add_common_args, check, median_range, perturb_norms, print_table, setup, timed, turns
from timm.data import create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import Dataset

from timm_mixpath import Arch, MixPathSupernet, sample
from timm_mixpath.cli.demo import digits_folder
from timm_mixpath.search.accuracy import SupernetEvaluator
from timm_mixpath.search.images import load_batches
from timm_mixpath.train.data import Subset, class_names, hold_out, open_dataset

SIDES = ('ours', 'plain', 'plain, in memory')
TOLERANCE = 1e-4
Scores = dict[str, float]


def plain_scores(supernet: MixPathSupernet, images: object, arch: Arch) -> Scores:
    """Score an arch as timm's validate.py scores a model."""
    supernet.eval()
    supernet.active_arch = arch
    top1, loss = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for x, target in images:
            output = supernet(x)
            top1.update(accuracy(output, target)[0].item(), len(x))
            loss.update(F.cross_entropy(output, target).item(), len(x))
    return dict(top1=top1.avg, loss=loss.avg)


def open_split(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return training images and held-out images."""
    data_dir = args.data_dir or str(digits_folder())
    train_set, held_out = hold_out(open_dataset('', data_dir, args.train_split), args.holdout)
    if args.num_images is not None and args.num_images < len(held_out):
        # Evenly spread, samples are sorted by class
        held_out = Subset(held_out, [i * len(held_out) // args.num_images for i in range(args.num_images)])
    return train_set, held_out


def make_supernet(args: argparse.Namespace, num_classes: int) -> MixPathSupernet:
    torch.manual_seed(args.seed)
    kwargs = {} if args.m is None else dict(m=args.m)
    supernet = timm.create_model(args.model, num_classes=num_classes, seed=args.seed, **kwargs)
    perturb_norms(supernet, args.seed)
    return supernet


def settle(supernet: MixPathSupernet, train_set: Dataset, data_config: dict, steps: int = 40) -> None:
    """Give the batch norms the statistics of training images through sampled archs, and centre the logits."""
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:64].tolist()
    ((x, _),) = load_batches(Subset(train_set, order), data_config, batch_size=64, workers=1)
    norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # average over the steps: nothing is left of the initial values
    supernet.train()
    with torch.no_grad():
        for _ in range(steps):
            supernet(x)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        supernet.eval()
        # Else the bias of random features gives all images the same class, and top-1 would tell nothing
        means = []
        for step in range(8):
            supernet.active_arch = sample(supernet.space, seed=supernet.seed, step=step)
            means.append(supernet(x).mean(0))
        supernet.classifier.bias -= torch.stack(means).mean(0)


def make_sides(
    args: argparse.Namespace, device: torch.device, num_classes: int
) -> tuple[dict[str, Callable[[Arch], Scores]], dict[str, float], MixPathSupernet, int]:
    """Return the sides, what each does once in seconds, the supernet and the number of images."""
    supernet = make_supernet(args, num_classes)
    # Data sets of their own, since a loader sets the transform of the one it reads
    (train_set, held_out), (_, plain_held_out) = open_split(args), open_split(args)
    data_config = resolve_data_config({}, model=supernet)
    settle(supernet, train_set, data_config)
    plain = make_supernet(args, num_classes)
    plain.load_state_dict(supernet.state_dict())
    plain.to(device)

    def prepare_ours() -> SupernetEvaluator:
        batches = load_batches(held_out, data_config, device=device, batch_size=args.batch_size, workers=args.workers)
        return SupernetEvaluator(supernet.to(device=device, memory_format=torch.channels_last), batches)

    once, evaluator = timed(prepare_ours, device)
    start = time.perf_counter()
    loader = create_loader(
        plain_held_out,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        device=device,
    )
    in_memory = [(x, y) for x, y in loader]  # starts the workers, too
    sides = {
        SIDES[0]: evaluator,
        SIDES[1]: partial(plain_scores, plain, loader),
        SIDES[2]: partial(plain_scores, plain, in_memory),
    }
    return sides, dict(ours=once, plain=time.perf_counter() - start), plain, len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_args(parser)
    parser.add_argument('--model', default='mixpath_nano_supernet', help='supernet (default: mixpath_nano_supernet)')
    parser.add_argument('--m', type=int, metavar='M', help="largest number of paths (default: the model's)")
    parser.add_argument('--data-dir', metavar='DIR', help="image folder (default: scikit-learn's digits)")
    parser.add_argument('--train-split', default='train', metavar='SPLIT', help='training split (default: train)')
    parser.add_argument('--holdout', type=float, default=0.1, metavar='X', help='share held out (default: 0.1)')
    parser.add_argument('--num-images', type=int, metavar='N', help='score with this many of it (default: all)')
    parser.add_argument('--batch-size', type=int, default=100, metavar='N', help='images per batch (default: 100)')
    parser.add_argument('--archs', type=int, default=20, metavar='N', help='timed candidates (default: 20)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='candidates before those (default: 2)')
    parser.add_argument('--workers', type=int, default=2, metavar='N', help='processes that decode (default: 2)')
    args = parser.parse_args()

    device = setup(args, f'Candidates per second of {args.model}, plain loop / SupernetEvaluator')
    num_classes = len(class_names(open_split(args)[0].dataset))
    sides, once, supernet, num_images = make_sides(args, device, num_classes)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    scores: dict[str, list[Scores]] = {name: [] for name in SIDES}
    for index in range(args.warmup + args.archs):
        arch = sample(supernet.space, seed=args.seed, step=index)
        for name in turns(SIDES, index):
            duration, result = timed(partial(sides[name], arch), device)
            scores[name].append(result)
            if index >= args.warmup:
                seconds[name].append(duration)

    top1 = [score['top1'] for score in scores['ours']]
    for name in SIDES[1:]:
        pairs = list(zip(scores['ours'], scores[name]))
        loss_error = max(abs(a['loss'] / b['loss'] - 1) for a, b in pairs)
        turned = max(abs(a['top1'] - b['top1']) * num_images / 100 for a, b in pairs)
        check(
            loss_error <= TOLERANCE and turned < 1.01,
            f'{len(pairs)} archs, ours and {name}: largest relative difference of the loss {loss_error:.1e}, '
            f'of top-1 {turned:.0f} of {num_images} images',
        )
    print(f'top-1 of the archs (random weights): {min(top1):.1f} % to {max(top1):.1f} %')

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print_table(
        (f'n = {args.archs} archs, {num_images} images', 'median ms', 'candidates/s', 'ratio', 'per arch'),
        [
            (
                name,
                f'{medians[name] * 1e3:.1f}',
                f'{1 / medians[name]:.2f}',
                f'{medians[name] / medians["ours"]:.2f}',
                median_range(side / ours for side, ours in zip(seconds[name], seconds['ours'])),
            )
            for name in SIDES
        ],
    )
    print(
        f'once, before the first candidate: ours {once["ours"]:.2f} s (decoding, folding), '
        f'plain {once["plain"]:.2f} s (start of the workers, first pass over the loader)'
    )


if __name__ == '__main__':
    main()
