"""The benchmark scripts run and their own checks of equality pass. What they time is not looked at."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HUNG

FOLDER = Path(__file__).parent / 'benchmarks'


def run_script(name: str, options: str, cache: Path) -> str:
    env = dict(os.environ, OMP_NUM_THREADS='1', XDG_CACHE_HOME=str(cache))
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(FOLDER.parents[1]), env.get('PYTHONPATH')]))
    command = [sys.executable, str(FOLDER / f'{name}.py'), '--threads', '1', *options.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('cpu_kernels', [False, True])
def test_supernet_step(tmp_path, cpu_kernels):
    options = '--steps 1 --warmup 0 --batch-size 2 --img-size 8 --check-steps 1 --check-batch-size 4 --profile'
    if cpu_kernels:
        options += ' --cpu-kernels'
    out = run_script('supernet_step', options, tmp_path)
    assert out.count('check passed: ') == 2 + cpu_kernels
    assert 'aten::convolution_backward' in out
    assert 'n = 1 steps' in out
    assert 'peak MiB' in out


@pytest.mark.slow
def test_search_evaluation(tmp_path):
    options = '--archs 2 --warmup 0 --num-images 20 --batch-size 8'
    out = run_script('search_evaluation', options, tmp_path)
    assert out.count('check passed: 2 archs') == 2
    assert 'n = 2 archs, 20 images' in out


@pytest.mark.slow
def test_bookkeeping(tmp_path):
    options = '--rounds 1 --repetitions 3 --warmup 0 --batch-size 2 --img-size 8'
    out = run_script('bookkeeping', options, tmp_path)
    assert out.count('check passed: ') == 2
    assert 'share of a step' in out


@pytest.mark.slow
def test_models(tmp_path):
    options = '--models mixpath_a mixnet_m --variants plain channels_last folded --batch-sizes 1 2 --img-size 32'
    out = run_script('models', f'{options} --repetitions 1 --warmup 0', tmp_path)
    assert 'check passed: variants of 2 models agree' in out
    assert 'n = 1 calls' in out


@pytest.mark.slow
def test_latency(tmp_path):
    options = '--models mixpath_a mobilenetv3_large_100 --batch-sizes 1 2 --num-threads 1 --img-size 32 --rounds 1'
    out = run_script('latency', options, tmp_path)
    assert 'torch b1 t1' in out and 'onnxruntime b2 t1' in out
    assert 'ms per batch' in out


@pytest.mark.slow
def test_cpu_kernels(tmp_path):
    options = '--models mixpath_nano_supernet tf_efficientnet_lite0 --steps 1 --warmup 0 --img-size 32 --batch-size 4'
    out = run_script('cpu_kernels', options, tmp_path)
    assert out.count('check passed: ') == 1
    assert 'n = 1 steps' in out


@pytest.mark.slow
def test_data_parallel(tmp_path):
    out = run_script('data_parallel', '--models mixpath_nano_supernet', tmp_path)
    calls = {side: int(line.split()[-8]) for line in out.splitlines() for side in ('alone', 'DDP', 'ours')
             if line.startswith(f'mixpath_nano_supernet, {side} ')}  # fmt: skip
    assert calls['alone'] < calls['ours'] < calls['DDP']


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path):
    """The script for a card, which has to run at the first try there."""
    options = '--device cpu --seconds 0.01 --warmup 1 --batch-size 2 --img-size 16 --num-classes 10 --backend eager'
    models = ['--models', 'nano supernet', 'mixnet_m', 'nb201 supernet']
    models += ['--compile', 'nb201 supernet']
    command = [sys.executable, str(FOLDER / 'gpu.py'), '--threads', '1', *options.split(), *models]
    files = tmp_path / 'gpu.csv', tmp_path / 'profile.txt'
    done = subprocess.run(
        [*command, '--csv', str(files[0]), '--profile', str(files[1])], capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(files[0], newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 6 + 2 + 2 * 4 + 1 and all(float(row['per_s']) > 0 for row in rows)
    assert 'aten::' in files[1].read_text()
