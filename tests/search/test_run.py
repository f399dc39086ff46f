import csv
import json
from pathlib import Path

import pytest
from commands import torchrun
from conftest import small_args
from PIL import Image

from timm_mixpath import cli
from timm_mixpath.models.cost import cost_table
from timm_mixpath.search.accuracy import evaluate
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.search.images import SearchData, load_batches
from timm_mixpath.search.run import search_checkpoint
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import hold_out, open_dataset
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import UsageError

SMALL = SearchConfig(population=6, offspring=3, generations=2, seed=0)


def test_search_leaves_consistent_files(supernet_run: Path, tmp_path: Path) -> None:
    """Accuracy, MACs and params of the front, checked from scratch for the chosen arch."""
    result = search_checkpoint(supernet_run / 'last.pth.tar', tmp_path, SMALL, workers=0)
    assert len(result.evaluations) == 12
    loaded = load_model(supernet_run / 'last.pth.tar')
    _, search_set = hold_out(open_dataset('', loaded.args.data_dir, 'train'), 0.1)
    assert len(search_set) == 20
    chosen = result.chosen
    model = loaded.model.extract(chosen.arch)
    found = evaluate(model, load_batches(search_set, loaded.data_config, workers=0))
    assert found['top1'] == pytest.approx(chosen.top1) and found['loss'] == pytest.approx(chosen.loss, rel=1e-4)
    assert chosen.params == sum(p.numel() for p in model.parameters())

    front = json.loads((tmp_path / 'front.json').read_text())
    assert [c['arch'] for c in front['front'] if c['chosen']] == [str(chosen.arch)]
    rows = list(csv.DictReader((tmp_path / 'front.csv').read_text().splitlines()))
    assert [r['arch'] for r in rows] == [str(c.arch) for c in result.front]
    assert Image.open(tmp_path / 'pareto.png').size[0] > 600
    assert len((tmp_path / 'archive.jsonl').read_text().splitlines()) == 13


def test_search_respects_limits_and_recalibrates(supernet_run: Path, tmp_path: Path) -> None:
    table = cost_table(load_model(supernet_run / 'last.pth.tar').model, (3, 16, 16))
    limit = sum(table.bounds('macs')) // 2
    config = SearchConfig(population=6, offspring=3, generations=1, max_macs=limit)
    last = supernet_run / 'last.pth.tar'
    plain = search_checkpoint(last, tmp_path / 'a', config, workers=0)
    recalibrated = search_checkpoint(last, tmp_path / 'b', config, recalibration_images=64, workers=0)
    for result in (plain, recalibrated):
        assert all(c.macs <= limit for c in result.evaluations)
    assert [c.loss for c in plain.evaluations[:6]] != [c.loss for c in recalibrated.evaluations[:6]]


def test_other_checkpoint_does_not_continue_an_archive(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    search_checkpoint(supernet_run / 'last.pth.tar', tmp_path / 's', SMALL, workers=0)
    other = train(small_args(digits, tmp_path, epochs=1, seed=1)).output_dir
    before = (tmp_path / 's' / 'archive.jsonl').read_bytes()
    with pytest.raises(UsageError, match='checkpoint_sha256'):
        search_checkpoint(other / 'last.pth.tar', tmp_path / 's', SMALL, workers=0)
    assert (tmp_path / 's' / 'archive.jsonl').read_bytes() == before


def test_search_split_by_name_and_warning(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(small_args(digits, tmp_path, epochs=1, search_holdout=0.0)).output_dir
    search_checkpoint(run / 'last.pth.tar', tmp_path / 'a', SMALL, workers=0)
    assert 'trained on all training images' in caplog.text
    caplog.clear()
    data = SearchData(search_split='validation', num_images=30)
    result = search_checkpoint(run / 'last.pth.tar', tmp_path / 'b', SMALL, data, workers=0)
    assert 'trained on all' not in caplog.text
    assert result.fingerprint['num_images'] == 30 and result.fingerprint['split'] == 'validation'


def test_two_processes_find_what_one_finds(supernet_run: Path, tmp_path: Path) -> None:
    options = ['--population', '6', '--offspring', '3', '--generations', '1', '-j', '0', '--device', 'cpu']
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), *options]
    assert cli.main([*words, '--output', str(tmp_path / 'one')]) == 0
    result = torchrun(*words, '--output', str(tmp_path / 'two'))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('chosen (*)') == 1
    one, two = ((tmp_path / n / 'archive.jsonl').read_text() for n in ('one', 'two'))
    assert one == two


def test_not_a_supernet(digits: Path, tmp_path: Path) -> None:
    run = train(small_args(digits, tmp_path, model='mixpath_nano', epochs=1, val_split='')).output_dir
    with pytest.raises(UsageError, match='needs a supernet'):
        search_checkpoint(run / 'last.pth.tar', tmp_path / 's', SMALL)
