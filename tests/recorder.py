"""Imported through --device-modules in a training process: writes what every rank samples and ends up with."""

import atexit
import os
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy

from timm_mixpath.models.mixpath import MixPathSupernet

folder = Path(os.environ['RECORDER_DIR'])
rank = os.environ.get('RANK', '0')
models: list[MixPathSupernet] = []
original = MixPathSupernet._sample


def record(self: MixPathSupernet) -> None:
    if self not in models:
        models.append(self)
    original(self)
    with open(folder / f'archs-{rank}.txt', 'a') as f:
        f.write(f'{self.sampled_arch}\n')


def dump() -> None:
    if models:
        torch.save(models[0].state_dict(), folder / f'weights-{rank}.pt')


loss = LabelSmoothingCrossEntropy.forward


def record_labels(self: LabelSmoothingCrossEntropy, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with open(folder / f'labels-{rank}.txt', 'a') as f:
        f.write(f'{target.tolist()}\n')
    return loss(self, x, target)


LabelSmoothingCrossEntropy.forward = record_labels
MixPathSupernet._sample = record
atexit.register(dump)
