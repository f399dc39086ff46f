"""A training that is stopped or killed within an epoch goes on behind the last batch that it saw."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import HUNG, assert_equal, command, environment, fails
from conftest import small_args
from PIL import Image
from timm.models._helpers import _torch_load
from torch.utils.data import DataLoader, TensorDataset

from timm_mixpath.train import loop
from timm_mixpath.train.loop import train
from timm_mixpath.train.recovery import RECOVERY, StopSignal, batches_behind, latest_checkpoint
from timm_mixpath.utils.errors import RunError, Stopped, UsageError

KEYS = ('state_dict', 'optimizer', 'epoch', 'metric')


def plain_args(digits: Path, output: Path, **options: Any) -> Namespace:
    """Options of a run whose images are what they are in the files, so that they can be told apart."""
    still = dict(no_aug=True, hflip=0.0, reprob=0.0, epochs=2)
    return small_args(digits, output, **{**still, **options})


class Recorder:
    """Notes the images of every batch that is trained on, and sends a signal to this process behind one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.batches: list[list[str]] = []

        def recorded(loader: Any, start: int) -> Any:
            for x, y in batches_behind(loader, start):
                self.batches.append([hashlib.md5(image.numpy().tobytes()).hexdigest() for image in x.contiguous()])
                if len(self.batches) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield x, y

        monkeypatch.setattr(loop, 'batches_behind', recorded)


def go_on(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Go on with a run, and return the images of the batches that it still sees."""
    args.resume = 'auto'
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        train(args)
    return recorder.batches


def checkpoint(path: Path) -> dict[str, Any]:
    return _torch_load(str(path / 'last.pth.tar'), weights_only=True)


@pytest.mark.parametrize(
    'options',
    [
        pytest.param(dict(model_ema=True, model_ema_decay=0.9, clip_grad=1.0), id='ema', marks=pytest.mark.slow),
        pytest.param(dict(workers=1, grad_accum_steps=2), id='accumulation'),
        pytest.param(dict(cache_images=True, no_aug=True, opt='adamw', lr=0.01), id='cache', marks=pytest.mark.slow),
        pytest.param(dict(model='mixpath_nano', sched='step', sched_on_updates=False, decay_epochs=1), id='network'),
    ],
)
def test_no_image_is_seen_twice(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """Stopped in the second epoch: the images, the weights and the summary are those of an unbroken run."""
    with monkeypatch.context() as patch:
        unbroken = Recorder(patch)
        whole = train(plain_args(digits, tmp_path / 'whole', **options)).output_dir
    per_epoch = len(unbroken.batches) // 2
    stop_at = per_epoch + 2
    args = plain_args(digits, tmp_path / 'cut', **options)
    with monkeypatch.context() as patch:
        first = Recorder(patch, stop_at=stop_at)
        with pytest.raises(Stopped, match='stopped by SIGTERM behind batch 2 of epoch 1') as info:
            train(args)
    assert info.value.number == signal.SIGTERM
    folder = tmp_path / 'cut' / 'run'
    assert (folder / RECOVERY).exists() and checkpoint(folder)['epoch'] == 0
    assert latest_checkpoint(folder) == folder / RECOVERY

    rest = go_on(args, monkeypatch)
    assert first.batches + rest == unbroken.batches
    assert len(rest) == per_epoch - 2
    for key in (*KEYS, *(['state_dict_ema'] if 'model_ema' in options else [])):
        assert_equal(checkpoint(whole)[key], checkpoint(folder)[key], key)
    assert (whole / 'summary.csv').read_text() == (folder / 'summary.csv').read_text()
    assert not (folder / RECOVERY).exists() and latest_checkpoint(folder) == folder / 'last.pth.tar'


@pytest.mark.slow
def test_begins_at_an_epoch_and_goes_on_behind_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--start-epoch` is where a run began, not where the same command begins again."""
    options = dict(epochs=4, start_epoch=1)
    with monkeypatch.context() as patch:
        unbroken = Recorder(patch)
        whole = train(plain_args(digits, tmp_path / 'whole', **options)).output_dir
    per_epoch = len(unbroken.batches) // 3
    args = plain_args(digits, tmp_path / 'cut', **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match='behind batch 2 of epoch 2'):
        Recorder(patch, stop_at=per_epoch + 2)
        train(args)
    assert go_on(args, monkeypatch) == unbroken.batches[per_epoch + 2 :]
    folder = tmp_path / 'cut' / 'run'
    assert (whole / 'summary.csv').read_text() == (folder / 'summary.csv').read_text()
    # From a checkpoint within an epoch on at another one: all of its images
    with monkeypatch.context() as patch, pytest.raises(Stopped, match='behind batch 2 of epoch 2'):
        Recorder(patch, stop_at=per_epoch + 2)
        train(Namespace(**{**vars(args), 'resume': '', 'experiment': 'again'}))
    changes = dict(resume=str(tmp_path / 'cut' / 'again' / RECOVERY), experiment='later', start_epoch=3)
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        train(Namespace(**{**vars(args), **changes}))
    assert recorder.batches == unbroken.batches[2 * per_epoch :]


@pytest.mark.parametrize(
    'before, after',
    [
        ({}, dict(val_split='')),
        pytest.param(dict(val_split=''), {}, marks=pytest.mark.slow),
        pytest.param({}, dict(eval_metric='loss'), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_of_a_run_are_ranked_by_one_metric(digits: Path, tmp_path: Path, before: dict, after: dict) -> None:
    run = train(plain_args(digits, tmp_path, epochs=1, **before)).output_dir
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    later = plain_args(digits, tmp_path, epochs=2, resume='auto', **after)
    with pytest.raises(UsageError, match=r'ranked by .*, this run would rank them by .*another --experiment'):
        train(later)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == files
    later.resume, later.experiment = str(run / 'last.pth.tar'), 'other'
    assert train(later).output_dir.name == 'other'


def test_stopped_while_it_validates(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(plain_args(digits, tmp_path / 'whole', epochs=1)).output_dir

    def stopped(loader: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from loader

    args = plain_args(digits, tmp_path / 'cut', epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'iterate', stopped)
        with pytest.raises(Stopped, match='behind batch 5 of epoch 0'):
            train(args)
    assert not go_on(args, monkeypatch)
    for key in KEYS:
        assert_equal(checkpoint(whole)[key], checkpoint(tmp_path / 'cut' / 'run')[key], key)
    assert (whole / 'summary.csv').read_text() == (tmp_path / 'cut' / 'run' / 'summary.csv').read_text()


def start(args: Namespace) -> subprocess.Popen:
    words = [sys.executable, '-m', 'timm_mixpath.cli', *command(args, 'train')]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)


def test_other_batches_begin_the_epoch_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = plain_args(digits, tmp_path, epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        Recorder(patch, stop_at=3)
        train(args)
    batches = go_on(Namespace(**{**vars(args), 'batch_size': 20}), monkeypatch)
    assert [len(batch) for batch in batches] == [20] * 9 and len({image for batch in batches for image in batch}) == 180
    text = 'stopped in is begun again, as its batches are others now: batch_size 32 -> 20, batches per epoch 5 -> 9'
    assert text in caplog.text


def test_image_that_can_not_be_validated_costs_no_epoch(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / 'data'
    shutil.copytree(digits, data)
    file = next(data.glob('validation/3/*.png'))
    content = file.read_bytes()
    Image.new('F', (8, 8)).save(file, 'TIFF')
    args = plain_args(data, tmp_path, epochs=1)
    with pytest.raises(RunError, match=file.name):
        train(args)
    file.write_bytes(content)
    assert go_on(args, monkeypatch) == []  # nothing is trained again
    whole = train(plain_args(digits, tmp_path / 'whole', epochs=1)).output_dir
    for key in KEYS:
        assert_equal(checkpoint(tmp_path / 'run')[key], checkpoint(whole)[key])


@pytest.mark.slow
def test_everybody_is_asked_to_end(digits: Path, tmp_path: Path) -> None:
    """As a scheduler does: the processes that load images get the signal, too."""
    args = small_args(digits, tmp_path, epochs=30, log_interval=1, workers=2)
    process = start(args)
    for line in process.stderr:
        if 'Train: 1 [   1/5]' in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(HUNG) == 128 + signal.SIGTERM
    last = rest.strip().splitlines()[-1]
    assert (
        'stopped by SIGTERM behind batch' in last
        and 'the same command goes on, of `train` with --resume auto' in last
        and 'Traceback' not in rest
    )
    args.resume, args.epochs = 'auto', 2
    train(args)
    assert checkpoint(tmp_path / 'run')['epoch'] == 1


def test_interval_and_kill(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = plain_args(digits, tmp_path, recovery_interval=2, epochs=1)
    written: list[int] = []
    recover = loop._recover

    def recorded(args: Namespace, run: Any, epoch: int, batches: int, *rest: Any) -> None:
        recover(args, run, epoch, batches, *rest)
        written.append(batches)
        if batches == 4:
            raise KeyboardInterrupt  # as good as a kill here: nothing is written any more

    with monkeypatch.context() as patch:
        patch.setattr(loop, '_recover', recorded)
        with pytest.raises(KeyboardInterrupt):
            train(args)
    assert written == [2, 4]
    with pytest.raises(UsageError, match='holds a run already and is not overwritten; go on with it by --resume'):
        train(args)
    assert len(go_on(args, monkeypatch)) == 1


def test_auto_begins_where_nothing_is(digits: Path, tmp_path: Path) -> None:
    args = small_args(digits, tmp_path, resume='auto', epochs=1)
    assert train(args).output_dir == tmp_path / 'run'
    with pytest.raises(UsageError, match='--resume auto needs --experiment NAME'):
        train(small_args(digits, tmp_path, resume='auto', experiment=''))


def test_wrong_interval(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, message = fails(capsys, command(small_args(digits, tmp_path, recovery_interval=-1), 'train'))
    assert status == 2 and '--recovery-interval -1 must not be negative' in message


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.number == signal.SIGUSR1 and stop.stopped('here').number == signal.SIGUSR1


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_behind_are_those_of_the_whole_epoch(workers: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(23)), 4, shuffle=True, drop_last=True, num_workers=workers)

    def epoch(start: int) -> list[list[int]]:
        torch.manual_seed(5)
        return [batch.tolist() for (batch,) in batches_behind(loader, start)]

    whole = epoch(0)
    assert len(whole) == 5
    for start_at in range(6):
        assert epoch(start_at) == whole[start_at:]
    assert epoch(0) == whole


UNFORESEEN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from timm_mixpath.train.recovery import outlive_signals

loader = DataLoader(TensorDataset(torch.arange(8)), batch_size=1, num_workers=1, persistent_workers=True)
outlive_signals(loader)
batches = iter(loader)
next(batches)
raise KeyError('unforeseen')
"""


@pytest.mark.slow
def test_process_that_loads_images_ends_with_one_that_fails() -> None:
    """Python ends its processes by SIGTERM, and waits for them: they outlive that of others only."""
    done = subprocess.run([sys.executable, '-c', UNFORESEEN], env=environment(), capture_output=True, timeout=HUNG)
    assert done.returncode == 1 and b'unforeseen' in done.stderr


@pytest.mark.slow
def test_killed_many_times_at_random_moments(digits: Path, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM, again and again, until the training has ended: it ends as the unbroken one."""
    options = dict(epochs=3, recovery_interval=1, log_interval=1, workers=1)
    whole = train(plain_args(digits, tmp_path / 'whole', **options)).output_dir
    args = plain_args(digits, tmp_path / 'killed', **options, resume='auto')
    draw, kills = random.Random(0), 0
    for attempt in range(40):
        process = start(args)
        patience = draw.randrange(1, 8)  # lines of the log
        for line in process.stderr:
            patience -= 'Train: ' in line
            if patience == 0:
                time.sleep(draw.random() * 0.05)
                process.send_signal(signal.SIGKILL if attempt % 2 else signal.SIGTERM)
                kills += 1
                break
        process.stderr.read()
        if process.wait() == 0:
            break
    assert kills >= 3 and process.returncode == 0
    folder = tmp_path / 'killed' / 'run'
    for key in KEYS:
        assert_equal(checkpoint(whole)[key], checkpoint(folder)[key], key)
    assert (whole / 'summary.csv').read_text() == (folder / 'summary.csv').read_text()


@pytest.mark.slow
def test_two_processes_are_asked_to_end(digits: Path, tmp_path: Path) -> None:
    args = small_args(digits, tmp_path, epochs=50, log_interval=1, batch_size=16, workers=1)
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv-backend=c10d']
    launch += ['--rdzv-endpoint=127.0.0.1:0', '-m', 'timm_mixpath.cli', *command(args, 'train')]
    process = subprocess.Popen(
        [sys.executable, *launch], stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    for line in process.stderr:
        if 'Train: 1 [   2/5]' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(HUNG) != 0
    assert 'stopped by SIGTERM behind batch' in rest
    assert (tmp_path / 'run' / RECOVERY).exists()
    args.resume, args.epochs = 'auto', 3
    words = command(args, 'train')
    done = subprocess.run(
        [sys.executable, *launch[: launch.index('timm_mixpath.cli') + 1], *words], env=environment(), timeout=HUNG
    )
    assert done.returncode == 0 and checkpoint(tmp_path / 'run')['epoch'] == 2
