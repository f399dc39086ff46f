"""What users plug timm into: segmentation_models_pytorch, and the stock scripts of a clone of pytorch-image-models.

The scripts are beside train.py, so TIMM_TRAIN_SCRIPT, see test_hook.py, is where they are found.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import environment
from family import make_input

from timm_mixpath.hub.export import export

TRAIN_SCRIPT = os.environ.get('TIMM_TRAIN_SCRIPT')
needs_scripts = pytest.mark.skipif(
    not TRAIN_SCRIPT, reason='needs train.py of a clone of pytorch-image-models, see TIMM_TRAIN_SCRIPT'
)


def test_segmentation_models_take_it_as_a_backbone() -> None:
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    model = smp.Unet('tu-mixpath_a', encoder_weights=None, in_channels=1, classes=2)
    x = make_input('a', in_chans=1)
    assert model(x).shape == (2, 2, 64, 64)
    mixnet = timm.create_model('mixnet_m', features_only=True, device='meta')
    assert model.encoder.out_channels == [1, *mixnet.feature_info.channels()]
    model(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def run_script(name: str, folder: Path, words: str) -> None:
    """Run a stock script through our command."""
    # A copy, since a script in a clone would import the clone's timm instead of the installed one
    script = shutil.copy(Path(TRAIN_SCRIPT).with_name(name), folder)
    command = [sys.executable, '-m', 'timm_mixpath.cli', 'run', script, *words.split()]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@needs_scripts
def test_validate_script(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    words = (
        f'--data-dir {digits} --split validation --model mixpath_nano_supernet --checkpoint {supernet_run}/last.pth.tar'
    )
    words += ' --num-classes 10 --img-size 16 --device cpu -j 0 -b 25 --results-file result.csv '
    top1 = []
    for more in ('', '--torchscript', '--reparam', '--torchcompile eager', '--channels-last'):
        run_script('validate.py', tmp_path, words + more)
        top1.append(float(read_rows(tmp_path / 'result.csv')[0]['top1']))
    assert set(top1) == {top1[0]}
    assert 0 <= top1[0] <= 100


@needs_scripts
@pytest.mark.parametrize('model', ['mixpath_nano', 'mixpath_nano_supernet'])
def test_benchmark_script(model: str, tmp_path: Path) -> None:
    words = f'--model {model} --device cpu --img-size 16 -b 2 --num-warm-iter 1 --num-bench-iter 5 --bench both'
    run_script('benchmark.py', tmp_path, words + ' --results-file result.json --results-format json')
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['model'] == model
    assert min(result['infer_samples_per_sec'], result['train_samples_per_sec']) > 0
    params = sum(p.numel() for p in timm.create_model(model, device='meta').parameters()) / 1e6
    assert result['param_count'] == pytest.approx(params, abs=0.01)


@needs_scripts
def test_onnx_export_script(supernet_run: Path, tmp_path: Path) -> None:
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    export(supernet_run / 'last.pth.tar', tmp_path / 'subnet', ','.join(['k3+7_e3'] * 8))
    size = {}
    for name, words in (
        ('supernet', f'--model mixpath_nano_supernet --num-classes 10 --checkpoint {supernet_run}/last.pth.tar'),
        ('subnet', f'--model local-dir:{tmp_path}/subnet'),
        ('folded', f'--model local-dir:{tmp_path}/subnet --reparam'),
    ):
        run_script('onnx_export.py', tmp_path, f'{name}.onnx {words} --img-size 16 -b 2 --check-forward')
        size[name] = (tmp_path / f'{name}.onnx').stat().st_size
    parameters = sum(p.numel() for p in timm.create_model('mixpath_nano_supernet', device='meta').parameters())
    assert size['supernet'] < 4 * parameters  # it holds the active sub-network only


@needs_scripts
def test_inference_script(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    pytest.importorskip('pandas')
    words = f'--data-dir {digits}/validation --model mixpath_nano_supernet --checkpoint {supernet_run}/last.pth.tar'
    words += ' --num-classes 10 --img-size 16 --device cpu -j 0 -b 25 --topk 2 --fullname --no-console-results'
    words += ' --results-dir . --results-file result'
    run_script('inference.py', tmp_path, words)
    rows = read_rows(tmp_path / 'result.csv')
    assert len(rows) == 50
