"""A latency table from the command line, and what a search makes of it."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import fails
from tables import table_for

from timm_mixpath import cli
from timm_mixpath.models.cost import cost_table
from timm_mixpath.models.latency_table import LatencyTable

QUICK = ['--num-archs', '20', '--test-archs', '5', '--rounds', '1', '--threads', '1', '--device', 'cpu']


@pytest.fixture(scope='module')
def table(supernet_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('latency') / 'here.json'
    assert cli.main(['latency', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(path), *QUICK]) == 0
    return path


@pytest.mark.slow
def test_from_a_table_to_a_measured_front(
    supernet_run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    known = LatencyTable.load(table)
    limit = sorted(row['latency_ms'] for row in known.measured)[12]
    last = str(supernet_run / 'last.pth.tar')
    search = ['search', '--checkpoint', last, '--output', str(tmp_path / 's'), '--latency-table', str(table)]
    search += ['--objectives', 'error', 'latency', '--max-latency', f'{limit}ms', '-j', '0', '--device', 'cpu']
    search += ['--population', '6', '--offspring', '3', '--generations', '2']
    capsys.readouterr()
    assert cli.main(search) == 0
    out = capsys.readouterr().out
    assert 'predicted ms' in out and 'measured)' in out
    front = json.loads((tmp_path / 's' / 'front.json').read_text())
    assert all(c['latency'] <= limit and c['metrics']['latency_ms'] > 0 for c in front['front'])
    assert front['fingerprint']['latency_table'] == known.fingerprint()
    before = (tmp_path / 's' / 'archive.jsonl').read_bytes()
    assert cli.main(search) == 0  # it is done, and stays so
    assert (tmp_path / 's' / 'archive.jsonl').read_bytes() == before

    capsys.readouterr()
    measure = ['latency', '--checkpoint', last, '--device', 'cpu', '--latency-table', str(table), '--archs']
    assert cli.main([*measure, str(tmp_path / 's' / 'front.json')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(c['arch'] in '\n'.join(lines) for c in front['front']) == len(front['front'])

    # Another table is another search
    other = json.loads(table.read_text())
    other['base'] *= 1.5
    (tmp_path / 'other.json').write_text(json.dumps(other))
    search[search.index('--latency-table') + 1] = str(tmp_path / 'other.json')
    search[search.index('--max-latency') + 1] = f'{2 * limit}ms'
    status, message = fails(capsys, search)
    assert status == 2 and 'was' in message and 'in the archive' in message


@pytest.mark.slow
def test_recipe_in_the_place_of_a_checkpoint(supernet_run: Path, table: Path, tmp_path: Path) -> None:
    words = ['latency', '--config', str(supernet_run / 'args.yaml'), '--output', str(tmp_path / 'r.json'), *QUICK]
    assert cli.main(words) == 0
    mine, known = LatencyTable.load(tmp_path / 'r.json'), LatencyTable.load(table)
    assert (mine.space, mine.input_size, mine.num_classes) == (known.space, known.input_size, known.num_classes)
    assert {row['arch'] for row in mine.measured} == {row['arch'] for row in known.measured}


def test_table_of_another_device_measures_nothing(
    supernet_run: Path, table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = dict(json.loads(table.read_text()), device_name='a phone')
    (tmp_path / 'phone.json').write_text(json.dumps(content))
    search = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(tmp_path / 's')]
    search += ['--latency-table', str(tmp_path / 'phone.json'), '--population', '4', '--generations', '0', '-j', '0']
    with caplog.at_level('INFO'):
        assert cli.main([*search, '--device', 'cpu']) == 0
    assert 'predicted and not measured, the table is of a phone, this is' in caplog.text
    front = json.loads((tmp_path / 's' / 'front.json').read_text())['front']
    assert all('latency_ms' not in c['metrics'] and c['latency'] > 0 for c in front)


def test_missing_runtime_does_not_lose_a_search(
    supernet_run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of onnxruntime, searched with where it is not installed."""
    content = dict(json.loads(table.read_text()), runtime='onnxruntime')
    (tmp_path / 'onnx.json').write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    search = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(tmp_path / 's')]
    search += ['--latency-table', str(tmp_path / 'onnx.json'), '--population', '4', '--generations', '0', '-j', '0']
    assert cli.main([*search, '--device', 'cpu']) == 0
    assert 'predicted and not measured, the runtime needs onnxruntime' in caplog.text
    front = json.loads((tmp_path / 's' / 'front.json').read_text())['front']
    assert front and all('latency_ms' not in c['metrics'] for c in front)


def test_profile(table: Path, capsys: pytest.CaptureFixture) -> None:
    model = '--model mixpath_nano_supernet --input-size 3 16 16 --num-samples 50'
    profile = ['profile', *model.split(), '--latency-table']
    capsys.readouterr()
    assert cli.main([*profile, str(table)]) == 0
    low, median, high = map(float, capsys.readouterr().out.splitlines()[4].removeprefix('latency (ms)').split())
    assert 0 < low < median < high
    status, message = fails(capsys, [*profile, str(table), '--max-latency', '1us'])
    assert (
        status == 2 and f'max_latency=0.001 ms excludes every arch, the smallest of the space has {low:.2f}' in message
    )
    status, message = fails(capsys, [*profile, str(table), '--model-kwargs', 'width_mult=0.5'])
    assert status == 2 and "another variant of space 'nano'" in message


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('latency', 'pass either --output FILE for a table, or --archs'),
        ('latency --output t.json', 'no supernet: pass --checkpoint PATH, --model NAME, or --config FILE'),
        ('latency --output t.json --model mixpath_nano', "'mixpath_nano' is no supernet"),
        ('latency --output t.json --model mixpath_nan_supernet', 'mixpath_nan_supernet'),
        ('latency --output t.json --model mixpath_nano_supernet --threads 0', 'threads=0 must be at least 1'),
        ('latency --output t.json --model mixpath_nano_supernet --device tpu', "--device 'tpu' can not be used"),
        ('latency --archs k3_e6 --model mixpath_nano_supernet', '--archs and --latency-table go together'),
        ('latency --archs k3 --latency-table none.json --model mixpath_nano_supernet', "'none.json' can not be read"),
        ('profile --model mixpath_nano_supernet --max-latency 3ms', 'needs a latency table'),
        ('profile --model mixpath_nano_supernet --latency-table none.json', "'none.json' can not be read"),
    ],
)
def test_wrong_commands(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    status, found = fails(capsys, words.split())
    assert status == 2 and message in found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'words',
    ['--runtime torch', '--threads 1', '-b 1', '--input-size 3 16 16', '--num-classes 10', '--rounds 10', '--seed 0',
     '--num-archs 150', '--test-archs 50'],
)  # fmt: skip
def test_what_a_table_decides_is_no_option(words: str, capsys: pytest.CaptureFixture) -> None:
    measure = ['latency', '--model', 'mixpath_nano_supernet', '--latency-table', 'table.json', '--archs', 'k3_e6']
    status, message = fails(capsys, [*measure, *words.split()])
    shown = words.replace('-b', '--batch-size')
    assert status == 2 and f'{shown} has no effect on --archs, which are measured as those of the table' in message


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about where there is none')
def test_table_of_a_device_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cost = cost_table(timm.create_model('mixpath_nano_supernet', device='meta'))
    prices = dict.fromkeys(cost.part_costs('macs'), 1.0)
    table_for(cost, 1.0, prices, device='cuda', device_name='a GPU').save(tmp_path / 'gpu.json')
    arch = str(cost.space.default_arch)
    measure = ['latency', '--model', 'mixpath_nano_supernet', '--latency-table', str(tmp_path / 'gpu.json')]
    status, message = fails(capsys, [*measure, '--archs', arch])
    assert status == 2 and 'the table is of a GPU (cuda), on which --archs are measured; run this where' in message
    status, message = fails(capsys, [*measure, '--archs', arch, '--device', 'cpu'])
    assert status == 2 and "--device 'cpu' can not be used: the table is of 'cuda', where --archs are" in message


def test_archs_that_are_none(supernet_run: Path, table: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    measure = ['latency', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--latency-table', str(table), '--archs']
    assert 'an arch can not be measured' in fails(capsys, [*measure, 'k3_e6'])[1]
    (tmp_path / 'front.json').write_text('{}')
    assert 'is no front.json of a search' in fails(capsys, [*measure, str(tmp_path / 'front.json')])[1]
