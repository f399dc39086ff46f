import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from commands import fails, torchrun
from conftest import small_args
from PIL import Image

from timm_mixpath import cli
from timm_mixpath.models.cost import cost_table, count_macs
from timm_mixpath.models.latency import measure_latency
from timm_mixpath.search.accuracy import evaluate
from timm_mixpath.search.config import SearchConfig
from timm_mixpath.search.images import SearchData, load_batches, open_search_split
from timm_mixpath.search.run import search_checkpoint
from timm_mixpath.train.checkpoint import load_model, read_checkpoint
from timm_mixpath.train.data import file_names, hold_out, open_dataset
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import UsageError

SMALL = SearchConfig(population=6, offspring=3, generations=2, seed=0)


def test_search_leaves_consistent_files(supernet_run: Path, tmp_path: Path) -> None:
    """Accuracy, MACs and params of the front, checked from scratch for the chosen arch."""
    result = search_checkpoint(supernet_run / 'last.pth.tar', tmp_path, SMALL, recalibration_images=0, workers=0)
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
    plain = search_checkpoint(last, tmp_path / 'a', config, recalibration_images=0, workers=0)
    recalibrated = search_checkpoint(last, tmp_path / 'b', config, recalibration_images=64, workers=0)
    for result in (plain, recalibrated):
        assert all(c.macs <= limit for c in result.evaluations)
    assert [c.loss for c in plain.evaluations[:6]] != [c.loss for c in recalibrated.evaluations[:6]]


def test_search_with_images_of_another_size(supernet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    last = supernet_run / 'last.pth.tar'
    result = search_checkpoint(last, tmp_path / 's', SMALL, img_size=24, recalibration_images=0, workers=0)
    assert result.fingerprint['input_size'] == result.fingerprint['cost_input_size'] == [3, 24, 24]
    loaded = load_model(last)
    chosen, model = result.chosen, loaded.model.extract(result.chosen.arch)
    assert chosen.macs == sum(count_macs(model, (3, 24, 24)).values())
    _, search_set = hold_out(open_dataset('', loaded.args.data_dir, 'train'), 0.1)
    batches = load_batches(search_set, {**loaded.data_config, 'input_size': (3, 24, 24)}, workers=0)
    assert evaluate(model, batches)['loss'] == pytest.approx(chosen.loss, rel=1e-4)

    # It is another search than that with the images of the training, also on the command line
    words = ['search', '--checkpoint', str(last), '--output', str(tmp_path / 's'), '-j', '0', '--device', 'cpu']
    words += ['--population', '6', '--offspring', '3', '--generations', '2', '--recalibration-images', '0']
    assert cli.main([*words, '--img-size', '24']) == 0
    assert cli.main(words) == 2 and "'input_size' was [3, 24, 24]" in capsys.readouterr().err
    assert cli.main([*words, '--img-size', '-1']) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith('image size -1 must be positive')


@pytest.mark.parametrize('options', [{}, dict(cost_input_size=(3, 24, 24), cost_num_classes=7)])
def test_latency_is_of_the_networks_whose_costs_are_counted(
    supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    measured = []

    def measure(model: torch.nn.Module, *, input_size: tuple[int, int, int], **kwargs: bool) -> float:
        measured.append(sum(count_macs(model, input_size).values()))
        return measure_latency(model, input_size=input_size, **kwargs)

    monkeypatch.setattr('timm_mixpath.search.run.measure_latency', measure)
    config = SearchConfig(population=3, offspring=3, generations=0)
    result = search_checkpoint(supernet_run / 'last.pth.tar', tmp_path, config, workers=0, latency=True, **options)
    assert measured == [c.macs for c in result.front]
    assert all(c.extra['latency_ms'] > 0 for c in result.front)


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


def test_images_that_were_trained_on_are_noticed(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / 'data'
    shutil.copytree(digits, data)
    args = small_args(data, tmp_path, epochs=1)
    run = train(args).output_dir
    loaded = load_model(run / 'last.pth.tar')
    search_set, _, _ = open_search_split(loaded, SearchData())
    names = file_names(search_set.dataset)
    kept = next(i for i in range(200) if i not in search_set.indices)
    (data / 'train' / names[kept]).unlink()  # which the search never needs
    now, _, _ = open_search_split(loaded, SearchData())
    assert [file_names(now.dataset)[i] for i in now.indices] == [names[i] for i in search_set.indices]
    assert 'trained on' not in caplog.text
    (data / 'train' / names[search_set.indices[0]]).unlink()
    open_search_split(loaded, SearchData())
    assert '(200 then, 198 now): some of those that are held out now may have been trained on' in caplog.text
    caplog.clear()
    train(Namespace(**{**vars(args), 'epochs': 2, 'resume': str(run / 'last.pth.tar')}))
    assert '(200 then, 198 now)' in caplog.text


def test_checkpoint_without_a_record_is_searched_on_the_images_of_its_time(
    digits: Path, supernet_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(supernet_run / 'last.pth.tar')
    del checkpoint['args'].held_out
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    loaded = load_model(tmp_path / 'old.pth.tar')
    search_set, _, _ = open_search_split(loaded, SearchData())
    _, expected = hold_out(open_dataset('', str(digits), 'train'), 0.1, by_position=True)
    assert search_set.indices == expected.indices and 'trained on' not in caplog.text
    _, other = hold_out(open_dataset('', str(digits), 'train'), 0.1)
    assert search_set.indices != other.indices


@pytest.mark.parametrize('by', ['pretrained_path', pytest.param('initial_checkpoint', marks=pytest.mark.slow)])
def test_start_from_a_training_that_held_the_same_out(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    backbone = 'mobilenetv3_small_050'
    supernet = dict(model='mixpath_supernet', model_kwargs=dict(backbone=backbone), epochs=1)
    for holdout, warns in ((0.1, False), (0.0, True)):
        own = dict(supernet, search_holdout=holdout)
        if by == 'pretrained_path':
            own['model'], own['model_kwargs'] = backbone, {}
        start = train(small_args(digits, tmp_path, **own, experiment=f'start{holdout}')).output_dir / 'last.pth.tar'
        options = {'pretrained': by == 'pretrained_path', by: str(start)}
        run = train(small_args(digits, tmp_path, **supernet, **options, experiment=f'own{holdout}')).output_dir
        caplog.clear()
        open_search_split(load_model(run / 'last.pth.tar'), SearchData())
        assert ('may have been, also on those that score archs now' in caplog.text) == warns


@pytest.mark.parametrize(
    'processes, batch_size, recalibration',
    [pytest.param(2, 6, 0, marks=pytest.mark.slow), (2, 6, 150), pytest.param(4, 8, 150, marks=pytest.mark.slow)],
)
def test_many_processes_find_what_one_finds(
    processes: int, batch_size: int, recalibration: int, supernet_run: Path, tmp_path: Path
) -> None:
    """20 images are 4 batches, the last of them smaller, or 3 batches for four processes; the latter get no share."""
    options = ['--population', '6', '--offspring', '3', '--generations', '1', '-j', '0', '--device', 'cpu']
    options += ['-b', str(batch_size), '--recalibration-images', str(recalibration)]
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), *options]
    assert cli.main([*words, '--output', str(tmp_path / 'one')]) == 0
    result = torchrun(*words, '--output', str(tmp_path / 'many'), processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('chosen (*)') == 1
    assert ('leave 1 of 4 processes without work' in result.stderr) == (processes == 4)
    one, many = ((tmp_path / n / 'archive.jsonl').read_text() for n in ('one', 'many'))
    assert one == many


def test_search_without_objectives_goes_on_as_it_began(supernet_run: Path, tmp_path: Path) -> None:
    """Earlier versions ranked by the error."""
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--population', '4', '--offspring', '2']
    words += ['-j', '0', '--device', 'cpu', '--recalibration-images', '0', '--output']
    before = [*words, str(tmp_path / 'old'), '--generations', '0', '--objectives', 'error', 'macs', 'params=2']
    assert cli.main(before) == 0
    for name, objectives in (
        ('old', dict(error=1.0, macs=1.0, params=2.0)),
        ('new', dict(loss=1.0, macs=1.0, params=1.0)),
    ):
        assert cli.main([*words, str(tmp_path / name), '--generations', '1']) == 0
        header, *records = (tmp_path / name / 'archive.jsonl').read_text().splitlines()
        assert json.loads(header)['config']['objectives'] == objectives and len(records) == 6
    (tmp_path / 'new' / 'archive.jsonl').write_text('nonsense')
    assert cli.main([*words, str(tmp_path / 'new')]) == 2


@pytest.mark.slow
def test_mixed_precision_is_part_of_the_archive(
    supernet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--population', '4', '--generations', '0']
    words += ['-j', '0', '--device', 'cpu', '--output', str(tmp_path)]
    assert cli.main([*words, '--amp', '--amp-dtype', 'bfloat16']) == 0
    records = [json.loads(line) for line in (tmp_path / 'archive.jsonl').read_text().splitlines()]
    assert records[0]['fingerprint']['amp_dtype'] == 'bfloat16'
    status, error = fails(capsys, words)
    assert status == 2 and '\'amp_dtype\' was "bfloat16" in the archive and is not given now' in error
    # Logits of the same weights, in fewer digits
    assert cli.main([*words[:-1], str(tmp_path / 'float32')]) == 0
    exact = [json.loads(line) for line in (tmp_path / 'float32' / 'archive.jsonl').read_text().splitlines()]
    losses = [(a['metrics']['loss'], b['metrics']['loss']) for a, b in zip(records[1:], exact[1:])]
    assert all(a != b and abs(a - b) < 0.1 for a, b in losses)


def test_large_splits_are_capped_with_one_line(
    supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr('timm_mixpath.search.images._DEFAULT_IMAGES', 7)
    config = SearchConfig(population=2, generations=0)
    with caplog.at_level('INFO'):
        result = search_checkpoint(
            supernet_run / 'last.pth.tar', tmp_path, config, device='cpu', workers=0, progress=False
        )
    assert result.fingerprint['num_images'] == 7
    assert 'Scoring archs on 7 of the 20 images of the search split; --num-images takes another number' in caplog.text


def test_not_a_supernet(digits: Path, tmp_path: Path) -> None:
    run = train(small_args(digits, tmp_path, model='mixpath_nano', epochs=1, val_split='')).output_dir
    with pytest.raises(UsageError, match='needs a supernet'):
        search_checkpoint(run / 'last.pth.tar', tmp_path / 's', SMALL)
