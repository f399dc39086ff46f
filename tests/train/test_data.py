"""Data sets and the classes that they number."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from PIL import Image

from timm_mixpath import cli
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import check_classes, open_dataset
from timm_mixpath.utils.errors import UsageError

NAMES = ('airplane', 'automobile', 'bird', 'cat')


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name in NAMES:
            folder = tmp_path / 'd' / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'd'


def train_words(splits: Path, *more: str) -> list[str]:
    words = [
        '--img-size',
        '32',
        '--epochs',
        '1',
        '--warmup-epochs',
        '0',
        '-b',
        '8',
        '-vb',
        '8',
        '-j',
        '0',
        '--num-classes',
        '4',
        '--search-holdout',
        '0.25',
    ]
    out = splits.parent / 'out'
    words += ['--search-holdout', '0.25', '--data-dir', str(splits), '--output', str(out)]
    return ['train', '--model', 'mixpath_nano_supernet', *words, *more]


def refused(capsys: pytest.CaptureFixture, words: list[str]) -> str:
    status, line = fails(capsys, words)
    assert status == 2, line
    return line


def test_splits_of_renamed_classes_are_refused_before_the_first_step(splits: Path, capsys) -> None:
    (splits / 'validation' / 'bird').rename(splits / 'validation' / 'zebra')
    line = refused(capsys, train_words(splits))
    assert "only split 'train' has 'bird', only split 'validation' has 'zebra'" in line and '--class-map' in line
    assert not list((splits.parent / 'out').glob('*/*.pth.tar'))

    class_map = splits.parent / 'classes.txt'
    class_map.write_text('\n'.join([*NAMES, 'zebra']))
    assert cli.main(train_words(splits, '--class-map', str(class_map), '--num-classes', '5')) == 0


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_an_empty_class_folder_is_named(splits: Path, capsys, split: str) -> None:
    """timm takes it for no class: a number of classes that suits one split never suits the other."""
    shutil.rmtree(splits / split / 'bird')
    (splits / split / 'bird').mkdir()
    for num_classes in ('3', '4'):
        line = refused(capsys, train_words(splits, '--num-classes', num_classes))
        assert "has 'bird' (without images: 'bird')" in line and 'pass --num-classes' not in line
    other = {'train': 'validation', 'validation': 'train'}[split]
    shutil.rmtree(splits / other / 'bird')
    (splits / other / 'bird').mkdir()
    line = refused(capsys, train_words(splits))
    assert "has 3 classes (without images: 'bird') but the model has 4" in line and 'fill or remove' in line


def test_a_missing_class_in_one_split_and_another_order(splits: Path, capsys) -> None:
    shutil.rmtree(splits / 'validation' / 'airplane')
    assert "only split 'train' has 'airplane'" in refused(capsys, train_words(splits))
    train, other = open_dataset('', str(splits), 'train'), open_dataset('', str(splits), 'train')
    other.reader.class_to_idx = dict(zip(reversed(NAMES), range(4)))
    with pytest.raises(UsageError, match="split 'a' numbers them in another order"):
        check_classes({"split 'a'": train, "split 'b'": other})
    unknown = torch.utils.data.TensorDataset(torch.zeros(3))  # tells no classes
    assert check_classes({'x': unknown}, 7) is None and check_classes({'x': train, 'y': unknown}, 4) == list(NAMES)


def test_a_checkpoint_knows_its_classes(splits: Path, capsys) -> None:
    """Searched, ranked, measured, exported and resumed on images whose classes are others, but as many."""
    assert cli.main(train_words(splits, '--experiment', 'run')) == 0
    last = str(splits.parent / 'out' / 'run' / 'last.pth.tar')
    assert load_model(last).label_names == list(NAMES)
    for split in ('train', 'validation'):
        (splits / split / 'bird').rename(splits / split / 'zebra')
    text = "only the training of the checkpoint has 'bird', only split 'train' has 'zebra'"
    for words in (
        ['search', '--checkpoint', last, '--output', str(splits.parent / 's')],
        ['search', '--checkpoint', last, '--output', str(splits.parent / 's'), '--search-split', 'validation'],
        ['stats', '--checkpoint', last],
        ['export', '--checkpoint', last, '--output', str(splits.parent / 'm'), '--recalibration-images', '8',
         '--arch', 'k3_e6' + ',k3_e6' * 7],
        train_words(splits, '--resume', last, '--epochs', '2'),
    ):  # fmt: skip
        assert text in refused(capsys, words), words
