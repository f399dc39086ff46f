"""`timm-mixpath rank` from a checkpoint and a table to its files."""

import contextlib
import csv
import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import torchrun
from PIL import Image

from timm_mixpath import cli, get_space, sample
from timm_mixpath.analysis.ranking import RankConfig
from timm_mixpath.analysis.run import rank_checkpoint
from timm_mixpath.hub.export import export
from timm_mixpath.models.cost import CostTable
from timm_mixpath.search.accuracy import SupernetEvaluator, evaluate, recalibrate_bn
from timm_mixpath.search.images import SearchData, load_batches, recalibration_batches
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import hold_out, open_dataset
from timm_mixpath.utils.errors import RunError, UsageError

NANO = get_space('nano')
FAST = dict(recalibration_images=32, workers=0, device='cpu')


@pytest.fixture(scope='module')
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 archs with accuracies that are made up, but larger for larger archs; two rows can not be used."""
    cost, rng = CostTable(NANO), np.random.default_rng(0)
    path = tmp_path_factory.mktemp('table') / 'nano.csv'
    archs = [sample(NANO, seed=1, step=i) for i in range(24)]
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(('cell', 'val_acc_108'))
        writer.writerows((a, round(0.5 + cost.params(a) / 2e6 + 0.02 * rng.random(), 4)) for a in archs)
        writer.writerows([(sample(NANO, seed=1, step=24), ''), ('k3_e6', 0.5)])
    return path


@pytest.fixture
def scores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many runs: counting costs and drawing take longer than scoring a few archs."""
    cost = CostTable(NANO)
    monkeypatch.setattr('timm_mixpath.analysis.run.cost_table', lambda *args: cost)
    monkeypatch.setattr('timm_mixpath.analysis.run.plot_ranking', lambda *args: None)


class Stop:
    """Lets so many archs be evaluated, then stops with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None) -> None:
        self.archs: list[str] = []
        original = SupernetEvaluator.__call__

        def call(evaluator: SupernetEvaluator, arch: str) -> dict[str, float]:
            if after is not None and len(self.archs) >= after and arch not in self.archs:
                raise KeyboardInterrupt
            if arch not in self.archs:
                self.archs.append(arch)
            return original(evaluator, arch)

        monkeypatch.setattr(SupernetEvaluator, '__call__', call)


def test_files_hold_what_evaluation_gives(supernet_run: Path, table: Path, tmp_path: Path, caplog) -> None:
    """Scores of both kinds, costs and files, checked from scratch."""
    caplog.set_level(logging.INFO)
    config = RankConfig(num_archs=12, top_k=(3, 5, 50), num_resamples=100)
    two_batches = {**FAST, 'recalibration_images': 64}
    result = rank_checkpoint(supernet_run / 'last.pth.tar', table, tmp_path, config, **two_batches)
    assert len(result.archs) == 12 and list(result.statistics) == ['trained', 'recalibrated', 'macs', 'params']
    assert 'nano.csv: left out 1 row with no accuracy (first: line 26' in caplog.text
    assert 'nano.csv: left out 1 row with an arch that is not in the space (first: line 27' in caplog.text
    scored_on = "on 20 images held out of split 'train'"
    assert f"Ranking 12 of the 24 archs of nano.csv, column 'val_acc_108', {scored_on}" in caplog.text
    assert 'Rank: 12/12  top-1 ' in caplog.text

    loaded = load_model(supernet_run / 'last.pth.tar')
    train_set, search_set = hold_out(open_dataset('', loaded.args.data_dir, 'train'), 0.1)
    batches = load_batches(search_set, loaded.data_config, workers=0)
    calibration = recalibration_batches(train_set, loaded, 64, workers=0)
    accuracies = {row['cell']: row['val_acc_108'] for row in csv.DictReader(table.read_text().splitlines())}
    for ranked in result.archs[:2]:
        model = loaded.model.extract(ranked.arch)
        found = evaluate(model, batches)
        assert ranked.accuracy == pytest.approx(100 * float(accuracies[ranked.arch]))
        assert ranked.top1 == pytest.approx(found['top1']) and ranked.loss == pytest.approx(found['loss'], rel=1e-4)
        with recalibrate_bn(loaded.model, ranked.arch, calibration) as supernet:
            found = evaluate(supernet, batches)
        assert ranked.top1_recalibrated == pytest.approx(found['top1'])
        assert ranked.loss_recalibrated == pytest.approx(found['loss'], rel=1e-4) != ranked.loss
        assert ranked.params == sum(p.numel() for p in model.parameters())

    assert sorted(p.name for p in tmp_path.iterdir()) == ['archive.jsonl', 'ranking.csv', 'ranking.json', 'ranking.png']
    assert Image.open(tmp_path / 'ranking.png').size[0] > 1200
    rows = list(csv.DictReader((tmp_path / 'ranking.csv').read_text().splitlines()))
    assert [row['arch'] for row in rows] == [r.arch for r in result.archs]
    content = json.loads((tmp_path / 'ranking.json').read_text())
    assert content['fingerprint'] == json.loads(json.dumps(result.fingerprint))
    assert content['table']['num_usable'] == 24 and content['table']['accuracy_column'] == 'val_acc_108'
    assert list(content['statistics']['trained']['all']['top_k_overlap']) == ['3', '5']


def test_equal_cost_and_noise_of_the_table(supernet_run: Path, table: Path, tmp_path: Path, capsys, caplog) -> None:
    rows = list(csv.DictReader(table.read_text().splitlines()))
    with open(tmp_path / 'seeds.csv', 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['arch', 'accuracy', 'accuracies'])
        for i, row in enumerate(r for r in rows if r['val_acc_108'] and r['cell'] in known_archs(rows)):
            accuracy = 100 * float(row['val_acc_108'])
            writer.writerow([row['cell'], accuracy, f'{accuracy - i % 3:.4f} {accuracy + i % 3:.4f}'])
    words = ['rank', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--table', str(tmp_path / 'seeds.csv')]
    words += ['--output', str(tmp_path / 'r'), '--band', 'macs', '3%', '-j', '0', '--device', 'cpu']
    assert cli.main([*words, '--recalibration-images', '0', '--num-resamples', '20']) == 0
    out = capsys.readouterr().out
    assert 'pairs of archs within 0.03 of each other in macs' in out and 'between single seeds of the table' in out
    content = json.loads((tmp_path / 'r' / 'ranking.json').read_text())
    assert content['config']['band'] == ['macs', 0.03] and content['seeds'].keys() == {'all', 'equal_cost'}
    assert 0 < content['seeds']['all']['tau'] < content['seeds']['all']['ceiling'] <= 1
    assert 'different numbers of seeds' not in caplog.text

    # No two archs of the very same cost
    assert cli.main([*words, '--recalibration-images', '0', '--num-resamples', '20', '--band', 'params', '0%']) == 0
    out = capsys.readouterr().out
    assert 'no two archs are of equal params, so there is nothing to rank there; widen --band' in out
    assert 'between single seeds of the table:' in out and 'nan' not in out.split('no two archs')[1]

    # A table whose second seed has only begun
    lines = (tmp_path / 'seeds.csv').read_text().splitlines()
    lines[5:] = [line.rpartition(' ')[0] for line in lines[5:]]
    (tmp_path / 'begun.csv').write_text('\n'.join(lines))
    words[words.index(str(tmp_path / 'seeds.csv'))] = str(tmp_path / 'begun.csv')
    words[words.index(str(tmp_path / 'r'))] = str(tmp_path / 'begun')
    assert cli.main([*words, '--recalibration-images', '0', '--num-resamples', '20']) == 0
    assert f'different numbers of seeds ({len(lines) - 5} with 1, 4 with 2)' in caplog.text
    assert 'between single seeds' not in capsys.readouterr().out


def known_archs(rows: list[dict[str, str]]) -> set[str]:
    """Archs of the space among the rows."""
    found = set()
    for row in rows:
        with contextlib.suppress(ValueError):
            found.add(str(get_space('nano').arch(row['cell'])))
    return found


@pytest.mark.usefixtures('scores_only')
def test_cut_off_goes_on(supernet_run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, config = supernet_run / 'last.pth.tar', RankConfig(num_archs=10, num_resamples=10)
    with monkeypatch.context() as patch:
        Stop(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            rank_checkpoint(last, table, tmp_path / 'cut', config, **FAST)
    path = tmp_path / 'cut' / 'archive.jsonl'
    assert len(path.read_text().splitlines()) == 1 + 4
    path.write_bytes(path.read_bytes()[:-20])  # the last line was not written whole

    with monkeypatch.context() as patch:
        counter = Stop(patch)
        resumed = rank_checkpoint(last, table, tmp_path / 'cut', config, **FAST)
        assert len(counter.archs) == 10 - 3
    whole = rank_checkpoint(last, table, tmp_path / 'whole', config, **FAST)
    np.testing.assert_equal(asdict(resumed), asdict(whole))  # a score that is constant on a CPU has no correlation: NaN
    assert path.read_bytes() == (tmp_path / 'whole' / 'archive.jsonl').read_bytes()

    # More archs go on with it, another score needs no evaluation at all
    with monkeypatch.context() as patch:
        counter = Stop(patch)
        more = rank_checkpoint(last, table, tmp_path / 'cut', RankConfig(num_archs=13, num_resamples=10), **FAST)
        assert len(counter.archs) == 3 and more.archs[:10] == whole.archs
        config = RankConfig(num_archs=13, score='loss', top_k=(2,), num_resamples=20)
        losses = rank_checkpoint(last, table, tmp_path / 'cut', config, **FAST)
        assert len(counter.archs) == 3 and losses.archs == more.archs
        assert losses.statistics['trained'] != more.statistics['trained']
        with pytest.raises(UsageError, match='of a ranking with 13 archs, now it is 10, but the number can only grow'):
            rank_checkpoint(last, table, tmp_path / 'cut', RankConfig(num_archs=10), **FAST)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join([*lines[:2], *lines[3:]]))
    with pytest.raises(RunError, match='evaluation 1 has index 2, this ranking'):
        rank_checkpoint(last, table, tmp_path / 'cut', RankConfig(num_archs=13), **FAST)


@pytest.mark.usefixtures('scores_only')
def test_other_runs_do_not_go_on(supernet_run: Path, table: Path, tmp_path: Path) -> None:
    last, config = supernet_run / 'last.pth.tar', RankConfig(num_archs=10, num_resamples=10)
    output = tmp_path / 'r'
    rank_checkpoint(last, table, output, config, **FAST)
    before = (output / 'archive.jsonl').read_bytes()
    lines = table.read_text().splitlines(keepends=True)
    (tmp_path / 'other.csv').write_text(''.join(lines[:-3]))
    checkpoint = torch.load(last, weights_only=False)
    checkpoint['state_dict']['classifier.bias'] += 1
    torch.save(checkpoint, tmp_path / 'other.pth.tar')
    for entry, arguments, kwargs in (
        ('checkpoint_sha256', (tmp_path / 'other.pth.tar', table, output, config), {}),
        ('table_archs', (last, tmp_path / 'other.csv', output, config), {}),
        ('num_images', (last, table, output, config, SearchData(num_images=10)), {}),
        ('recalibration_images', (last, table, output, config), dict(recalibration_images=16)),
        ('seed', (last, table, output, RankConfig(num_archs=10, seed=1)), {}),
    ):
        with pytest.raises(UsageError, match=f'entry {entry!r} was .* choose another output or delete'):
            rank_checkpoint(*arguments, **{**FAST, **kwargs})
        assert (output / 'archive.jsonl').read_bytes() == before


def test_without_output_and_recalibration(
    supernet_run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ['rank', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--table', str(table), '--num-archs', '100']
    words += ['--recalibration-images', '0', '--num-images', '10', '--top-k', '4', '--num-resamples', '20', '-j', '0']
    assert cli.main([*words, '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "24 archs of nano.csv, column 'val_acc_108'; supernet scored on 10 images held out of split 'train'\n"
    )
    assert 'supernet, BN as trained' in out and 'recalibrated' not in out and 'top-4 overlap' in out
    assert 'has 24 archs that can be used, fewer than the 100 asked for: all are taken' in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_rank_as_one(supernet_run: Path, table: Path, tmp_path: Path) -> None:
    words = ['rank', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--table', str(table), '--num-archs', '11']
    words += ['--recalibration-images', '64', '--num-resamples', '10', '-j', '0', '--device', 'cpu']
    assert cli.main([*words, '--output', str(tmp_path / 'one')]) == 0
    result = torchrun(*words, '--output', str(tmp_path / 'two'))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('scores, statistics and plot are in') == 1
    for name in ('archive.jsonl', 'ranking.csv', 'ranking.json'):
        assert (tmp_path / 'one' / name).read_text() == (tmp_path / 'two' / name).read_text()


def test_wrong_input_is_one_sentence(supernet_run: Path, table: Path, tmp_path: Path, capsys) -> None:
    checkpoint = ['--checkpoint', str(supernet_run / 'last.pth.tar')]
    (tmp_path / 'other.csv').write_text('arch,accuracy\n' + '|none~0|,50\n' * 20)
    for words, message in (
        ([*checkpoint, '--table', str(tmp_path / 'missing.csv')], 'does not exist'),
        ([*checkpoint, '--table', str(tmp_path / 'other.csv')], "is in space 'nano', the table seems to be of another"),
        ([*checkpoint, '--table', str(table), '--num-archs', '5'], 'num_archs=5 is not an integer of at least 10'),
        ([*checkpoint, '--table', str(table), '--accuracy-column', 'x'], 'choose one with --accuracy-column'),
        ([*checkpoint, '--table', str(table), '--recalibration-images', '-1'], 'must not be negative'),
        ([*checkpoint, '--table', str(table), '--band', 'flops', '3%'], "unknown cost 'flops' of a band"),
    ):
        assert cli.main(['rank', *words, '-j', '0', '--device', 'cpu']) == 2
        err = capsys.readouterr().err
        assert err.startswith('timm-mixpath: error: ') and err.count('\n') == 1 and message in err


def test_not_a_supernet(supernet_run: Path, table: Path, tmp_path: Path) -> None:
    export(supernet_run / 'last.pth.tar', tmp_path / 'm', str(NANO.default_arch))
    with pytest.raises(UsageError, match='holds MixPath, a ranking needs a supernet'):
        rank_checkpoint(tmp_path / 'm', table)
