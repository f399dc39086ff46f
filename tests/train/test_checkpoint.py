"""What a checkpoint tells by itself, what weights alone are of, and what a training starts from."""

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import fails, full_disk, torchrun
from conftest import small_args
from safetensors.torch import save_file

from timm_mixpath import cli
from timm_mixpath.hub.export import export
from timm_mixpath.spaces import genotypes
from timm_mixpath.train import default_args, train
from timm_mixpath.train.checkpoint import create_model, load_model, load_weights, write_checkpoint
from timm_mixpath.train.options import make_storable
from timm_mixpath.utils.errors import RunError, UsageError

ARCH = 'k3_e6,k5_e6,k3+7_e3,k3_e6,k5_e6,k7_e6,k3+5_e6,k3_e3'


@pytest.fixture(scope='module')
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a narrow network, with a mean and a std of its own, that runs start from."""
    root = tmp_path_factory.mktemp('source')
    kwargs = dict(arch=ARCH, width_mult=0.5, act_layer='silu')
    args = small_args(digits, root, model='mixpath_nano', model_kwargs=kwargs, epochs=1, mean=[0.4] * 3, std=[0.3] * 3)
    export(train(args).output_dir / 'last.pth.tar', root / 'model')
    return root / 'model'


def write_supernet(folder: Path) -> Path:
    args = default_args(model='mixpath_nano_supernet', model_kwargs=dict(m=3), num_classes=10, img_size=16)
    make_storable(args)
    write_checkpoint(folder / 'three.pth.tar', create_model(args), args)
    return folder / 'three.pth.tar'


def test_run_from_a_folder_needs_it_no_more(source: Path, digits: Path, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(source, tmp_path / 'm')
    monkeypatch.chdir(tmp_path)
    options = dict(model='local-dir:m', pretrained=True, bn_eps=1e-3)
    last = train(small_args(digits, tmp_path / 'out', epochs=1, **options)).output_dir / 'last.pth.tar'
    before = load_model(last)
    shutil.move(folder, tmp_path / 'away')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')

    loaded = load_model(last)
    assert loaded.args.model == 'mixpath_nano' and loaded.args.model_source == 'local-dir:m'
    assert str(loaded.model.arch) == ARCH and loaded.model.conv_stem.out_channels == 16
    assert isinstance(loaded.model.bn1.act, torch.nn.SiLU) and loaded.model.bn1.eps == 1e-3
    assert loaded.data_config == before.data_config
    assert loaded.data_config['mean'] == (0.4,) * 3 and loaded.data_config['input_size'] == (3, 16, 16)
    export(last, tmp_path / 'exported')
    # and it goes on, under the name that it was started with and under its own
    for model in ('local-dir:m', 'mixpath_nano'):
        args = dict(options, model=model, resume=str(last), epochs=2, output='', experiment='')
        assert train(small_args(digits, tmp_path, **args)).output_dir == last.parent
    with pytest.raises(UsageError, match='is a run of local-dir:m, not of local-dir:other'):
        train(small_args(digits, tmp_path, model='local-dir:other', resume=str(last)))


@pytest.mark.parametrize('options', [None, 3, {'lr': 1}, Namespace(lr=1)])
def test_options_of_something_else_are_no_checkpoint(tmp_path: Path, options: Any) -> None:
    torch.save({'state_dict': {}, 'args': options}, tmp_path / 'other.pth.tar')
    with pytest.raises(UsageError, match='is not a training checkpoint'):
        load_model(tmp_path / 'other.pth.tar')


def test_full_disk_is_one_sentence_and_loses_nothing(digits: Path, supernet_run: Path, tmp_path: Path) -> None:
    """torch has an exception of its own for a file that it can not write to its end."""
    folder = shutil.copytree(supernet_run, tmp_path / 'run')
    last = folder / 'last.pth.tar'
    before = last.read_bytes()
    args = small_args(digits, tmp_path, resume=str(last), epochs=3)
    with full_disk(len(before) // 2):
        with pytest.raises(RunError, match=r'^checkpoint .* can not be written .* go on from it$'):
            train(args)
        with pytest.raises(RunError, match=r'^checkpoint .* can not be written'):
            write_checkpoint(tmp_path / 'first.pth.tar', torch.nn.Linear(2000, len(before) // 2000), args)
    assert last.read_bytes() == before
    assert not (tmp_path / 'first.pth.tar').exists() and not list(tmp_path.rglob('*tmp*'))
    assert train(args).output_dir == folder  # there is room again


@pytest.mark.slow
def test_run_from_pretrained_weights_needs_them_no_more(source: Path, digits: Path, tmp_path: Path) -> None:
    export(write_supernet(tmp_path), tmp_path / 'three')
    for name, options, arch in (
        ('packaged', dict(model='mixpath_nano'), genotypes.MIXPATH_NANO),
        ('folder', dict(model='mixpath_nano', pretrained_path=str(source)), ARCH),
        ('file', dict(model='mixpath_nano', pretrained_path=str(source / 'model.safetensors')), ARCH),
        ('supernet', dict(model='mixpath_nano_supernet', pretrained_path=str(tmp_path / 'three')), None),
    ):
        args = dict(options, pretrained=True, experiment=name)
        last = train(small_args(digits, tmp_path, epochs=1, **args)).output_dir / 'last.pth.tar'
        model = load_model(last).model
        assert model.space.max_paths == 3 if arch is None else str(model.arch) == arch
        export(last, tmp_path / 'exported' / name)
        assert train(small_args(digits, tmp_path, epochs=2, resume=str(last), **args)).output_dir == last.parent
        # as it does without naming the weights again
        again = dict(model=options['model'], resume=str(last), epochs=3, output='', experiment='')
        assert train(small_args(digits, tmp_path, **again)).output_dir == last.parent


@pytest.mark.parametrize('suffix', [pytest.param('.pth', marks=pytest.mark.slow), '.safetensors'])
def test_weights_alone_with_what_they_are_of(supernet_run: Path, tmp_path: Path, capsys, suffix: str) -> None:
    """What timm's clean_checkpoint.py and avg_checkpoints.py leave of a supernet."""
    state_dict = load_model(supernet_run / 'last.pth.tar').model.state_dict()
    path = tmp_path / f'clean{suffix}'
    save_file(state_dict, path) if suffix == '.safetensors' else torch.save(state_dict, path)
    for words in (['export', '--output', 'x'], ['search', '--output', 'x'], ['stats'], ['rank', '--table', 'x']):
        status, line = fails(capsys, [*words, '--checkpoint', str(path)])
        assert status == 2 and '--model NAME' in line and '--config' in line
    status, line = fails(capsys, ['stats', '--checkpoint', str(path), '--model-kwargs', 'm=2'])
    assert status == 2 and 'without --model' in line
    status, line = fails(capsys, ['stats', '--checkpoint', str(path), '--model', 'mixpath_s1_supernet'])
    assert status == 1 and 'do not fit mixpath_s1_supernet' in line

    expected = load_model(supernet_run / 'last.pth.tar')
    for words in (['--model', 'mixpath_nano_supernet'], ['--config', str(supernet_run / 'args.yaml')]):
        folder = tmp_path / words[0].strip('-')
        assert cli.main(['export', '--checkpoint', str(path), '--output', str(folder), *words]) == 0
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert model.num_classes == 10
        assert all(torch.equal(v, expected.model.state_dict()[k]) for k, v in model.state_dict().items())
        # A card tells of the training what is known of it, not what a parser would have taken
        push = ['push', '--checkpoint', str(path), '--repo-id', 'me/net', '--dry-run', '--output', f'{folder}-card']
        assert cli.main([*push, *words]) == 0
        assert ('epochs' in Path(f'{folder}-card', 'README.md').read_text()) == (words[0] == '--config')
    # args.yaml tells the images too, so it can be searched as it could before
    words = ['search', '--checkpoint', str(path), '--config', str(supernet_run / 'args.yaml'), '--num-images', '10']
    words += ['--population', '4', '--offspring', '2', '--generations', '1', '-j', '0']
    assert cli.main([*words, '--output', str(tmp_path / 'search')]) == 0


def test_plain_state_dict_inside_a_checkpoint(supernet_run: Path, tmp_path: Path) -> None:
    torch.save({'state_dict': load_model(supernet_run / 'last.pth.tar').model.state_dict()}, tmp_path / 'x.pth')
    loaded = load_model(tmp_path / 'x.pth', like=default_args(model='mixpath_nano_supernet', img_size=16))
    assert loaded.model.num_classes == 10 and loaded.data_config['input_size'] == (3, 16, 16)


# What a training starts from


def test_classifier_of_another_size_is_left_out(supernet_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(supernet_run / 'last.pth.tar')
    model, before = timm.create_model('mixpath_nano_supernet', num_classes=4), load_model(path).model
    own = model.classifier.weight.clone()
    load_weights(model, path, default_args(model='mixpath_nano_supernet'))
    assert 'is for 10 classes and not for 4' in caplog.text
    assert torch.equal(model.classifier.weight, own) and torch.equal(model.conv_stem.weight, before.conv_stem.weight)


@pytest.mark.parametrize('scale, num_classes, warned', [(0.05, 10, True), (1.0, 10, False), (0.05, 4, False)])
def test_trained_classifier_that_is_scaled_is_told(
    supernet_run: Path, caplog: pytest.LogCaptureFixture, scale: float, num_classes: int, warned: bool
) -> None:
    args = default_args(model='mixpath_nano_supernet', head_init_scale=scale)
    model = timm.create_model('mixpath_nano_supernet', num_classes=num_classes)
    load_weights(model, str(supernet_run / 'last.pth.tar'), args)
    assert ('--head-init-scale 1 leaves it as it is' in caplog.text) == warned


def test_first_convolution_is_adapted(supernet_run: Path) -> None:
    path = str(supernet_run / 'last.pth.tar')
    model = timm.create_model('mixpath_nano_supernet', num_classes=10, in_chans=1)
    load_weights(model, path, default_args(model='mixpath_nano_supernet'))
    expected = load_model(path).model.conv_stem.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.conv_stem.weight, expected)


@pytest.mark.parametrize(
    'name, kwargs, text',
    [
        ('mixpath_nano', dict(arch='k5_e6' + ',k3_e6' * 7), f'its arch is {ARCH}, this run has k5_e6,k3_e6'),
        ('mixpath_nano', dict(arch=ARCH, width_mult=0.5), 'its width_mult is None, this run has 0.5'),
        ('mixpath_a', {}, 'its model is mixpath_nano, this run has mixpath_a'),
        ('mixpath_nano', dict(arch=ARCH, act_layer='prelu'), 'its act_layer is None, this run has prelu'),
    ],
)
def test_what_differs_is_named(digits: Path, tmp_path: Path, name: str, kwargs: dict, text: str) -> None:
    own = small_args(digits, tmp_path, model='mixpath_nano', model_kwargs=dict(arch=ARCH), epochs=1)
    last = train(own).output_dir / 'last.pth.tar'
    other = small_args(digits, tmp_path / 'other', model=name, model_kwargs=kwargs, initial_checkpoint=str(last))
    with pytest.raises(RunError, match='does not fit') as e:
        train(other)
    assert text in str(e.value) and len(str(e.value).splitlines()) == 1


def test_initial_checkpoint_that_is_none(digits: Path, tmp_path: Path) -> None:
    (tmp_path / 'x.pth').write_bytes(b'no checkpoint')
    with pytest.raises(RunError, match='can not be read'):
        train(small_args(digits, tmp_path, initial_checkpoint=str(tmp_path / 'x.pth')))


# What a resumed run goes on with


@pytest.fixture(scope='module')
def averaged_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('ema')
    args = small_args(digits, output, epochs=1, model_ema=True, clip_grad=5.0)
    return train(args).output_dir / 'last.pth.tar'


@pytest.mark.parametrize(
    'opts', [('sgd', 'adamw'), *(pytest.param(o, marks=pytest.mark.slow) for o in (('adamw', 'sgd'), ('sgd', 'lamb')))]
)
def test_another_optimizer(digits: Path, tmp_path: Path, opts: tuple[str, str]) -> None:
    first, second = opts
    last = train(small_args(digits, tmp_path, epochs=1, opt=first, lr=1e-3)).output_dir / 'last.pth.tar'
    args = dict(resume=str(last), opt=second, epochs=2, lr=1e-3)
    with pytest.raises(UsageError, match=f'--opt {second} differs from the {first} .* --initial-checkpoint .*last'):
        train(small_args(digits, tmp_path, **args))
    train(small_args(digits, tmp_path, no_resume_opt=True, **args))
    train(small_args(digits, tmp_path / 'anew', initial_checkpoint=str(last), opt=second, epochs=1, lr=1e-3))


@pytest.mark.parametrize('changes', [dict(weight_decay=0.0), dict(layer_decay=0.7)], ids=str)
def test_another_grouping_of_parameters(averaged_run: Path, digits: Path, tmp_path: Path, changes: dict) -> None:
    args = small_args(digits, tmp_path, resume=str(averaged_run), model_ema=True, **changes)
    with pytest.raises(UsageError, match=r'state of the optimizer .* does not fit .* --layer-decay .* --no-resume-opt'):
        train(args)


def test_averaged_weights_are_not_dropped(averaged_run: Path, digits: Path, tmp_path: Path) -> None:
    before = averaged_run.read_bytes()
    with pytest.raises(UsageError, match=r'averaged weights, which a run without --model-ema would drop'):
        train(small_args(digits, tmp_path, resume=str(averaged_run)))
    assert averaged_run.read_bytes() == before
    copy = tmp_path / 'run' / 'last.pth.tar'
    copy.parent.mkdir()
    shutil.copyfile(averaged_run, copy)
    train(small_args(digits, tmp_path, resume=str(copy), model_ema=True))
    assert load_model(copy).is_ema


@pytest.mark.parametrize(
    'changes, texts',
    [
        (dict(model_ema_decay=0.9), ['--model-ema-decay 0.9998 -> 0.9']),
        (dict(batch_size=16, reprob=0.0), ['--batch-size 32 -> 16', '--reprob 0.2 -> 0.0']),
        (
            dict(lr=0.5, weight_decay=0.01),
            ['--lr 0.05 -> 0.5', '--lr, --weight-decay of the checkpoint stay in effect'],
        ),
        (dict(sched_on_updates=False, seed=1), ['--sched-on-updates True -> False', '--seed 42 -> 1']),
        (dict(scale=[0.5, 1.0], grad_accum_steps=2), ['--grad-accum-steps 1 -> 2', '--scale [0.7, 1.0] -> [0.5, 1.0]']),
        (dict(epochs=3, workers=1, checkpoint_hist=1, log_interval=1), None),
        (dict(clip_grad=None), ['--clip-grad 5.0 -> None']),
        (dict(head_init_scale=0.05, val_num_samples=10), None),  # of no effect on a run that goes on
        # what a run finds out where it is not told
        (dict(lr=None, num_classes=None, in_chans=None, crop_pct=None, mean=None, input_img_mode=None), None),
    ],
)
def test_changed_options_are_named(
    averaged_run: Path, digits: Path, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch, changes, texts
) -> None:
    monkeypatch.setattr('timm_mixpath.train.loop._train_all', lambda *_: None)  # they are named before
    caplog.set_level(logging.WARNING)
    args = {**dict(resume=str(averaged_run), model_ema=True, clip_grad=5.0, epochs=2), **changes}
    train(small_args(digits, tmp_path, **args))
    if texts is None:
        assert 'other options' not in caplog.text
    for text in texts or ():
        assert text in caplog.text


def test_a_finished_run_says_so(averaged_run: Path, digits: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    before = {path: path.read_bytes() for path in averaged_run.parent.iterdir()}
    args = dict(resume=str(averaged_run), model_ema=True, epochs=1, output='', experiment='')
    result = train(small_args(digits, tmp_path, **args))
    assert 'has ended after 1 epochs and nothing is left to train' in caplog.text
    assert 'Training epochs' not in caplog.text and result.best_metric is not None
    assert {path: path.read_bytes() for path in averaged_run.parent.iterdir()} == before


def test_sync_bn_on_cpus_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    words = ['train', '--model', 'mixpath_nano_supernet', '--data-dir', str(digits), '--num-classes', '10', '--sync-bn']
    done = torchrun(*words, '--device', 'cpu', '--img-size', '16', '--output', str(tmp_path), '-j', '0', '-b', '16')
    assert done.returncode != 0 and '--sync-bn works on GPUs only' in done.stderr
    assert 'in _train' not in done.stderr  # torchrun's own report of a failed process has a traceback, ours has none


def test_weights_of_the_backbone_have_an_option_of_their_own(tmp_path: Path) -> None:
    network = timm.create_model('mobilenetv3_small_050', num_classes=10)
    path = str(tmp_path / 'backbone.safetensors')
    save_file(network.state_dict(), path)
    supernet = timm.create_model('mixpath_supernet', backbone='mobilenetv3_small_050', num_classes=3)
    args = default_args(model='mixpath_supernet', model_kwargs=dict(backbone='mobilenetv3_small_050'))
    with pytest.raises(RunError, match=f'weights of its backbone; start from them with --pretrained .* {path}$'):
        load_weights(supernet, path, args)


@pytest.mark.parametrize('config', ['{}', 'no json'])
def test_checkpoint_loads_whatever_lies_where_its_weights_were(tmp_path: Path, config: str) -> None:
    """Those of timm's train.py do not say themselves where they come from."""
    (tmp_path / 'config.json').write_text(config)
    args = default_args(
        model='mixpath_supernet',
        model_kwargs=dict(backbone='mobilenetv3_small_050'),
        num_classes=10,
        pretrained=True,
        pretrained_path=str(tmp_path / 'model.safetensors'),
    )
    args.label_names = None
    model = timm.create_model('mixpath_supernet', num_classes=10, **args.model_kwargs)
    write_checkpoint(tmp_path / 'last.pth.tar', model, args)
    (note,) = load_model(tmp_path / 'last.pth.tar').model.pretrained_cfg['notes']
    assert note.startswith('warm start from weights of mobilenetv3_small_050 in model.safetensors')
