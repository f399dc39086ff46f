import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import fails, mixpath

from timm_mixpath import cli

SEARCH = '--population 4 --offspring 2 --generations 1 -b 6 -j 0 --device cpu'


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_tasks_of_slurm_are_processes(supernet_run: Path, tmp_path: Path) -> None:
    """What `srun --ntasks 2` sets, without a Slurm."""
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), *SEARCH.split()]
    assert cli.main([*words, '--output', str(tmp_path / 'one')]) == 0
    slurm = dict(SLURM_NTASKS='2', SLURM_NNODES='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    command = [*words, '--output', str(tmp_path / 'two')]
    with ThreadPoolExecutor() as pool:
        tasks = pool.map(lambda rank: mixpath(*command, SLURM_PROCID=rank, SLURM_LOCALID='0', **slurm), '01')
    done = list(tasks)
    assert [task.returncode for task in done] == [0, 0], done
    assert [task.stdout.count('chosen (*)') for task in done] == [1, 0]
    one, two = ((tmp_path / name / 'archive.jsonl').read_text() for name in ('one', 'two'))
    assert one == two


@pytest.mark.parametrize('command', ['search', 'train', 'table'])
def test_tasks_that_can_not_meet(
    command: str, supernet_run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As in a batch script with several tasks that calls no srun."""
    for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('SLURM_NTASKS', '4')
    monkeypatch.setenv('SLURM_PROCID', '0')
    words = {
        'search': f'search --checkpoint {supernet_run}/last.pth.tar {SEARCH} --output {tmp_path}/out',
        'train': f'train --model mixpath_nano --data-dir {digits} --output {tmp_path}/out --device cpu',
        'table': f'table --model mixpath_nano --data-dir {digits} --table-dir {tmp_path}/out --num-archs 2',
    }[command]
    status, error = fails(capsys, words.split())
    assert status == 2
    assert 'one of 4 tasks, and MASTER_ADDR and MASTER_PORT of the first one is not set' in error
