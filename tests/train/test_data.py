"""Data sets and the classes that they number."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from PIL import Image

from timm_mixpath import cli
from timm_mixpath.search.images import SearchData, open_search_split
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import (
    Subset,
    check_classes,
    class_names,
    file_names,
    hold_out,
    open_dataset,
    split_record,
    targets,
)
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


def held_names(root: Path, fraction: float) -> set[str]:
    _, held = hold_out(open_dataset('', str(root), 'train'), fraction)
    names = file_names(held.dataset)
    return {names[i] for i in held.indices}


def test_a_file_more_or_less_moves_one_other_at_most(splits: Path, tmp_path: Path) -> None:
    for i in range(4, 10):
        for name in NAMES:
            shutil.copy(splits / 'train' / name / '0.png', splits / 'train' / name / f'{i}.png')
    before = held_names(splits, 0.3)
    assert len(before) == 12 and {name.split('/')[0] for name in before} == set(NAMES)
    shutil.copytree(splits, tmp_path / 'moved')
    assert held_names(tmp_path / 'moved', 0.3) == before
    for file in sorted((splits / 'train').glob('*/*.png')):
        content, name = file.read_bytes(), f'{file.parent.name}/{file.name}'
        file.unlink()
        now = held_names(splits, 0.3)
        assert len(now - before) <= 1 and before - now <= {name}
        assert all(new.startswith(file.parent.name) for new in now - before)
        file.write_bytes(content)


def test_record_of_a_split_tells_whether_it_is_the_same(splits: Path) -> None:
    def record(by_position: bool) -> dict:
        return split_record(hold_out(open_dataset('', str(splits), 'train'), 0.25, by_position=by_position)[1])

    before = record(False)
    assert before['named'] and before['num_images'] == 16 and record(False) == before
    held = sorted(held_names(splits, 0.25))[0]
    (splits / 'train' / held).unlink()
    assert record(False)['digest'] != before['digest']


def test_of_few_images_half_of_one_is_one(splits: Path) -> None:
    for i in range(4, 205):
        shutil.copy(splits / 'train' / 'cat' / '0.png', splits / 'train' / 'cat' / f'{i}.png')
    for name in NAMES[:3]:
        shutil.copy(splits / 'train' / name / '0.png', splits / 'train' / name / '4.png')
    assert {name.split('/')[0] for name in held_names(splits, 0.1)} == set(NAMES)


def test_a_damaged_file_is_replaced_by_one_of_its_own_part(splits: Path) -> None:
    dataset = open_dataset('', str(splits), 'train')
    names = file_names(dataset)
    parts = Subset(dataset, range(0, 16, 2)), Subset(dataset, range(1, 16, 2))
    expected = [np.asarray(parts[0][i][0]) for i in range(8)]
    for i in (4, 14):
        (splits / 'train' / names[i]).write_bytes(b'no image')
    # By one index and by many, as a loader asks
    for got in ([parts[0][i] for i in range(8)], parts[0].__getitems__(list(range(8)))):
        for i, j in enumerate([0, 1, 3, 3, 4, 5, 6, 0]):
            assert np.array_equal(np.asarray(got[i][0]), expected[j])


def as_webp(folder: Path, *, keep: int = 0) -> None:
    for file in sorted(folder.glob('*.png'))[keep:]:
        Image.open(file).save(file.with_suffix('.webp'), lossless=True)
        file.unlink()


def test_a_class_of_files_that_are_not_read_is_refused(splits: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ('train', 'validation'):
        as_webp(splits / split / 'cat')
    line = refused(capsys, train_words(splits, '--num-classes', '3'))
    assert f"the 4 images in '{splits}/train/cat' are of a kind that is not read (.webp)" in line
    # before an `adapt` or `demo`, which ask nobody for a number of classes
    adapt = ['adapt', '--backbone', 'mobilenetv3_small_050', '--data-dir', str(splits), '--max-macs', '1G']
    assert '/train/cat' in refused(capsys, [*adapt, '--output', str(splits.parent / 'job')])
    key = line.split('--input-key ')[1].strip("'")
    assert key == '.jpeg;.jpg;.png;.webp'
    assert len(open_dataset('', str(splits), 'train', input_key=key, num_classes=4)) == 16
    assert cli.main(train_words(splits, '--input-key', key)) == 0


def test_some_files_that_are_not_read_are_counted(splits: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_webp(splits / 'train' / 'cat', keep=1)
    (splits / 'train' / 'cat' / 'readme.txt').write_text('of no kind of image')
    assert len(open_dataset('', str(splits), 'train')) == 13
    assert "split 'train': 3 images are left out, of a kind that is not read (.webp)" in caplog.text


def test_class_map(splits: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    class_map = splits.parent / 'classes.txt'
    class_map.write_text('\n'.join(['airplane', 'automobile', 'brid', 'cat']))
    open_dataset('', str(splits), 'train', class_map=str(class_map))
    assert "folder 'bird' is left out" in caplog.text and "has no images of 'brid'" in caplog.text
    class_map.write_text('\n'.join(['airplane', 'airplane', 'automobile', 'bird', 'cat']))
    line = refused(capsys, train_words(splits, '--class-map', str(class_map)))
    assert "4 classes the indices '1', '2', '3', '4', they have to be those from 0 on" in line
    torch_words = ['--dataset', 'torch/folder', '--class-map', str(class_map)]
    assert "--class-map has no effect on 'torch/folder'" in refused(capsys, train_words(splits, *torch_words))


@pytest.mark.parametrize('cached', [False, True])
def test_images_of_torchvision_are_converted(splits: Path, cached: bool) -> None:
    words = ['--dataset', 'torch/folder', '--in-chans', '1', *(['--cache-images'] if cached else [])]
    assert cli.main(train_words(splits, *words)) == 0
    args = dict(input_img_mode='L')
    ours, theirs = (open_dataset(name, str(splits), 'train', **args) for name in ('', 'torch/folder'))
    assert file_names(ours) == file_names(theirs) and class_names(ours) == class_names(theirs)
    assert targets(ours) == targets(theirs)
    theirs = pickle.loads(pickle.dumps(theirs))  # as for a process that loads images
    for i in range(16):
        (a, label), (b, other) = ours[i], theirs[i]
        assert label == other and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    'words, message',
    [
        (['--in-chans', '4'], 'images of 4 channels have no usual mode; pass --input-img-mode'),
        (['--in-chans', '4', '--input-img-mode', 'RGB'], '--input-img-mode RGB has 3 channels, the model takes 4'),
        (['--input-img-mode', 'rgb'], "--input-img-mode 'rgb' is no mode of Pillow"),
    ],
)
def test_modes_that_do_not_fit_the_channels(
    splits: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert message in refused(capsys, train_words(splits, *words))


def test_classes_that_the_search_never_sees_are_counted(splits: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4, 40):
        shutil.copy(splits / 'train' / 'cat' / '0.png', splits / 'train' / 'cat' / f'{i}.png')
    assert cli.main(train_words(splits, '--search-holdout', '0.1', '--experiment', 'few')) == 0
    open_search_split(load_model(splits.parent / 'out' / 'few' / 'last.pth.tar'), SearchData())
    assert '3 of 4 classes have too few images to hold out 0.1 of them' in caplog.text
