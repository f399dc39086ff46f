"""Images kept in memory for training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_args
from PIL import Image

from timm_mixpath.train.cached_loader import CachedLoader
from timm_mixpath.train.data import open_dataset
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import UsageError

CONFIG = dict(input_size=(3, 16, 16), mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), interpolation='bicubic')


def load(digits: Path, **kwargs) -> CachedLoader:
    return CachedLoader(open_dataset('', str(digits), 'train'), CONFIG, batch_size=32, workers=0, **kwargs)


def epoch(loader: CachedLoader, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader.set_epoch(number)
    x, y = zip(*loader)
    return torch.cat(x), torch.cat(y)


def plain_images(digits: Path) -> tuple[list[np.ndarray], list[int]]:
    """Resized and normalised by hand, [C, H, W] each."""
    images, labels = [], []
    for path in sorted((digits / 'train').glob('*/*.png')):
        pixels = np.asarray(Image.open(path).convert('RGB').resize((16, 16), Image.BICUBIC), dtype=np.float64) / 255
        images.append(((pixels - CONFIG['mean']) / CONFIG['std']).transpose(2, 0, 1))
        labels.append(int(path.parent.name))
    return images, labels


def test_images_are_those_of_the_files(digits: Path):
    x, y = epoch(load(digits, augment=False), 0)
    assert x.shape == (192, 3, 16, 16)  # 6 batches of 200 images
    assert x[:32].is_contiguous(memory_format=torch.channels_last)
    images, labels = plain_images(digits)
    found = {a.round(decimals=3).numpy().tobytes(): int(t) for a, t in zip(x.contiguous(), y)}
    expected = {np.round(a.astype(np.float32), 3).tobytes(): t for a, t in zip(images, labels)}
    assert len(found.items() & expected.items()) >= 190  # rounding may fall to either side in a few


def test_augmentation_shifts_by_up_to_an_eighth_and_flips(digits: Path):
    loader = load(digits, seed=3)
    x, y = epoch(loader, 0)
    images, labels = plain_images(digits)
    grey = (np.round(np.array(CONFIG['mean']) * 255) / 255 - CONFIG['mean']) / CONFIG['std']
    seen = set()
    for image, target in zip(x[:40].double().numpy(), y[:40].tolist()):
        matches = set()
        for plain in (a for a, t in zip(images, labels) if t == target):
            padded = np.tile(grey.reshape(3, 1, 1), (1, 20, 20))
            padded[:, 2:18, 2:18] = plain
            for top in range(5):
                for left in range(5):
                    window = padded[:, top : top + 16, left : left + 16]
                    for flip in (False, True):
                        if np.abs((window[:, :, ::-1] if flip else window) - image).max() < 0.01:
                            matches.add((top, left, flip))
        assert matches
        seen |= matches
    assert {flip for *_, flip in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(5))


def test_epochs_are_a_function_of_the_seed_and_their_number(digits: Path):
    first, second = load(digits, seed=1), load(digits, seed=1)
    epoch(first, 0)
    for a, b in zip(epoch(first, 1), epoch(second, 1)):
        assert torch.equal(a, b)
    assert not torch.equal(epoch(first, 2)[1], epoch(first, 1)[1])
    assert not torch.equal(epoch(load(digits, seed=2), 1)[1], epoch(first, 1)[1])


def test_ranks_share_an_epoch(digits: Path):
    parts = [epoch(load(digits, augment=False, rank=rank, world_size=2), 5)[0] for rank in (0, 1)]
    assert [len(p) for p in parts] == [96, 96]
    keys = [{a.numpy().tobytes() for a in p.contiguous()} for p in parts]
    assert not keys[0] & keys[1]


@pytest.mark.slow
def test_training_with_cached_images_resumes_bit_exactly(digits: Path, tmp_path: Path):
    options = dict(workers=1, cache_images=True, reprob=0.0, hflip=0.5, epochs=3)
    options['checkpoint_hist'] = 3  # whichever is best
    whole = train(small_args(digits, tmp_path / 'whole', **options)).output_dir
    part = train(small_args(digits, tmp_path / 'part', **options)).output_dir
    resumed = train(
        small_args(digits, tmp_path / 'resumed', **options, resume=str(part / 'checkpoint-1.pth.tar'))
    ).output_dir
    states = [torch.load(d / 'last.pth.tar', weights_only=False)['state_dict'] for d in (whole, resumed)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize('option', [dict(mixup=0.2), dict(aa='rand-m9'), dict(reprob=0.2)])
def test_other_augmentation_is_refused(digits: Path, tmp_path: Path, option):
    with pytest.raises(UsageError, match='--cache-images shifts and flips images and does nothing else'):
        train(small_args(digits, tmp_path, **{'reprob': 0.0, **option}, cache_images=True))
