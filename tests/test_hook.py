"""The hook, in a small script that does what timm's train.py does, and in train.py itself where there is one.

timm's train.py is in neither its wheel nor its sdist. Set TIMM_TRAIN_SCRIPT to the path of one in a clone of
pytorch-image-models to run the tests that need it.
"""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from commands import TRAIN_SCRIPT, assert_equal, command, environment
from conftest import small_args
from timm.models._helpers import _torch_load
from timm.task import ClassificationTask

import timm_mixpath
from timm_mixpath import get_space, sample

SCRIPT = """
import importlib
import timm, torch
from timm.task import ClassificationTask, LogitDistillationTask

importlib.import_module('timm_mixpath.hook')
for name in ('mixpath_nano_supernet', 'mixpath_nano', 'resnet18'):
    task = ClassificationTask(model=timm.create_model(name, num_classes=4), criterion=torch.nn.CrossEntropyLoss())
    print(name, type(task).__module__, type(task).__name__)
    student, teacher = timm.create_model(name, num_classes=4), timm.create_model('mixpath_nano', num_classes=4)
    print(name, type(LogitDistillationTask(student_model=student, teacher_model=teacher)).__name__)
"""


def test_hook_replaces_the_task_of_supernets_only(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [
        ['mixpath_nano_supernet', 'timm_mixpath.train.task', 'SupernetTask'],
        ['mixpath_nano_supernet', 'SupernetLogitDistillationTask'],
        ['mixpath_nano', 'timm.task.classification', 'ClassificationTask'],
        ['mixpath_nano', 'LogitDistillationTask'],
        ['resnet18', 'timm.task.classification', 'ClassificationTask'],
        ['resnet18', 'LogitDistillationTask'],
    ]


def test_hook_outside_train_script_says_so() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        from timm_mixpath import hook
    if not caught:  # imported before
        with pytest.warns(UserWarning, match=r"outside timm's train\.py"):
            hook._install()
    task = hook.create_task(timm.create_model('mixpath_nano'), torch.nn.CrossEntropyLoss(), verbose=False)
    assert type(task) is ClassificationTask
    task = hook.create_task(timm.create_model('mixpath_nano_supernet'), torch.nn.CrossEntropyLoss(), verbose=False)
    assert isinstance(task, timm_mixpath.SupernetTask)


needs_train_script = pytest.mark.skipif(
    not TRAIN_SCRIPT, reason='needs train.py of a clone of pytorch-image-models, see TIMM_TRAIN_SCRIPT'
)


def run_train_script(digits: Path, output: Path, processes: int, *more: str, **options: object) -> Path:
    args = small_args(digits, output, epochs=2, batch_size=16, **options)
    words = [*command(args), '--device-modules', 'timm_mixpath.hook', 'recorder', *more]
    launch = [sys.executable]
    if processes > 1:
        launch += ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--rdzv-backend=c10d']
        launch += ['--rdzv-endpoint=127.0.0.1:0']
    output.mkdir(parents=True, exist_ok=True)
    env = environment(RECORDER_DIR=str(output))
    # A copy, since a script in a clone would import the clone's timm instead of the installed one
    script = shutil.copy(TRAIN_SCRIPT, output / 'train.py')
    result = subprocess.run([*launch, script, *words], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return output / 'run' / 'last.pth.tar'


@needs_train_script
@pytest.mark.parametrize('processes', [1, 2])
def test_stock_train_script(digits: Path, tmp_path: Path, processes: int) -> None:
    run_train_script(digits, tmp_path, processes)
    archs = [(tmp_path / f'archs-{rank}.txt').read_text().splitlines() for rank in range(processes)]
    steps = 2 * (200 // (16 * processes))
    assert len(archs[0]) == steps
    assert all(a == [str(sample(get_space('nano'), seed=0, step=i)) for i in range(steps)] for a in archs)
    if processes == 2:
        assert_equal(*(torch.load(tmp_path / f'weights-{rank}.pt') for rank in range(2)))


@needs_train_script
def test_stock_train_script_resumes_the_sequence(digits: Path, tmp_path: Path) -> None:
    last = run_train_script(digits, tmp_path / 'a', 1)
    assert _torch_load(str(last), weights_only=True)['state_dict']['sample_step'] == 24
    run_train_script(digits, tmp_path / 'b', 1, '--resume', str(last), '--start-epoch', '1')
    archs = (tmp_path / 'b' / 'archs-0.txt').read_text().splitlines()
    assert archs == [str(sample(get_space('nano'), seed=0, step=24 + i)) for i in range(12)]


@needs_train_script
def test_stock_train_script_trains_a_subnet(digits: Path, tmp_path: Path) -> None:
    last = run_train_script(digits, tmp_path, 1, model='mixpath_nano', model_kwargs={'arch': ','.join(['k3+7_e6'] * 8)})
    args = _torch_load(str(last), weights_only=True)['args']
    assert args.model_kwargs == {'arch': ','.join(['k3+7_e6'] * 8)}
    assert not (tmp_path / 'archs-0.txt').exists()


@needs_train_script
def test_stock_train_script_compiles_by_regions(digits: Path, tmp_path: Path) -> None:
    options = dict(model='mixpath_nb201_supernet', model_kwargs=dict(num_cells=1, width=4), workers=0)
    plain = run_train_script(digits, tmp_path / 'plain', 2, **options)
    compiled = run_train_script(digits, tmp_path / 'compiled', 2, '--torchcompile', 'eager', **options)
    first, second = (_torch_load(str(path), weights_only=True)['state_dict'] for path in (plain, compiled))
    assert_equal(first, second)
