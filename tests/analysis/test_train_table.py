import csv
import json
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from commands import assert_equal, command, fails, torchrun
from conftest import small_args
from timm.models._helpers import _torch_load

from timm_mixpath import Arch, cli, get_space, sample
from timm_mixpath.analysis.arch_lists import arch_space, draw_archs, read_archs
from timm_mixpath.analysis.train_table import train_table
from timm_mixpath.models.cost import CostTable, cost_table
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import RunError, UsageError

ARCHS = draw_archs('mixpath_nano', 3, seed=1)

BACKBONE = 'mobilenetv3_small_050'


def table_args(data_dir: Path, **overrides: Any) -> Namespace:
    """Options of trainings that take half a second: 2 epochs of 4 steps."""
    options = dict(
        model='mixpath_nano', output='', experiment='', img_size=8, batch_size=50, workers=0, checkpoint_hist=1
    )
    return small_args(data_dir, Path(), **{**options, **overrides})


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / 'table.csv').read_text().splitlines()))


@pytest.fixture(scope='module')
def table(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a table of two archs."""
    folder = tmp_path_factory.mktemp('table')
    assert train_table(table_args(digits), ARCHS[:2], folder) == folder / 'table.csv'
    return folder


@pytest.fixture
def grown(table: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(table, tmp_path / 'grown'))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Arch, seed and whether it goes on, of every training that is begun."""
    calls: list[tuple[str, int, bool]] = []

    def recorded(args: Namespace) -> Any:
        calls.append((args.model_kwargs['arch'], args.seed, bool(args.resume)))
        return train(args)

    monkeypatch.setattr('timm_mixpath.train.loop.train', recorded)
    return calls


def test_table_is_what_plain_training_gives(digits: Path, table: Path, tmp_path: Path) -> None:
    assert [row['arch'] for row in rows(table)] == ARCHS[:2]
    row = rows(table)[1]
    args = table_args(digits, model_kwargs={'arch': ARCHS[1]}, output=str(tmp_path), experiment='plain')
    metrics = train(args).metrics
    assert float(row['accuracy']) == pytest.approx(metrics['eval_top1'], abs=1e-6)
    assert float(row['train_loss']) == pytest.approx(metrics['train_loss'], abs=1e-6)
    cost = CostTable(get_space('nano'), input_size=(3, 8, 8))
    assert (int(row['params']), int(row['macs'])) == (cost.params(ARCHS[1]), cost.macs(ARCHS[1]))
    assert (row['accuracy_std'], row['seeds'], row['epochs']) == ('', '42', '2')
    weights = [_torch_load(str(p / 'last.pth.tar'))['state_dict'] for p in (tmp_path / 'plain', run(table, 1))]
    assert_equal(*weights)


def run(folder: Path, index: int, seed: int = 42) -> Path:
    (path,) = (folder / 'runs').glob(f'{index:03d}-*-seed{seed}')
    return path


def test_cut_off_table_ends_the_same(
    digits: Path, table: Path, tmp_path: Path, trained: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the last epoch of the second training: the first is not touched, the second goes on."""
    module = sys.modules['timm_mixpath.train.loop']
    original, calls = module._validate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, '_validate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_table(table_args(digits), ARCHS[:2], tmp_path)
    assert [row['arch'] for row in rows(tmp_path)] == ARCHS[:1]
    monkeypatch.setattr(module, '_validate', original)

    train_table(table_args(digits), ARCHS[:2], tmp_path)
    assert trained == [(ARCHS[0], 42, False), (ARCHS[1], 42, False), (ARCHS[1], 42, True)]
    assert (tmp_path / 'table.csv').read_bytes() == (table / 'table.csv').read_bytes()
    states = [_torch_load(str(run(folder, 1) / 'last.pth.tar')) for folder in (table, tmp_path)]
    for key in ('state_dict', 'optimizer', 'epoch', 'metric'):
        assert_equal(states[0][key], states[1][key], key)

    # Cut off between the last checkpoint and the result, and between the result and the table
    (run(tmp_path, 1) / 'result.json').unlink()
    (tmp_path / 'table.csv').unlink()
    train_table(table_args(digits), ARCHS[:2], tmp_path)
    assert (tmp_path / 'table.csv').read_bytes() == (table / 'table.csv').read_bytes()


@pytest.mark.slow
def test_archs_and_seeds_can_be_added(
    digits: Path, table: Path, grown: Path, trained: list, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level('INFO')
    train_table(table_args(digits, log_interval=1), [ARCHS[2], *ARCHS[:2]], grown)
    assert trained == [(ARCHS[2], 42, False)]
    assert rows(grown)[:2] == rows(table) and rows(grown)[2]['arch'] == ARCHS[2]
    assert '3/3  ' in caplog.text and 'seed 42  top-1 ' in caplog.text
    assert 'Epoch 0' not in caplog.text  # the lines of a training

    train_table(table_args(digits), ARCHS, grown, seeds=[42, 7], drop_checkpoints=True)
    assert trained[1:] == [(arch, 7, False) for arch in ARCHS]
    for index, row in enumerate(rows(grown)):
        results = [json.loads((run(grown, index, seed) / 'result.json').read_text()) for seed in (42, 7)]
        accuracies = [result['accuracy'] for result in results]
        assert (row['arch'], row['seeds']) == (ARCHS[index], '42 7')
        assert float(row['accuracy']) == pytest.approx(sum(accuracies) / 2, abs=1e-6)
        assert float(row['accuracy_std']) == pytest.approx(statistics.stdev(accuracies), abs=1e-6)
        assert [float(value) for value in row['accuracies'].split()] == pytest.approx(accuracies, abs=1e-3)
    assert not list(grown.glob('runs/*/*.pth.tar')) and len(list(grown.glob('runs/*/summary.csv'))) == 6


def test_another_table_is_refused(digits: Path, grown: Path, trained: list) -> None:
    before = {path: path.read_bytes() for path in grown.rglob('*') if path.is_file()}
    for overrides, archs, seeds, text in (
        (dict(epochs=3), ARCHS, None, '--epochs 2, now it is 3'),
        (dict(lr=0.2), ARCHS, None, r'--lr 0\.05, now it is 0\.2'),
        (dict(model_kwargs={'width_mult': 0.5}), ARCHS, None, '--model-kwargs {}'),
        ({}, ARCHS[1:], None, f'arch {ARCHS[0]}'.replace('+', r'\+')),
        ({}, ARCHS, [43], 'seed 42, which is not in the list'),
    ):
        with pytest.raises(UsageError, match=text):
            train_table(table_args(digits, **overrides), archs, grown, seeds=seeds)
    assert not trained
    assert before == {path: path.read_bytes() for path in grown.rglob('*') if path.is_file()}
    (grown / 'table.json').write_text('{"format": ')
    with pytest.raises(UsageError, match='damaged'):
        train_table(table_args(digits), ARCHS, grown)
    (grown / 'table.json').unlink()
    with pytest.raises(UsageError, match='not overwritten'):
        train_table(table_args(digits), ARCHS, grown)


def test_second_command_at_the_same_time_is_refused(digits: Path, grown: Path) -> None:
    code = (
        f'import fcntl, sys; f = open({str(grown / ".lock")!r}, "a"); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)'
    )
    holder = subprocess.Popen([sys.executable, '-c', f'{code}; sys.stdin.read()'], stdin=-1, stdout=-1)
    try:
        holder.stdout.readline()
        with pytest.raises(UsageError, match='another command is working'):
            train_table(table_args(digits), ARCHS[:2], grown)
    finally:
        holder.communicate()
    train_table(table_args(digits, workers=1), ARCHS[:2], grown)  # how it is trained may change, and all is done


def test_failed_training_does_not_stop_the_others(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(args: Namespace) -> Any:
        if args.model_kwargs['arch'] == ARCHS[0]:
            raise RunError('the loss is nan')
        return train(args)

    args = table_args(digits, epochs=1)
    # A command that failed before anything was trained can be corrected
    with pytest.raises(UsageError, match="'sdg'"):
        train_table(table_args(digits, opt='sdg'), ARCHS[:2], tmp_path)
    monkeypatch.setattr('timm_mixpath.train.loop.train', failing)
    with pytest.raises(RunError, match=r'1 of 2 trainings failed, the first is k.*, seed 42: the loss is nan'):
        train_table(args, ARCHS[:2], tmp_path)
    assert [row['arch'] for row in rows(tmp_path)] == ARCHS[1:2] and 'failed: the loss is nan' in caplog.text
    monkeypatch.undo()
    train_table(args, ARCHS[:2], tmp_path)
    assert [row['arch'] for row in rows(tmp_path)] == ARCHS[:2]


@pytest.mark.slow
def test_processes_share_the_trainings(digits: Path, table: Path, tmp_path: Path) -> None:
    """torchrun: the same table as from one process, and a failure in one rank does not end the other."""
    (tmp_path / 'archs.txt').write_text('\n'.join(ARCHS))
    (tmp_path / 'failing.py').write_text(
        'import timm_mixpath.train.loop as module\n'
        'from timm_mixpath.utils.errors import RunError\n'
        'original = module.train\n'
        'def train(args):\n'
        f'    if args.model_kwargs["arch"] == {ARCHS[2]!r}:\n'
        '        raise RunError("no memory")\n'
        '    return original(args)\n'
        'module.train = train\n'
    )
    words = [*command(table_args(digits), 'table'), '--archs', 'archs.txt', '--table-dir', 'table']
    result = torchrun(*words, '--device-modules', 'failing', cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count('1 of 3 trainings failed') == 1, result.stderr[-3000:]
    assert (tmp_path / 'table' / 'table.csv').read_bytes() == (table / 'table.csv').read_bytes()
    assert all(result.stderr.count(f'{i}/3  ') == 1 for i in (1, 2, 3)), result.stderr[-3000:]


def test_lists_of_archs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    space = get_space('nano')
    swapped = ARCHS[0].replace('k3+7', 'k7+3')
    assert swapped != ARCHS[0]
    text = tmp_path / 'archs.txt'
    text.write_text(f'# drawn\r\n\r\n{ARCHS[0]}\r\n  {ARCHS[1]} \n{swapped}\n')
    assert read_archs(text, space) == ARCHS[:2]
    assert '1 duplicate archs are left out (line 5)' in caplog.text
    for column in ('arch', 'cell', 'ops'):
        table = tmp_path / f'{column}.csv'
        table.write_text(f'accuracy,{column}\n1,"{ARCHS[0]}"\n2,"{ARCHS[1]}"\n')
        assert read_archs(table, space) == ARCHS[:2]
    table.write_text(f'n, arch \n\n,\n1,"{ARCHS[0]}"\n\n2,"{ARCHS[1]}"\n')  # as `rank` reads it
    assert read_archs(table, space) == ARCHS[:2]

    for name, content, message in (
        (
            'bad.txt',
            f'{ARCHS[0]}\n# two that are wrong\nk9_e3\n{ARCHS[1]},k3_e3\n',
            '2 of 3 archs .* line 3: .*1 blocks',
        ),
        ('bad.csv', f'name\n"{ARCHS[0]}"\n', 'no column arch, cell, ops; it has name'),
        ('bare.csv', f'arch,n\n{ARCHS[0]}\n', '1 of 1 archs .* line 2: .*1 blocks'),
        ('quote.csv', f'arch,n\n"{ARCHS[0]},1\n"{ARCHS[1]}",2\n', 'list of archs .* is not CSV, line 3'),
        ('empty.txt', '# nothing\n', 'is empty'),
        ('empty.csv', ' ,\n', 'list of archs .* is empty'),
        ('header.csv', 'arch\n', 'is empty'),
        ('no.csv', None, 'list of archs .* does not exist'),
        ('no/such.txt', None, 'can not be read: No such file'),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=message) as info:
            read_archs(tmp_path / name, space)
        assert name in str(info.value)


def test_drawn_archs(monkeypatch: pytest.MonkeyPatch) -> None:
    archs = draw_archs('mixpath_nano', 30)
    assert draw_archs('mixpath_nano.untrained', 20) == archs[:20] and len(set(archs)) == 30
    assert draw_archs('mixpath_nano', 5, seed=1)[:3] == ARCHS != archs[:3]

    def most_paths(archs: list[str]) -> int:
        return max(paths for arch in archs for block in Arch(arch).blocks for paths in block.num_paths)

    assert most_paths(archs) == 2  # what the supernet can rank, although a sub-network may sum all three
    assert most_paths(draw_archs('mixpath_nano', 5, m=3)) == 3
    with pytest.raises(UsageError, match='m=4 is out of range'):
        draw_archs('mixpath_nano', 5, m=4)
    with pytest.raises(UsageError, match='0 must be at least 1'):
        draw_archs('mixpath_nano', 0)

    with pytest.raises(UsageError, match="unknown sampling 'all', known are paths, uniform, fair"):
        draw_archs('mixpath_nano', 5, sampling='all')

    few: Iterator[str] = iter([*ARCHS, *ARCHS * 10])
    monkeypatch.setattr('timm_mixpath.analysis.arch_lists.sample', lambda *_, **__: next(few))
    monkeypatch.setattr('timm_mixpath.analysis.arch_lists._SAMPLING_PATIENCE', 20)
    with pytest.raises(UsageError, match=r"4 archs are too many, only 3 .* with sampling 'paths' in a space of"):
        draw_archs('mixpath_nano', 4)


def test_archs_inside_a_band_of_macs() -> None:
    cost = cost_table(timm.create_model('mixpath_nano_supernet', device='meta'), (3, 16, 16))
    low, high = cost.bounds('macs')
    band = (0.49 * (low + high), 0.51 * (low + high))
    archs = draw_archs('mixpath_nano', 20, macs=band, input_size=(3, 16, 16))
    assert len(set(archs)) == 20 and all(band[0] <= cost.macs(arch) <= band[1] for arch in archs)
    assert archs[:10] == draw_archs('mixpath_nano', 10, macs=band, input_size=(3, 16, 16))
    with pytest.raises(UsageError, match=f'no arch has 1 to 2 MACs, the smallest of the space has {low} and'):
        draw_archs('mixpath_nano', 5, macs=(1, 2), input_size=(3, 16, 16))


def test_band_is_of_the_network_that_is_trained(digits: Path, tmp_path: Path) -> None:
    # Of a width, number of cells and classes that are not the supernet's own
    words = ['table', '--model', 'mixpath_nb201', '--model-kwargs', 'width=4', 'num_cells=1', '--num-classes', '10']
    words += ['--data-dir', str(digits), '--img-size', '16', '--archs-macs', '200k', '--archs-band', '10%']
    words += ['--num-archs', '2', '--table-dir', str(tmp_path), '--epochs', '1', '--device', 'cpu', '-j', '0']
    assert cli.main(words) == 0
    with open(tmp_path / 'table.csv', newline='') as f:
        macs = [int(row['macs']) for row in csv.DictReader(f)]
    assert len(macs) == 2 and all(180_000 <= m <= 220_000 for m in macs)


@pytest.mark.parametrize('sampling, reached', [('paths', False), ('uniform', True), ('fair', True)])
def test_sampling_that_reaches_nodes_without_inputs(sampling: str, reached: bool) -> None:
    def without_inputs(node: str) -> bool:
        return all(edge.startswith('none~') for edge in node.strip('|').split('|'))

    archs = draw_archs('mixpath_nb201', 30, sampling=sampling)
    assert any(without_inputs(node) for arch in archs for node in arch.split('+')) == reached
    assert archs[0] == str(sample(get_space('nb201'), seed=0, step=0, strategy=sampling))


@pytest.mark.parametrize(
    'words, text',
    [
        ([], 'pass --model NAME'),
        (['--model', 'mixpath_nano_supernet'], 'pass --model mixpath_nano'),
        (['--model', 'resnet10t'], "'resnet10t' takes no arch"),
        (['--model', 'mixpath_a'], "'mixpath_a' has a fixed arch; pass --model mixpath_s3"),
        (['--model', 'mixpath_mega'], "'mixpath_mega'"),
        (['--model', 'mixpath_nano', '--model-kwargs', f'arch={ARCHS[0]}'], 'is one arch'),
        (['--model', 'mixpath_nano', '--num-archs', '0'], '0 must be at least 1'),
        (['--model', 'mixpath_nano', '--archs', 'x'], 'not allowed with'),
        (['--model', 'mixpath_nano', '--archs-m', '9'], 'm=9 is out of range'),
        (['--model', 'mixpath', '--archs-m', '3', '--model-kwargs', f'backbone={BACKBONE}', 'm=2'], 'm=2 differ'),
        (['--model', 'mixpath', '--model-kwargs', f'backbone={BACKBONE}', 'm=9'], 'm=9 is out of range'),
        (['--model', 'mixpath_nano', '--archs-sampling', 'all'], "invalid choice: 'all'"),
        (['--model', 'mixpath_nano', '--output', 'x'], '--output can not be used for a table'),
        (['--model', 'mixpath_nano', '--resume', 'x'], '--resume can not be used for a table'),
        (['--model', 'mixpath_nano', '--seeds', '1', '-1'], 'seed -1 is out of range'),
        (['--model', 'mixpath_nano', '--sched', 'plateau'], 'plateau'),
        (['--model', 'mixpath_nano', '--val-split', ''], '--val-split'),
        (['--model', 'mixpath_nano', '--eval-metric', 'loss'], 'loss is no accuracy'),
        (['--model', 'mixpath_nano', '--data-dir', '/nowhere'], "'/nowhere' does not exist"),
        (['--model', 'mixpath_nano', '--pretrained'], "--pretrained can not be used for a table of 'mixpath_nano'"),
        (['--model', 'mixpath_lite0'], 'pass --model mixpath --model-kwargs backbone=tf_efficientnet_lite0'),
        (['--model', 'mixpath_nano', '--archs-band', '3%'], '--archs-band 0.03 has no effect without --archs-macs'),
        *(
            (['--model', 'mixpath_nano', '--archs-macs', '4M', f'--archs-band={band}'], f'--archs-band {float(value)}')
            for band, value in (('200%', 2), ('0%', 0), ('-3%', -0.03))
        ),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture, tmp_path: Path, words: list[str], text: str
) -> None:
    status, message = fails(capsys, ['table', '--num-archs', '2', '--table-dir', str(tmp_path / 't'), *words])
    assert status == 2 and text in message
    assert not (tmp_path / 't').exists()


@pytest.mark.parametrize(
    'words', [['-macs', '4M'], ['-band', '3%'], ['-m', '2'], ['-seed', '0'], ['-sampling', 'uniform']]
)
def test_file_of_archs_is_not_drawn_from(capsys: pytest.CaptureFixture, tmp_path: Path, words: list[str]) -> None:
    archs = ['table', '--model', 'mixpath_nano', '--archs', 'x.txt', '--table-dir', str(tmp_path / 't')]
    status, message = fails(capsys, [*archs, f'--archs{words[0]}', words[1]])
    assert status == 2 and f'--archs{words[0]}' in message and 'has no effect on the archs of a file' in message


def test_wrong_option_of_the_trainings_leaves_nothing(digits: Path, tmp_path: Path) -> None:
    for changes in (dict(opt='sdg'), dict(epochs=0), dict(num_classes=3), dict(warm_start='nix')):
        with pytest.raises(UsageError):
            train_table(table_args(digits, **changes), ARCHS[:1], tmp_path / 'new' / 'table')
        assert not (tmp_path / 'new').exists()


def test_begun_training_keeps_its_options(digits: Path, tmp_path: Path) -> None:
    train_table(table_args(digits), ARCHS[:1], tmp_path)
    (run,) = (tmp_path / 'runs').iterdir()
    result = run / 'result.json'
    content = json.loads(result.read_text())
    # A result that is not whole is none, and the training, which has ended, gives it again
    for damaged in ({**content, 'accuracy': None}, {k: v for k, v in content.items() if k != 'macs'}):
        result.write_text(json.dumps(damaged))
        train_table(table_args(digits), ARCHS[:1], tmp_path)
        assert json.loads(result.read_text()) == content
    # as in the middle of the first epoch of the first training
    result.unlink()
    (run / 'last.pth.tar').rename(run / 'recovery.pth.tar')
    with pytest.raises(UsageError, match='a table of trainings with --lr'):
        train_table(table_args(digits, lr=0.5), ARCHS[:1], tmp_path)


def test_recipe_on_the_command_line(digits: Path, tmp_path: Path) -> None:
    """A recipe of the package, accuracies of held-out training images."""
    words = ['table', '-c', 'nano_cifar10', '--data-dir', str(digits), '--num-archs', '1', '--table-dir', str(tmp_path)]
    small = ['--epochs', '1', '--warmup-epochs', '0', '--img-size', '8', '-b', '50', '-j', '0']
    assert cli.main([*words, *small, '--search-holdout', '0.2', '--val-split', 'search-holdout']) == 0
    (row,) = rows(tmp_path)
    assert row['arch'] == draw_archs('mixpath_nano', 1)[0]
    assert float(row['accuracy']) * 40 / 100 == pytest.approx(round(float(row['accuracy']) * 40 / 100), abs=1e-4)
    options = json.loads((tmp_path / 'table.json').read_text())['options']
    assert (options['clip_grad'], options['epochs']) == (5.0, 1)  # of the recipe, and what stands before it


def test_space_of_the_model(digits: Path) -> None:
    space = arch_space(table_args(digits))
    assert all(space.arch(arch) == arch for arch in ARCHS)
