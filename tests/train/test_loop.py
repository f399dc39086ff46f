import copy
import csv
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from commands import HUNG, assert_equal, command, environment, torchrun_of_users
from conftest import small_args
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models._helpers import _torch_load
from timm.optim import create_optimizer_v2

from timm_mixpath import get_space, sample
from timm_mixpath.hub.export import export, save_model
from timm_mixpath.search.images import load_batches
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.train.data import hold_out, open_dataset, targets
from timm_mixpath.train.loaders import create_loaders
from timm_mixpath.train.loop import fill_momentum, train
from timm_mixpath.train.options import add_train_options, apply_config
from timm_mixpath.utils.errors import RunError, UsageError


def test_run_leaves_checkpoint_summary_and_args(supernet_run: Path) -> None:
    rows = list(csv.DictReader((supernet_run / 'summary.csv').read_text().splitlines()))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert 0 <= float(rows[-1]['eval_top1']) <= 100
    checkpoint = _torch_load(str(supernet_run / 'last.pth.tar'), weights_only=True)
    assert checkpoint['epoch'] == 1
    assert checkpoint['args'].search_holdout == 0.1
    # 180 of 200 images are left for training, 5 steps of 32 in each of 2 epochs
    assert checkpoint['state_dict']['sample_step'] == 10
    assert (supernet_run / 'args.yaml').exists() and (supernet_run / 'model_best.pth.tar').exists()


def test_training_learns(digits: Path, tmp_path: Path) -> None:
    args = small_args(
        digits, tmp_path, model='mixpath_nano', epochs=8, batch_size=20, reprob=0.0, lr=0.1, val_interval=8
    )
    result = train(args)
    assert result.metrics['eval_top1'] > 60  # chance is 10


@pytest.mark.parametrize(
    'model, kwargs, source',
    [
        ('mixpath_supernet', dict(backbone='mobilenetv3_small_050'), 'mobilenetv3_small_050'),
        pytest.param('mixpath_s2_supernet', {}, 'mixnet_m', marks=pytest.mark.slow),
    ],
)
def test_training_starts_from_a_network_of_timm(
    digits: Path, tmp_path: Path, model: str, kwargs: dict[str, Any], source: str
) -> None:
    """`--warm-start`: the weights, and what is kept of where they are from."""
    torch.manual_seed(0)
    network = timm.create_model(source, num_classes=10)
    prepared = dict(mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.95)  # as no network of this name by default
    save_model(network, tmp_path / 'network', resolve_model_data_config(network) | prepared)
    options = dict(model=model, model_kwargs=kwargs, epochs=1, lr=1e-12, weight_decay=0.0, search_holdout=0.5)
    run = train(small_args(digits, tmp_path, warm_start=f'local-dir:{tmp_path / "network"}', **options))
    trained = load_model(run.output_dir / 'last.pth.tar').model
    torch.testing.assert_close(trained.conv_stem.weight, network.conv_stem.weight)
    torch.testing.assert_close(trained.classifier.weight, network.classifier.weight)
    assert trained.pretrained_cfg['notes'] == (
        'warm start from weights of the folder network, whose licence is not recorded',
    )
    last = str(run.output_dir / 'last.pth.tar')
    for _ in range(2):  # behind --resume, too, which does not look at the network
        data_config = load_model(last).data_config
        assert [np.ravel(data_config[key]).tolist() for key in prepared] == [[0.5] * 3, [0.25] * 3, [0.95]]
        train(small_args(digits, tmp_path, **{**options, 'epochs': 2}, resume=last, output='', experiment=''))


def test_origin_of_weights_goes_on_from_training_to_training(digits: Path, tmp_path: Path) -> None:
    """As their licence does: through folders, files in them, checkpoints and `--resume`, when the source is gone."""
    torch.manual_seed(0)
    network = timm.create_model('mobilenetv3_small_050', num_classes=10)
    network.pretrained_cfg['notes'] = ('of a far land',)
    save_model(network, tmp_path / 'network', resolve_model_data_config(network))
    backbone = dict(model_kwargs=dict(backbone='mobilenetv3_small_050'), epochs=1, search_holdout=0.5)

    def origin(checkpoint: Path) -> tuple[str, ...]:
        return load_model(checkpoint).model.pretrained_cfg['notes']

    file = str(tmp_path / 'network' / 'model.safetensors')
    run = train(
        small_args(digits, tmp_path, model='mixpath_supernet', pretrained=True, pretrained_path=file, **backbone)
    )
    supernet = run.output_dir / 'last.pth.tar'
    shutil.rmtree(tmp_path / 'network')
    expected = (
        'warm start from weights of mobilenetv3_small_050 in model.safetensors, whose licence is not recorded',
        'of a far land',
    )
    assert origin(supernet) == expected
    arch = str(load_model(supernet).model.space.default_arch)
    export(supernet, tmp_path / 'exported', arch=arch)
    backbone['model_kwargs'] = {**backbone['model_kwargs'], 'arch': arch}
    initial = tmp_path / 'exported' / 'model.safetensors'
    for name in 'first', 'second':
        options = dict(experiment=name, initial_checkpoint=str(initial), **backbone)
        initial = train(small_args(digits, tmp_path, model='mixpath', **options)).output_dir / 'last.pth.tar'
        assert origin(initial) == expected
    last = str(initial)
    options = {**backbone, 'epochs': 2}
    train(small_args(digits, tmp_path, model='mixpath', **options, resume=last, output='', experiment=''))
    assert origin(last) == expected


PREPARED = dict(mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.95, crop_mode='squash')  # nothing has it by default


def prepared(checkpoint: Path) -> dict[str, Any]:
    data_config = load_model(checkpoint).data_config
    return {
        key: np.ravel(data_config[key]).tolist() if key in ('mean', 'std') else data_config[key] for key in PREPARED
    }


def folder_of(model: str, path: Path, **kwargs: Any) -> Path:
    network = timm.create_model(model, num_classes=10, **kwargs)
    save_model(network, path, resolve_model_data_config(network) | PREPARED)
    return path


@pytest.mark.parametrize(
    'how',
    [
        'options',
        'initial',
        *(pytest.param(how, marks=pytest.mark.slow) for how in ('weights', 'backbone', 'folder', 'checkpoint')),
    ],
)
def test_checkpoint_tells_how_its_images_were_prepared(digits: Path, tmp_path: Path, how: str) -> None:
    """Wherever the training had it from; also behind a --resume that does not say it again."""
    model, expected = dict(model='mixpath_nano'), PREPARED
    start: dict[str, Any] = {}
    if how == 'options':
        start = dict(PREPARED, img_size=24)
    elif how == 'backbone':
        model = dict(model='mixpath_supernet', model_kwargs=dict(backbone='mobilenetv3_small_050'))
        folder = folder_of('mobilenetv3_small_050', tmp_path / 'network')
        start = dict(pretrained=True, pretrained_path=str(folder / 'model.safetensors'))
    elif how == 'checkpoint':
        run = train(small_args(digits, tmp_path / 'before', **model, **PREPARED, epochs=1))
        start = dict(initial_checkpoint=str(run.output_dir / 'last.pth.tar'), crop_pct=0.95, crop_mode='squash')
    else:
        folder = folder_of('mixpath_nano', tmp_path / 'network')
        start = {
            'weights': dict(pretrained=True, pretrained_path=str(folder / 'model.safetensors')),
            'folder': dict(model=f'local-dir:{folder}'),
            # Weights to start from say how images are normalised, not how they are resized
            'initial': dict(initial_checkpoint=str(folder / 'model.safetensors')),
        }[how]
        if how == 'initial':
            expected = dict(PREPARED, crop_pct=1.0, crop_mode='center')
    options = {**model, **start}
    run = train(small_args(digits, tmp_path, **options, epochs=1))
    last = run.output_dir / 'last.pth.tar'
    size = (3, start.get('img_size', 16), start.get('img_size', 16))
    assert prepared(last) == expected and load_model(last).data_config['input_size'] == size
    resumed = dict(model, epochs=2, resume=str(last), img_size=None, output='', experiment='')
    if how == 'folder':
        resumed['model'] = options['model']
    train(small_args(digits, tmp_path, **resumed))
    assert prepared(last) == expected and load_model(last).data_config['input_size'] == size


def test_images_that_are_no_squares_are_seen_alike_everywhere(tmp_path: Path) -> None:
    """In validation, in a search and by whoever loads the model: an image as wide as three is squashed."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20] = 255  # a centre crop does not see it
    (tmp_path / 'validation' / 'a').mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / 'validation' / 'a' / '0.png')
    data_config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    args = small_args(tmp_path, tmp_path)
    args.distributed, args.rank, args.world_size = False, 0, 1
    images = open_dataset('', str(tmp_path), 'validation')
    for mode in ('squash', 'center'):
        data_config |= dict(crop_pct=1.0, crop_mode=mode)
        expected = create_transform(**data_config)(Image.fromarray(pixels))
        _, validation, _ = create_loaders(args, data_config, images, images, torch.device('cpu'))
        ((seen, _),) = validation
        ((searched, _),) = load_batches(images, data_config, workers=0)
        torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(searched[0], expected, atol=1e-5, rtol=0)
        assert bool(expected[..., 0].mean() > 0) is (mode == 'squash')


def test_second_run_does_not_overwrite(digits: Path, supernet_run: Path) -> None:
    before = (supernet_run / 'last.pth.tar').read_bytes()
    with pytest.raises(UsageError, match='--resume'):
        train(small_args(digits, supernet_run.parent))
    assert (supernet_run / 'last.pth.tar').read_bytes() == before


def test_killed_run_resumes_bit_exactly(digits: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then --resume: equal to a run that was never cut off."""
    options = dict(
        epochs=3, workers=1, model_ema=True, model_ema_decay=0.9, clip_grad=1.0, log_interval=1, drop_path=0.1
    )
    whole = train(small_args(digits, tmp_path / 'whole', **options)).output_dir

    args = small_args(digits, tmp_path / 'killed', **options)
    run = Path(args.output) / 'run'
    words = [sys.executable, '-m', 'timm_mixpath.cli', *command(args, 'train')]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    for line in process.stderr:
        if 'Train: 1 [   2/5]' in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert _torch_load(str(run / 'last.pth.tar'), weights_only=True)['epoch'] == 0
    args.resume = str(run / 'last.pth.tar')
    train(args)

    a, b = (_torch_load(str(path / 'last.pth.tar'), weights_only=True) for path in (whole, run))
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'epoch', 'metric'):
        assert_equal(a[key], b[key], key)
    assert (whole / 'summary.csv').read_text() == (run / 'summary.csv').read_text()


def test_checkpoint_survives_kill_at_any_moment(digits: Path, tmp_path: Path) -> None:
    """At every SIGKILL there is either no checkpoint yet or a whole one."""
    args = small_args(digits, tmp_path, epochs=50, val_split='', workers=0, img_size=8)
    last = tmp_path / 'run' / 'last.pth.tar'
    process = subprocess.Popen([sys.executable, '-m', 'timm_mixpath.cli', *command(args, 'train')], env=environment())
    deadline = time.monotonic() + HUNG
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    copies = 0
    while process.poll() is None and copies < 40 and time.monotonic() < deadline:
        snapshot = tmp_path / 'snapshot.pth.tar'
        shutil.copyfile(last, snapshot)  # what a kill at this moment would leave; raises if there is none
        copies += 1
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert copies > 5
    _torch_load(str(last), weights_only=True)


def test_not_finite_loss_stops_and_keeps_checkpoint(digits: Path, tmp_path: Path) -> None:
    run = train(small_args(digits, tmp_path, epochs=1)).output_dir
    before = (run / 'last.pth.tar').read_bytes()
    args = small_args(digits, tmp_path, epochs=2, resume=str(run / 'last.pth.tar'), no_resume_opt=True, lr=1e30)
    with pytest.raises(RunError, match=r'the loss is (nan|inf) in epoch 1.*last\.pth\.tar'):
        train(args)
    assert (run / 'last.pth.tar').read_bytes() == before


def test_holdout_is_stratified_disjoint_and_stable(digits: Path) -> None:
    dataset = open_dataset('', str(digits), 'train')
    labels = targets(dataset)
    kept, held = hold_out(dataset, 0.25)
    assert len(kept) == 150 and len(held) == 50
    assert not set(kept.indices) & set(held.indices)
    assert all([labels[i] for i in held.indices].count(c) == 5 for c in range(10))
    assert hold_out(open_dataset('', str(digits), 'train'), 0.25)[1].indices == held.indices


def test_holdout_leaves_every_class_an_image(digits: Path, tmp_path: Path) -> None:
    for label, count in (('0', 10), ('1', 1), ('2', 2)):
        (tmp_path / label).mkdir()
        for path in sorted((digits / 'train' / label).iterdir())[:count]:
            shutil.copy(path, tmp_path / label)
    dataset = open_dataset('', str(tmp_path), '')
    labels = targets(dataset)
    for fraction in (0.5, 0.9):
        kept, _ = hold_out(dataset, fraction)
        assert {labels[i] for i in kept.indices} == {0, 1, 2}


def test_ordinary_model_trains_on_all_images(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    train(small_args(digits, tmp_path, model='mixpath_nano', epochs=1, val_split='', mixup=0.2, smoothing=0.1))
    assert 'Data: 200 training images, no validation' in caplog.text


@pytest.mark.parametrize(
    'overrides, error, text',
    [
        (dict(model=''), UsageError, 'pass --model'),
        (dict(data_dir='/nowhere'), UsageError, "'/nowhere' does not exist"),
        (dict(data_dir=None), UsageError, 'pass --data-dir'),
        (dict(train_split='trian'), UsageError, "'trian' is not in"),
        (dict(num_classes=7), UsageError, '--num-classes 10'),
        (dict(batch_size=1000), UsageError, 'lower --batch-size'),
        (dict(batch_size=0), UsageError, '--batch-size 0'),
        (dict(model='mixpath_mega'), UsageError, "'mixpath_mega'"),
        (dict(model_kwargs={'m': 9}), UsageError, 'm=9 is out of range'),
        (dict(opt='sdg'), UsageError, "'sdg'"),
        (dict(warmup_epochs=0.5, sched_on_updates=False), UsageError, '--warmup-epochs 0.5 is part of an epoch'),
        (dict(warmup_epochs=-1), UsageError, '--warmup-epochs -1'),
        (dict(torchcompile='inducer'), UsageError, "--torchcompile 'inducer'"),
        (dict(torchcompile_mode='max-autotune'), UsageError, 'no effect without --torchcompile'),
        (dict(torchcompile='inductor', torchcompile_mode='reduce-overhead'), UsageError, 'CUDA graphs'),
        (dict(bce_sum=True), UsageError, '--bce-sum has no effect without --bce-loss'),
        (dict(mean=[0.5, 0.5]), UsageError, '--mean has 2 values, the input 3 channels'),
        (dict(interpolation='foo'), UsageError, "--interpolation 'foo' is unknown, known are nearest, bilinear"),
        (dict(train_interpolation='foo'), UsageError, "--train-interpolation 'foo' is unknown"),
        (dict(train_crop_mode='foo'), UsageError, "--train-crop-mode 'foo' is unknown, known are rrc, rkrc, rkrr"),
        (dict(remode='foo'), UsageError, "--remode 'foo' is unknown"),
        (
            dict(warmup_prefix=True, warmup_epochs=0.5),
            UsageError,
            '--warmup-epochs 0.5 is part of an epoch, and',
        ),
        (dict(sched='step', decay_epochs=0), UsageError, '--decay-epochs 0 must be positive'),
        (dict(start_epoch=-1), UsageError, '--start-epoch -1 must not be negative'),
        (dict(start_epoch=5, epochs=2), UsageError, '--start-epoch 5 leaves nothing to train of 2 epochs'),
        (dict(worker_seeding='foo'), UsageError, "worker_seeding is 'foo', allowed are 'all', 'part'"),
        (
            dict(model='selecsls42', grad_checkpointing=True),
            UsageError,
            "--grad-checkpointing does not work for model 'selecsls42'",
        ),
        (dict(cooldown_epochs=2, sched='step'), UsageError, '--cooldown-epochs 2 has no effect with --sched step'),
        (dict(scale=[0.5]), UsageError, '--scale 0.5 must be two positive numbers, the smaller one first'),
        (dict(ratio=[0.0, 0.0]), UsageError, '--ratio 0 0 must be two positive numbers'),
        (dict(device='meta', cpu_kernels=True), UsageError, "--cpu-kernels has no effect on device 'meta'"),
        (dict(device='cuda:77'), UsageError, "'cuda:77'"),
        (dict(output='/dev/null/out'), RunError, '/dev/null'),
        (dict(resume='/nowhere.pth.tar'), UsageError, '/nowhere.pth.tar'),
        (dict(search_holdout=1.5), UsageError, '1.5'),
        (dict(model_kwargs={'num_classes': 3}), UsageError, 'num_classes'),
        (dict(model_kwargs={'act_layer': 'bogus'}), UsageError, 'bogus'),
        (dict(model_kwargs={'colour': 3}), UsageError, 'colour'),
        (dict(gp='bogus'), UsageError, "'mixpath_nano_supernet' can not be created"),
        (dict(model='foo:bar'), UsageError, "'foo:bar'"),
        (dict(input_size=[3, 0, 0]), UsageError, '(3, 0, 0)'),
        (dict(in_chans=0), UsageError, '--in-chans 0'),
        (dict(sched='bogus'), UsageError, "'bogus'"),
        (dict(opt='adamw', opt_betas=[0.9]), UsageError, "'adamw'"),
        (dict(aa='bogus'), UsageError, 'augmentation'),
        (dict(mixup=0.2, batch_size=15), UsageError, '--batch-size 15 must be even'),
        (dict(validation_batch_size=-1), UsageError, '--validation-batch-size -1'),
        (dict(mean=[0.5, 0.5]), UsageError, 'mean'),
        (dict(seed=-1), UsageError, '--seed -1'),
        (dict(initial_checkpoint='/nowhere'), UsageError, "'/nowhere' is not a file"),
        (dict(dataset='bogus/x'), UsageError, "'bogus/x'"),
        (dict(clip_grad=-1.0), UsageError, '--clip-grad -1'),
        (dict(sched='plateau', resume='x'), UsageError, 'plateau'),
    ],
)
def test_bad_input_is_one_sentence(
    digits: Path, tmp_path: Path, overrides: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as info:
        train(small_args(digits, tmp_path, **overrides))
    assert text in str(info.value) and '\n' not in str(info.value)
    assert list(tmp_path.iterdir()) == []  # no empty folder that looks like a run


def test_failed_start_leaves_folders_as_they_were(digits: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine' / 'run').mkdir(parents=True)
    for output in ('mine', 'new/deep'):
        with pytest.raises(UsageError, match='mixpath_mega'):
            train(small_args(digits, tmp_path / output, model='mixpath_mega'))
    assert sorted(tmp_path.rglob('*')) == [tmp_path / 'mine', tmp_path / 'mine' / 'run']


def test_empty_and_unreadable_data(tmp_path: Path) -> None:
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    with pytest.raises(RunError, match=r'can not be read|holds no images'):
        train(small_args(tmp_path, tmp_path / 'out'))
    (tmp_path / 'train.tar').write_text('not a tar')
    with pytest.raises(RunError, match='can not be read'):
        train(small_args(tmp_path, tmp_path / 'out', train_split='train.tar'))


def test_damaged_checkpoint_is_refused(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / 'last.pth.tar'
    damaged.write_bytes((supernet_run / 'last.pth.tar').read_bytes()[:5000])
    with pytest.raises(RunError, match=r'does not fit|not a readable'):
        train(small_args(digits, tmp_path / 'out', resume=str(damaged)))
    with pytest.raises(UsageError, match='a checkpoint of mixpath_nano_supernet, not of mixpath_nano'):
        train(small_args(digits, tmp_path / 'out', model='mixpath_nano', resume=str(supernet_run / 'last.pth.tar')))


def test_batch_of_one_image_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'a batch of 1 image\(s\) is too small for batch norms.*larger --batch-size'):
        train(small_args(digits, tmp_path, batch_size=1, model='mobilenetv4_conv_small_050'))


def test_two_processes_agree(digits: Path, tmp_path: Path) -> None:
    """torchrun with 2 gloo processes: same archs in the same step, equal weights at the end."""
    args = small_args(digits, tmp_path, epochs=1, batch_size=16, workers=1)
    result = torchrun_of_users(*command(args, 'train'), '--device-modules', 'recorder', RECORDER_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    archs = [(tmp_path / f'archs-{rank}.txt').read_text().splitlines() for rank in (0, 1)]
    space = get_space('nano')
    assert archs[0] == archs[1] == [str(sample(space, seed=args.seed, step=i)) for i in range(len(archs[0]))]
    assert len(archs[0]) == 5
    weights = [torch.load(tmp_path / f'weights-{rank}.pt') for rank in (0, 1)]
    assert_equal(*weights)


def test_torchvision_data_set(digits: Path, tmp_path: Path) -> None:
    """A data set that is not timm's own is split and trained on as well."""
    run = train(small_args(digits, tmp_path, dataset='torch/image_folder', epochs=1)).output_dir
    assert _torch_load(str(run / 'last.pth.tar'), weights_only=True)['state_dict']['sample_step'] == 5


def test_resume_keeps_what_the_run_had(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    """Holding out images that were trained on, or sampling another sequence, must not happen unseen."""
    last = tmp_path / 'a' / 'last.pth.tar'
    shutil.copytree(supernet_run, last.parent)
    for overrides, text in (
        (dict(search_holdout=0.3), '--search-holdout 0.3 differs from the 0.1'),
        (dict(model_kwargs={'m': 3}), 'm=3 differs'),
        (dict(model_kwargs={'seed': 7}), r'seed=7 differs from .* \(42\)'),
    ):
        with pytest.raises(UsageError, match=text):
            train(small_args(digits, tmp_path, experiment='a', resume=str(last), epochs=3, **overrides))

    args = small_args(digits, tmp_path, resume=str(last), epochs=3, seed=43)
    args.output = args.experiment = ''
    result = train(args)
    assert result.output_dir == last.parent.resolve()
    checkpoint = _torch_load(str(last), weights_only=True)
    assert checkpoint['args'].search_holdout == 0.1 and checkpoint['args'].model_kwargs == {'seed': 42}


def test_checkpoint_of_train_script_is_known_to_have_seen_all_images(supernet_run: Path, digits: Path, tmp_path: Path):
    checkpoint = torch.load(supernet_run / 'last.pth.tar', weights_only=False)
    del checkpoint['args'].search_holdout, checkpoint['args'].model_kwargs['seed']
    (tmp_path / 'stock').mkdir()
    last = tmp_path / 'stock' / 'last.pth.tar'
    torch.save(checkpoint, last)
    train(small_args(digits, tmp_path, resume=str(last), epochs=3))
    args = _torch_load(str(tmp_path / 'run' / 'last.pth.tar'), weights_only=True)['args']
    assert args.search_holdout == 0 and args.model_kwargs == {'seed': 0}


def test_seed_reaches_the_sampled_archs(digits: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(small_args(digits, tmp_path, experiment=str(seed), seed=seed, epochs=1, val_split=''))
    runs = [_torch_load(str(tmp_path / s / 'last.pth.tar'), weights_only=True) for s in '12']
    assert [r['args'].model_kwargs['seed'] for r in runs] == [1, 2]


def test_every_epoch_leaves_a_checkpoint_and_args_are_a_recipe(digits: Path, tmp_path: Path) -> None:
    run = train(small_args(digits, tmp_path, epochs=3, val_interval=3, checkpoint_hist=3)).output_dir
    assert [(run / f'checkpoint-{e}.pth.tar').exists() for e in range(3)] == [True] * 3
    parser = ArgumentParser()
    add_train_options(parser)
    apply_config(parser, run / 'args.yaml')
    assert parser.parse_args([]).model == 'mixpath_nano_supernet'
    # also those of a run that went on, which is not where another one begins
    train(small_args(digits, tmp_path, epochs=4, resume=str(run / 'last.pth.tar')))
    apply_config(parser, run / 'args.yaml')
    assert parser.parse_args([]).epochs == 4 and not parser.parse_args([]).resume


def test_grayscale(digits: Path, tmp_path: Path) -> None:
    train(small_args(digits, tmp_path, epochs=1, in_chans=1))
    loaded = load_model(tmp_path / 'run' / 'last.pth.tar')
    assert loaded.data_config['input_size'] == (1, 16, 16) and loaded.args.input_img_mode == 'L'


@pytest.mark.parametrize('opt', ['adahessian', 'lookahead_momentum'])
def test_optimizers_that_need_more_of_the_loop(digits: Path, tmp_path: Path, opt: str) -> None:
    train(small_args(digits, tmp_path, model='mixpath_nano', opt=opt, epochs=1, val_split='', lr=0.01))
    state = _torch_load(str(tmp_path / 'run' / 'last.pth.tar'), weights_only=True)['state_dict']
    assert all(torch.isfinite(v).all() for v in state.values())


def test_broken_images_and_single_file_are_refused(digits: Path, tmp_path: Path) -> None:
    for name in ('a', 'b'):
        (tmp_path / 'd' / 'train' / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / 'd' / 'train' / name / f'{i}.png').write_text('no image')
    options = dict(num_classes=2, batch_size=4, val_split='')
    with pytest.raises(RunError, match='images can not be read'):
        train(small_args(tmp_path / 'd', tmp_path, **options))
    (tmp_path / 'one.tar').write_bytes(b'')
    with pytest.raises(UsageError, match='is a file'):
        train(small_args(tmp_path / 'one.tar', tmp_path, **options))


def test_parts_of_a_split_have_transforms_of_their_own(digits: Path) -> None:
    kept, held = hold_out(open_dataset('', str(digits), 'train'), 0.1)
    kept.transform, held.transform = 'train', 'search'
    assert (kept.transform, held.transform) == ('train', 'search')


def test_validation_on_held_out_training_images(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the validation split: a test set stays unseen."""
    caplog.set_level('INFO')
    shutil.copytree(digits / 'train', tmp_path / 'data' / 'train')
    options = dict(model='mixpath_nano', epochs=1, val_split='search-holdout')
    result = train(small_args(tmp_path / 'data', tmp_path, search_holdout=0.25, **options))
    assert 'Data: 150 training images, 50 validation images' in caplog.text
    assert result.metrics['eval_top1'] % 2 == pytest.approx(0, abs=1e-4)  # of 50 images
    with pytest.raises(UsageError, match='needs a --search-holdout SHARE'):
        train(small_args(tmp_path / 'data', tmp_path, experiment='other', **options))


def test_process_group_of_the_caller_is_used_and_left_open(digits: Path, tmp_path: Path) -> None:
    alone = train(small_args(digits, tmp_path, experiment='alone', epochs=1)).metrics
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        within = train(small_args(digits, tmp_path, experiment='within', epochs=1)).metrics
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert within == alone


def test_frozen_batch_norms_keep_their_statistics(digits: Path, tmp_path: Path) -> None:
    """Of a warm start these are what the statistics of every sum of paths are."""
    first = train(small_args(digits, tmp_path, epochs=1)).output_dir / 'last.pth.tar'
    options = dict(epochs=1, lr=0.01, initial_checkpoint=str(first), experiment='frozen')
    second = train(small_args(digits, tmp_path, frozen_bn=True, **options)).output_dir / 'last.pth.tar'
    before, after = (load_model(path).model.state_dict() for path in (first, second))
    statistics = [key for key in before if key.endswith(('running_mean', 'running_var'))]
    assert len(statistics) > 20
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    weights = [key.replace('running_mean', 'weight') for key in statistics if key.endswith('running_mean')]
    assert any(not torch.equal(before[key], after[key]) for key in weights)


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_fused_optimizers_train_a_supernet_as_others_do(opt: str) -> None:
    torch.manual_seed(0)
    start = timm.create_model('mixpath_nano_supernet').double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    trained = []
    for kwargs in ({}, dict(fused=True)):
        supernet = copy.deepcopy(start).train()
        optimizer = create_optimizer_v2(supernet, opt, lr=0.01, weight_decay=0.1, momentum=0.9, **kwargs)
        if kwargs:
            fill_momentum(optimizer)
        for _ in range(4):  # other parameters have a gradient in every step
            optimizer.zero_grad()
            supernet(x).square().mean().backward()
            optimizer.step()
        trained.append(supernet.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_fused_optimizer_goes_on(digits: Path, tmp_path: Path) -> None:
    options = dict(opt_kwargs={'fused': True}, experiment='fused')
    last = train(small_args(digits, tmp_path, epochs=1, **options)).output_dir / 'last.pth.tar'
    assert train(small_args(digits, tmp_path, epochs=2, resume=str(last), **options)).metrics['train_loss'] > 0


def test_binary_cross_entropy_is_that_of_timm(digits: Path, tmp_path: Path) -> None:
    options = dict(epochs=1, lr=0.0, model='mixpath_nano', smoothing=0.1, weight_decay=0.0, head_init_scale=0.0)
    losses = {}
    for name, more in {
        'ce': {},
        'bce': dict(bce_loss=True),
        'sum': dict(bce_loss=True, bce_sum=True),
        'positive': dict(bce_loss=True, bce_sum=True, bce_pos_weight=3.0, bce_target_thresh=0.2),
        'mixed': dict(bce_loss=True, bce_target_thresh=0.2, mixup=0.8),
    }.items():
        losses[name] = train(small_args(digits, tmp_path, experiment=name, **options, **more)).metrics['train_loss']
    # All classes get 0: log 10, and log 2 per class
    assert losses['ce'] == pytest.approx(math.log(10), rel=1e-4)
    assert losses['bce'] == losses['mixed'] == pytest.approx(math.log(2), rel=1e-4)
    assert losses['sum'] == pytest.approx(10 * math.log(2), rel=1e-4)
    assert losses['positive'] == pytest.approx((9 + 3) * math.log(2), rel=1e-4)


@pytest.mark.slow
def test_repeated_augmentation_needs_processes(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='--aug-repeats 3 shows an image in several processes of torchrun at once'):
        train(small_args(digits, tmp_path, aug_repeats=3))
    args = small_args(digits, tmp_path, epochs=1, batch_size=16, aug_repeats=2)
    result = torchrun_of_users(*command(args, 'train'), '--device-modules', 'recorder', RECORDER_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    labels = [(tmp_path / f'labels-{rank}.txt').read_text().splitlines() for rank in (0, 1)]
    assert labels[0] == labels[1] and len(labels[0]) > 3  # the same image in both, in every place


@pytest.mark.slow
def test_compiled_run_is_that_of_eager_mode_and_goes_on(digits: Path, tmp_path: Path) -> None:
    options = dict(model='mixpath_nb201_supernet', model_kwargs=dict(num_cells=1, width=4), model_ema=True, drop=0.1)
    plain = train(small_args(digits, tmp_path / 'plain', **options)).output_dir
    options['torchcompile'] = 'eager'
    whole = train(small_args(digits, tmp_path / 'compiled', **options)).output_dir
    first = _torch_load(str(whole / 'last.pth.tar'), weights_only=True)
    expected = _torch_load(str(plain / 'last.pth.tar'), weights_only=True)
    for name in ('state_dict', 'state_dict_ema', 'optimizer'):
        assert_equal(first[name], expected[name])
    start = str(whole / 'checkpoint-0.pth.tar')
    resumed = train(small_args(digits, tmp_path / 'resumed', **options, resume=start)).output_dir
    assert_equal(_torch_load(str(resumed / 'last.pth.tar'), weights_only=True)['state_dict'], first['state_dict'])


@pytest.mark.slow
def test_ordinary_model_is_compiled_as_timm_does(digits: Path, tmp_path: Path) -> None:
    options = dict(model='mixpath_nb201', model_kwargs=dict(num_cells=1, width=4), epochs=1, torchcompile='eager')
    folder = train(small_args(digits, tmp_path, **options)).output_dir
    loaded = load_model(folder / 'last.pth.tar')  # names are those of the model
    assert type(loaded.model).__name__ == 'NB201Net'


@pytest.mark.parametrize('live_on', [False, True])
def test_processes_that_load_images_live_on_if_asked(digits: Path, tmp_path: Path, live_on: bool) -> None:
    args = small_args(digits, tmp_path, use_multi_epochs_loader=live_on, workers=1)
    args.distributed, args.rank, args.world_size = False, 0, 1
    data_config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)
    train_set = open_dataset('', str(digits), 'train')
    loader, _, _ = create_loaders(args, data_config, train_set, None, torch.device('cpu'))
    before = {process.pid for process in multiprocessing.active_children()}
    alive: list[set[int]] = []
    for _ in range(2):
        assert sum(len(target) for _, target in loader) == 192
        alive.append({process.pid for process in multiprocessing.active_children()} - before)
    assert len(alive[0]) == (1 if live_on else 0)
    assert alive[0] == alive[1]
