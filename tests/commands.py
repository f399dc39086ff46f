"""Command lines of timm-mixpath in this process, in one of its own, or in two under torchrun."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked_worker
import pytest
import torch
import torch.distributed.run
import torch.multiprocessing

from timm_mixpath import cli
from timm_mixpath.train import default_args

TESTS = Path(__file__).parent
TRAIN_SCRIPT = os.environ.get('TIMM_TRAIN_SCRIPT')  # train.py of a clone of pytorch-image-models
HUNG = 900  # seconds until a process counts as hung; a busy machine takes minutes for what a free one does in seconds


def assert_equal(a: Any, b: Any, path: str = '') -> None:
    """Compare nested checkpoints bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f'{path}[{i}]')
    else:
        assert a == b, path


def command(args: Any, *more: str) -> list[str]:
    """Command line words of options that differ from the defaults."""
    words, default = list(more), vars(default_args())
    for name, value in vars(args).items():
        if value == default[name]:
            continue
        words.append('--' + name.replace('_', '-'))
        if isinstance(value, dict):
            words += [f'{k}={v}' for k, v in value.items()]
        elif isinstance(value, list):
            words += [str(v) for v in value]
        elif value is not True:
            words.append(str(value))
    return words


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'), **more)


def start_processes(worker: Callable[..., None], args: tuple[Any, ...], processes: int) -> None:
    """Call `worker(rank, *args)` in processes, like `torch.multiprocessing.spawn`, but without its imports."""
    _forkserver()
    torch.multiprocessing.start_processes(worker, args, nprocs=processes, start_method='forkserver')


def torchrun_of_users(*words: str, **more: str) -> subprocess.CompletedProcess:
    """Run a command of timm-mixpath in two gloo processes as users do; `more` is added to their environment."""
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv-backend=c10d']
    launch += ['--rdzv-endpoint=127.0.0.1:0', '-m', 'timm_mixpath.cli', *words]
    return subprocess.run(
        [sys.executable, *launch], env=environment(**more), capture_output=True, text=True, timeout=HUNG
    )


def torchrun(*words: str, cwd: Path | None = None, processes: int = 2, **more: str) -> subprocess.CompletedProcess:
    """Do what `torchrun_of_users` does in a third of the time: torchrun's `--start-method forkserver`."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [f'--nproc-per-node={processes}', '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0']
        launch += ['--start-method=forkserver', '--redirects=3', f'--log-dir={folder}', '--run-path']
        surroundings = json.dumps([environment(**more), str(cwd or Path.cwd())])
        launch += [str(TESTS / 'forked_worker.py'), surroundings, *words]
        process = _forkserver().Process(target=_launch, args=(launch, folder))
        process.start()
        process.join(HUNG)
        if process.exitcode is None:
            process.terminate()
        logs = {name: sorted(Path(folder).rglob(name)) for name in ('stdout.log', 'stderr.log')}
        out, err = (''.join(log.read_text() for log in found) for found in logs.values())
        err += (Path(folder) / 'launcher').read_text()
        return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def mixpath(*words: str, **more: str) -> subprocess.CompletedProcess:
    """Run a command of timm-mixpath in a process of its own that need not import torch and timm."""
    with tempfile.TemporaryDirectory() as folder:
        process = _forkserver().Process(target=_call, args=(folder, environment(**more), str(Path.cwd()), words))
        process.start()
        process.join(HUNG)
        if process.exitcode is None:
            process.kill()
        out, err = ((Path(folder) / name).read_text() for name in ('stdout', 'stderr'))
        return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def _call(folder: str, *surroundings_and_words: Any) -> None:
    _write_to(Path(folder) / 'stdout', 1)
    _write_to(Path(folder) / 'stderr', 2)
    forked_worker.run(*surroundings_and_words)


def _write_to(path: Path, *descriptors: int) -> None:
    """Send what this process writes to descriptors into a file."""
    with open(path, 'w') as file:
        for descriptor in descriptors:
            os.dup2(file.fileno(), descriptor)


def _forkserver() -> Any:
    """Processes that are forked from one that has imported torch and timm already, which takes seconds each time."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch.distributed.run', 'timm', 'timm_mixpath.cli', 'timm_mixpath.search'])
    return context


def _launch(words: list[str], folder: str) -> None:
    _write_to(Path(folder) / 'launcher', 1, 2)
    torch.distributed.run.main(words)


def fails(capsys: pytest.CaptureFixture, words: list[str]) -> tuple[int, str]:
    """Exit status and message of a command line that must fail with one line."""
    try:
        status = cli.main(words)
    except SystemExit as e:  # argparse
        status = int(e.code)
    error = capsys.readouterr().err.strip()
    assert 'Traceback' not in error
    return status, error.splitlines()[-1]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Within the context no file of this process can grow beyond a number of bytes."""
    resource = pytest.importorskip('resource')  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
