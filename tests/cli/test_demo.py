from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_mixpath.cli.demo import DemoConfig, digits_folder, run_demo
from timm_mixpath.utils.errors import UsageError

TINY = DemoConfig(img_size=16, supernet_epochs=1, train_epochs=2, batch_size=32, generations=1, workers=0, device='cpu')


def test_digits_are_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    folder = digits_folder()
    assert folder == tmp_path / 'timm_mixpath' / 'digits'
    assert len(list(folder.glob('train/*/*.png'))) == 1437 and len(list(folder.glob('validation/*/*.png'))) == 360
    before = folder.stat().st_mtime_ns
    assert digits_folder().stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == ['digits']


def test_demo_on_ones_own_images(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Supernet, search, training, model folder; cut off in the middle, the same call goes on and changes nothing."""
    images = tmp_path / 'images'
    for path in digits.glob('*/*/*.png'):  # of a kind that timm reads where it is told to
        other = images / path.relative_to(digits).with_suffix('.webp')
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(other, lossless=True)
    config = replace(TINY, data_dir=str(images), input_key='.webp')
    monkeypatch.setattr('timm_mixpath.cli.demo.save_model', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, tmp_path)
    archive = (tmp_path / 'search' / 'archive.jsonl').read_bytes()
    weights = (tmp_path / 'supernet' / 'last.pth.tar').read_bytes()
    monkeypatch.undo()

    folder = run_demo(config, tmp_path)
    assert (tmp_path / 'search' / 'archive.jsonl').read_bytes() == archive
    assert (tmp_path / 'supernet' / 'last.pth.tar').read_bytes() == weights
    out = capsys.readouterr().out
    assert 'chosen (*)' in out and 'on the validation split' in out
    line = out.strip().splitlines()[-1]
    model = eval(line, {'timm': timm}).eval()
    assert str(folder) in line
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert (tmp_path / 'search' / 'pareto.png').exists()

    with pytest.raises(UsageError, match='another seed \\(0, now 1\\)'):
        run_demo(replace(config, seed=1), tmp_path)


@pytest.mark.parametrize(
    'changes, text',
    [
        (dict(img_size=0), '--img-size 0 must be at least 1'),
        (dict(batch_size=0), '--batch-size 0 must be at least 1'),
        (dict(supernet_epochs=0), '--supernet-epochs 0 must be at least 1'),
        (dict(train_epochs=0), '--train-epochs 0 must be at least 1'),  # not behind supernet and search
        (dict(device='foo'), 'foo'),
        (dict(train_split='x'), 'x'),
    ],
)
def test_wrong_value_can_be_mended_in_the_same_folder(digits: Path, tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run_demo(replace(TINY, data_dir=str(digits), **changes), tmp_path / 'job')
    assert not (tmp_path / 'job').exists()
