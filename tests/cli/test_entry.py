import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import environment, fails, mixpath

from timm_mixpath import cli

ARCH = ','.join(['k3+5_e6', *['k3_e3'] * 7])


@pytest.mark.parametrize(
    'words, text',
    [
        (['trian'], 'trian'),
        (['train'], 'pass --model'),
        (['train', '--model', 'mixpath_mega'], "'mixpath_mega'"),
        (['train', '--model', 'mixpath_nano', '--model-kwargs', 'arch=k3_e6'], '1 blocks'),
        (['train', '--model', 'mixpath_nano', '--model-kwargs', f'arch={ARCH[:-5]}k3+3_e3'], 'kernel 3 is given twice'),
        (['train', '--model', 'mixpath_nano', '--model-kwargs', f'arch={ARCH[:-5]}k9_e3'], 'kernel 9 is not one of'),
        (['train', '--model', 'mixpath_nano_supernet', '--model-kwargs', 'm=5'], 'm=5 is out of range'),
        (['train', '--model', 'mixpath_nano_supernet', '--data-dir', '/nowhere'], "'/nowhere' does not exist"),
        (['train', '-c', 'nope'], "'nope'"),
        (['train', '--epochs', 'many'], "'many'"),
        (['train', '--model', 'mixpath_nano', '--device-modules', 'no_such_module'], 'no_such_module'),
        (['search', '--checkpoint', '/nowhere', '--output', 'x'], "'/nowhere' does not exist"),
        (['search', '--checkpoint', 'x', '--output', 'x', '--max-macs', '5Q'], "'5Q'"),
        (['search', '--checkpoint', 'x', '--output', 'x', '--objectives', 'error', 'speed'], "'speed'"),
        (['search', '--checkpoint', 'x', '--output', 'x', '--population', '0'], 'population=0'),
        (['stats', '--checkpoint', '/nowhere'], "'/nowhere' does not exist"),
        (['stats', '--checkpoint', 'x', '--num-images', 'many'], "'many'"),
        (['export', '--checkpoint', '/nowhere', '--output', 'x'], "'/nowhere' does not exist"),
        (['profile', '--model', 'mixpath_nano'], 'is no supernet'),
        (['profile', '--model', 'mixpath_s1_supernet', '--model-kwargs', 'm=0'], 'm=0 is out of range'),
        (['run', 'nope.py'], "'nope.py' does not exist"),
        (['run'], 'are required: SCRIPT'),
        (['recipes', 'cp', 'nope', '.'], "'nope'"),
        (['demo', '--output', 'x', '--data-dir', '/nowhere'], "'/nowhere' does not exist"),
        (['demo', '--output', 'x', '--dataset', 'wds/x'], "'wds/x' is a stream, no images of which can be held out"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, message = fails(capsys, words)
    assert status == 2 and text in message


def test_no_memory_on_a_gpu_is_status_1(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr('timm_mixpath.cli.train.train', no_memory)
    status, message = fails(capsys, ['train', '--model', 'mixpath_nano'])
    assert status == 1 and 'Tried to allocate 2.00 GiB. A lower --batch-size' in message


def test_failed_run_is_status_1(capsys: pytest.CaptureFixture, supernet_run: Path, tmp_path: Path) -> None:
    last = str(supernet_run / 'last.pth.tar')
    status, message = fails(capsys, ['search', '--checkpoint', last, '--output', '/dev/null/x', '-j', '0'])
    assert status == 1 and '/dev/null/x' in message
    damaged = tmp_path / 'damaged.pth.tar'
    damaged.write_bytes(b'PK\x03\x04 nonsense')
    status, message = fails(capsys, ['export', '--checkpoint', str(damaged), '--output', str(tmp_path / 'm')])
    assert status == 1 and 'not a readable checkpoint' in message


def test_limit_below_the_smallest_arch(capsys: pytest.CaptureFixture, supernet_run: Path, tmp_path: Path) -> None:
    words = ['search', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--output', str(tmp_path), '-j', '0']
    status, message = fails(capsys, [*words, '--max-macs', '1k'])
    assert status == 2 and '1000' in message and 'smallest' in message
    assert not (tmp_path / 'archive.jsonl').exists()


def test_stats_answers_in_words_and_in_files(
    capsys: pytest.CaptureFixture, supernet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ['stats', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--num-images', '16', '-j', '0']
    assert cli.main([*words, '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert re.search(r'^blocks\.2\.2\.e6\.paths +3 +0\.\d+', out, re.MULTILINE)
    assert re.search(
        r'^sum of 2 paths: mean \S+x .*\(2 if .* variance \S+x .*\(4 if equal, 2 if uncorr', out, re.MULTILINE
    )
    assert "the paper's exact protocol is not published" in out
    assert not list(tmp_path.iterdir())
    assert cli.main([*words, '--output', 'out']) == 0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['stats.csv', 'stats.json', 'stats.png']


@pytest.mark.parametrize(
    'words, text',
    [
        (['--num-images', '0'], 'number of images 0 must be at least 1'),
        (['--num-images', '1'], '1 images are too few'),
        (['--num-archs', '0'], 'number of archs 0 must be at least 1'),
        (['--data-dir', '/nowhere'], "'/nowhere' does not exist"),
        (['--device', 'warp'], "'warp'"),
    ],
)
def test_stats_of_wrong_values(capsys: pytest.CaptureFixture, supernet_run: Path, words: list[str], text: str) -> None:
    last = str(supernet_run / 'last.pth.tar')
    status, message = fails(capsys, ['stats', '--checkpoint', last, '-j', '0', *words])
    assert status == 2 and text in message


def test_profile_prints_size_and_cost(capsys: pytest.CaptureFixture) -> None:
    words = ['profile', '--model', 'mixpath_s1_supernet', '--num-samples', '101']
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert '5.31e+17 archs, m = 4, input 3x32x32' in out
    assert '242.77' in out and '681.28' in out


def test_recipes_lists_and_copies(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert cli.main(['recipes']) == 0
    assert re.search('^nano_supernet_cifar10 +nano supernet', capsys.readouterr().out, re.MULTILINE)
    assert cli.main(['recipes', 'cp', 'nano_cifar10', str(tmp_path)]) == 0
    assert (tmp_path / 'nano_cifar10.yaml').exists()


def test_export_prints_a_line_that_works(capsys: pytest.CaptureFixture, supernet_run: Path, tmp_path: Path) -> None:
    words = ['export', '--checkpoint', str(supernet_run / 'last.pth.tar'), '--arch', ARCH]
    assert cli.main([*words, '--output', str(tmp_path / 'model')]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    model = eval(line, {'timm': timm})
    assert model.arch == ARCH
    status, message = fails(capsys, ['stats', '--checkpoint', str(tmp_path / 'model')])
    assert status == 2 and 'holds MixPath, a statistic of paths needs a supernet' in message


def test_run_gives_a_script_its_arguments_and_our_models(tmp_path: Path) -> None:
    (tmp_path / 'helper.py').write_text('WORD = "beside the script"')
    (tmp_path / 'script.py').write_text(
        'import sys, timm, helper\n'
        'print(__name__, sys.argv[1:], helper.WORD, timm.is_model("mixpath_nano"))\n'
        'sys.exit(3)\n'
    )
    words = ['run', str(tmp_path / 'script.py'), '--model', 'x', '-b', '4', '--', 'y']
    result = mixpath(*words)
    assert result.stdout.strip() == "__main__ ['--model', 'x', '-b', '4', '--', 'y'] beside the script True"
    assert result.returncode == 3


@pytest.mark.slow
def test_space_of_ones_own_through_device_modules(digits: Path, tmp_path: Path) -> None:
    """The README's way: register in a module, train, search and export without touching the package."""
    (tmp_path / 'my_space.py').write_text(
        'from timm_mixpath import BlockSpec, SearchSpace, register_space\n'
        'blocks = BlockSpec(16, stride=2, kernel_sizes=(3, 7)), BlockSpec(24)\n'
        "register_space(SearchSpace('mine', blocks, stem_chs=8, stem_stride=2, num_features=64))\n"
    )

    def run(*words: str) -> str:
        result = subprocess.run(
            [sys.executable, '-m', 'timm_mixpath.cli', *words, '--device-modules', 'my_space'],
            env=environment(), cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    train = f'train --model mixpath_mine_supernet --data-dir {digits} --epochs 1 --warmup-epochs 0 --output . -b 32'
    run(*train.split(), '--experiment', 'r', '-j', '0', '--device', 'cpu', '--val-split', '')
    search = 'search --checkpoint r/last.pth.tar --output s --population 4 --offspring 2 --generations 1 --latency'
    out = run(*search.split(), '-j', '0', '--device', 'cpu')
    arch = out.splitlines()[-2]
    run('export', '--checkpoint', 'r/last.pth.tar', '--arch', arch, '--output', 'm')
    assert (tmp_path / 'm' / 'model.safetensors').exists()
    assert '"latency_ms"' in (tmp_path / 's' / 'front.json').read_text()


def test_import_is_light_and_rooms_need_none_of_their_own() -> None:
    code = (
        'import sys, timm\n'
        'before = set(sys.modules)\n'
        'import timm_mixpath\n'
        'new = {m.split(".")[0] for m in set(sys.modules) - before}\n'
        'new |= {m for m in ("timm.optim", "timm.scheduler", "timm.loss") if m in set(sys.modules) - before}\n'
        'heavy = {"pymoo", "scipy", "matplotlib", "huggingface_hub", "sklearn", "tqdm", "pandas"}\n'
        'print(sorted(new & {*heavy, "timm.optim", "timm.scheduler"}))\n'
        # and what is heavy is there when it is asked for
        'print("search" in dir(timm_mixpath), timm_mixpath.search.SearchConfig.__name__)\n'
        'print(timm_mixpath.train.default_args.__name__, hasattr(timm_mixpath, "nothing"))\n'
    )
    result = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    assert result.stdout.splitlines() == ['[]', 'True SearchConfig', 'default_args False'], result.stderr
