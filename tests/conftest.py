"""Shared fixtures: small real images, and runs that the tests of several modules look at."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_mixpath.train.loop import train
from timm_mixpath.train.options import default_args

CLASSES = 10


def pytest_configure() -> None:
    # Small tensors gain nothing from threads, and threads that spin on busy cores lose a lot: a float64 depthwise
    # convolution is 10 times slower. OMP_NUM_THREADS=2 shows whether a result depends on their number.
    torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))  # of the processes that it starts, too


# Files that take longest: a process that gets one of them last works on alone
_LONGEST = (
    *('test_backbone', 'test_loop', 'test_adapt', 'test_supernet', 'test_checkpoint', 'test_distill'),
    *('test_recipes', 'test_timm_suite', 'test_recovery', 'test_data_parallel', 'test_streams'),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(scope='session')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folder of real handwritten digits: 200 for training, 50 for validation, 10 classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    root = tmp_path_factory.mktemp('digits')
    for label in range(CLASSES):
        images = data.images[data.target == label][:25]
        for index, image in enumerate(images):
            folder = root / ('train' if index < 20 else 'validation') / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(folder / f'{index:02d}.png')
    return root


def small_args(data_dir: Path, output: Path, /, **overrides: Any) -> Namespace:
    """Options of a run that takes seconds: nano supernet, 16x16 images, 2 epochs of 5 steps."""
    options = dict(
        model='mixpath_nano_supernet',
        data_dir=str(data_dir),
        output=str(output),
        experiment='run',
        device='cpu',
        img_size=16,
        num_classes=CLASSES,
        batch_size=32,
        epochs=2,
        lr=0.05,
        warmup_epochs=0,
        weight_decay=1e-3,
        sched_on_updates=True,
        channels_last=True,
        workers=0,
        hflip=0.0,
        scale=[0.7, 1.0],
        reprob=0.2,
        checkpoint_hist=2,
    )
    return default_args(**{**options, **overrides})


@pytest.fixture(scope='session')
def supernet_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short supernet run."""
    output = tmp_path_factory.mktemp('supernet')
    return train(small_args(digits, output, workers=1)).output_dir
