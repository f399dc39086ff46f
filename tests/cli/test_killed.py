"""SIGKILL at random moments, again and again until the command has ended: nothing is lost, nothing is done twice."""

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from commands import environment

from timm_mixpath import sample

pytestmark = pytest.mark.slow

KILLS = 6


def run_until_done(words: list[str], seed: int) -> int:
    """Kill the command at random moments behind its start, then let it end; return how often it was killed."""
    draw = random.Random(seed)
    command = [sys.executable, '-m', 'timm_mixpath.cli', *words]
    kills = 0
    while True:
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if kills < KILLS:
            # Some seconds go into imports and images, and there it may be hit as well
            time.sleep(draw.uniform(2, 9))
            process.kill()
        output, _ = process.communicate()
        if process.returncode < 0:
            kills += 1
            continue
        assert process.returncode == 0, output[-3000:]
        return kills


def test_search(supernet_run: Path, tmp_path: Path) -> None:
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--population', '30', '--offspring', '10']
    words += ['--generations', '40', '-j', '0', '--device', 'cpu', '--recalibration-images', '100', '--output']
    assert run_until_done([*words, str(tmp_path / 'killed')], seed=0) > 0
    subprocess.run(
        [sys.executable, '-m', 'timm_mixpath.cli', *words, str(tmp_path / 'whole')], env=environment(), check=True
    )
    for name in ('archive.jsonl', 'front.csv', 'front.json'):
        assert (tmp_path / 'killed' / name).read_text() == (tmp_path / 'whole' / name).read_text()


def test_rank(supernet_run: Path, tmp_path: Path) -> None:
    space = timm.create_model('mixpath_nano_supernet', device='meta').space
    archs = dict.fromkeys(sample(space, seed=0, step=step) for step in range(60))
    table = tmp_path / 'table.csv'
    with open(table, 'w', newline='') as file:
        csv.writer(file).writerows([('arch', 'accuracy'), *((arch, 50 + i / 10) for i, arch in enumerate(archs))])
    words = ['rank', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--table', str(table), '-j', '0']
    words += ['--device', 'cpu', '--recalibration-images', '100', '--output']
    assert run_until_done([*words, str(tmp_path / 'killed')], seed=1) > 0
    subprocess.run(
        [sys.executable, '-m', 'timm_mixpath.cli', *words, str(tmp_path / 'whole')], env=environment(), check=True
    )
    for name in ('archive.jsonl', 'ranking.csv'):
        assert (tmp_path / 'killed' / name).read_text() == (tmp_path / 'whole' / name).read_text()


def test_latency(tmp_path: Path) -> None:
    table = tmp_path / 'table.json'
    words = ['latency', '--model', 'mixpath_nano_supernet', '--num-archs', '40', '--test-archs', '20', '--rounds', '2']
    assert run_until_done([*words, '--threads', '1', '--device', 'cpu', '--output', str(table)], seed=2) > 0
    measured = json.loads(table.read_text())['measured']
    archs = [row['arch'] for row in measured]
    assert len(archs) == len(set(archs)) >= 60  # each once, with those that set the clock right
    assert all(row['latency_ms'] > 0 for row in measured)
