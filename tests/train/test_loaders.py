"""Loaders of a training, made by timm."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import small_args

from timm_mixpath.train import loop
from timm_mixpath.train.data import open_dataset
from timm_mixpath.train.loaders import create_loaders
from timm_mixpath.train.loop import train
from timm_mixpath.train.recovery import batches_behind

CONFIG = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)


def test_order_of_several_processes_is_of_the_seed(digits: Path, tmp_path: Path) -> None:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        orders = []
        for seed in (0, 1, 1):
            args = small_args(digits, tmp_path, seed=seed, workers=0)
            args.distributed, args.rank, args.world_size = True, 0, 1
            train_set = open_dataset('', str(digits), 'train')
            loader, _, _ = create_loaders(args, CONFIG, train_set, None, torch.device('cpu'))
            orders.append(list(loader.sampler))
    finally:
        dist.destroy_process_group()
    assert orders[0] != orders[1] == orders[2]


@pytest.mark.parametrize('keeps_workers', [False, True])
def test_mixup_ends(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_workers: bool) -> None:
    mixed: list[bool] = []

    def recorded(loader: Any, start: int) -> Any:
        for x, y in batches_behind(loader, start):
            mixed.append(bool((y.max(dim=1).values < 1).any()))
            yield x, y

    monkeypatch.setattr(loop, 'batches_behind', recorded)
    mixup = dict(workers=1, mixup=1.0, mixup_off_epoch=1, smoothing=0.0)
    train(small_args(digits, tmp_path, use_multi_epochs_loader=keeps_workers, **mixup))
    assert mixed == [True] * 5 + [False] * 5
