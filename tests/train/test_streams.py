"""Data sets of other kinds: a real webdataset of a few shards, tables of the Hub's kind in files."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from commands import fails, torchrun
from PIL import Image

from timm_mixpath import cli
from timm_mixpath.search.images import SearchData, load_batches, open_search_split
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import open_dataset, targets

pytest.importorskip('webdataset')

CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.3,) * 3, crop_pct=1.0)


@pytest.fixture(scope='module')
def shards(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 training images in four shards, 50 validation images in two; the class also in JSON, as `digit`."""
    root = tmp_path_factory.mktemp('shards')
    for split, count in (('train', 4), ('validation', 2)):
        files = sorted((digits / split).glob('*/*.png'), key=lambda path: (path.name, path.parent.name))
        for shard in range(count):
            with tarfile.open(root / f'{split}-{shard:04d}.tar', 'w') as tar:
                for index, path in enumerate(files[shard::count]):
                    data = io.BytesIO()
                    Image.open(path).convert('RGB').save(data, 'PNG')
                    label = path.parent.name
                    entries = {
                        'png': data.getvalue(),
                        'cls': label.encode(),
                        'json': json.dumps({'digit': label}).encode(),
                    }
                    for extension, content in entries.items():
                        info = tarfile.TarInfo(f'{shard:02d}{index:04d}.{extension}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return root


def options(shards: Path, *more: str) -> list[str]:
    words = f'--dataset wds/digits --data-dir {shards} --train-split train-{{0000..0002}}.tar --device cpu'
    return [*words.split(), *more]


def test_supernet_trains_on_some_shards_and_is_searched_on_another(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = ['train', '--model', 'mixpath_nano_supernet', '--num-classes', '10', '--img-size', '16', '-b', '32']
    train += ['--epochs', '2', '--val-split', 'validation-{0000..0001}.tar', '--output', str(tmp_path), '-j', '1']
    train += ['--experiment', 'run', '--warmup-epochs', '0', *options(shards)]
    status, error = fails(capsys, [*train, '--train-num-samples', '150'])
    assert status == 2 and 'can not be held out one by one; train with --search-holdout 0' in error
    status, error = fails(capsys, [*train, '--search-holdout', '0'])
    assert status == 1 and 'num_samples not specified' in error
    keys = ['--input-key', 'jpg;png', '--target-key', 'digit']  # timm calls the decoded image jpg in any case
    assert cli.main([*train, '--search-holdout', '0', '--train-num-samples', '150', *keys]) == 0
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3

    # Nothing tells the classes of a stream before they are met
    few = [*train, '--search-holdout', '0', '--train-num-samples', '150', '--experiment', 'few', '--num-classes', '2']
    status, error = fails(capsys, few)
    assert status == 2 and "is not one of the model's 2 classes" in error and '--num-classes' in error

    search = f'search --checkpoint {tmp_path}/run/last.pth.tar --search-split train-0003.tar --population 4'
    search += ' --offspring 2 --generations 1 --num-images 30 --recalibration-images 64 -b 8 -j 1 --device cpu'
    assert cli.main([*search.split(), '--output', str(tmp_path / 'one')]) == 0
    result = torchrun(*search.split(), '--output', str(tmp_path / 'two'))
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = ((tmp_path / name / 'archive.jsonl').read_text() for name in ('one', 'two'))
    assert one == two
    fingerprint = json.loads(one.splitlines()[0])['fingerprint']
    assert fingerprint['num_images'] == 30 and fingerprint['split'] == 'train-0003.tar'


@pytest.mark.parametrize('workers', [0, 3])
def test_first_images_are_those_of_the_shard_in_its_order(shards: Path, workers: int) -> None:
    dataset = open_dataset('wds/digits', str(shards), 'train-{0000..0003}.tar')
    batches = load_batches(dataset, CONFIG, batch_size=20, max_images=70, workers=workers)
    assert [len(y) for _, y in batches] == [20, 20, 20, 10]
    labels = [label for _, y in batches for label in y.tolist()]
    names: list[str] = []
    for shard in (0, 1):
        with tarfile.open(shards / f'train-{shard:04d}.tar') as tar:
            names += [tar.extractfile(m).read().decode() for m in tar if m.name.endswith('.cls')]
    assert labels == [int(name) for name in names[:70]]


@pytest.fixture(scope='module')
def tables(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as Parquet files, as data sets of the Hub have them."""
    datasets = pytest.importorskip('datasets')
    root = tmp_path_factory.mktemp('tables')
    names = [str(label) for label in range(10)]
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)})
    for split in ('train', 'validation'):
        files = sorted((digits / split).glob('*/*.png'))
        columns = {'image': [str(path) for path in files], 'label': [path.parent.name for path in files]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(root / 'data' / f'{split}-00000-of-00001.parquet')
    return root


@pytest.mark.parametrize('kind', ['hfds', pytest.param('hfids', marks=pytest.mark.slow)])
def test_tables_train_hold_out_and_are_searched(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    cache = tmp_path / 'cache'
    cache.mkdir()
    train = ['train', '--model', 'mixpath_nano_supernet', '--num-classes', '10', '--img-size', '16', '-b', '32']
    train += ['--dataset', f'{kind}/{tables}', '--data-dir', str(cache), '--epochs', '1', '--warmup-epochs', '0']
    train += ['--output', str(tmp_path), '-j', '1', '--device', 'cpu', '--experiment']
    search = f'search --checkpoint {tmp_path}/run/last.pth.tar --population 4 --offspring 2 --generations 1'
    search += f' --num-images 20 --recalibration-images 32 -j 1 --device cpu --output {tmp_path}/search'
    if kind == 'hfds':
        assert cli.main([*train, 'run']) == 0
        loaded = load_model(tmp_path / 'run' / 'last.pth.tar')
        held, _, _ = open_search_split(loaded, SearchData(data_dir=str(cache)))
        assert sorted(targets(held.dataset)[i] for i in held.indices) == sorted([*range(10)] * 2)  # two of each class
        for keys, text in (
            (['--input-key', 'img'], '--input-key img'),
            (['--target-key', 'digit'], '--target-key digit'),
        ):
            status, error = fails(capsys, [*train, 'other', *keys])
            assert status == 2 and text in error and error.strip().endswith('its columns are image, label')
    else:
        status, error = fails(capsys, [*train, 'other', '--search-holdout', '0'])
        assert status == 2 and "does not tell how many images split 'train' has; pass --train-num-samples" in error
        numbers = ['--search-holdout', '0', '--train-num-samples', '200', '--val-num-samples', '50']
        assert cli.main([*train, 'run', *numbers]) == 0
        search += ' --search-split validation'
        status, error = fails(capsys, [*train, 'other', *numbers, '--target-key', 'digit'])
        assert status == 1 and 'check --input-key and --target-key' in error
    assert cli.main(search.split()) == 0
    assert (tmp_path / 'search' / 'front.csv').exists()
