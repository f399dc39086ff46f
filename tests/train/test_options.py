"""The options of a training from Python: what a command line would refuse is refused, in one sentence."""

import argparse
import re
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import small_args
from hypothesis import given
from hypothesis import strategies as st

from timm_mixpath import sample
from timm_mixpath.spaces.catalog import get_space
from timm_mixpath.train import default_args, train
from timm_mixpath.train.options import add_train_options, apply_config, make_storable
from timm_mixpath.utils.errors import UsageError
from timm_mixpath.utils.recipes import find_recipe, list_recipes


@pytest.mark.parametrize('name', list_recipes())
def test_recipe_sets_the_other_options(name: str) -> None:
    args = default_args(config=name, lr=0.125)
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    apply_config(parser, find_recipe(name))  # as the command line does
    expected = {**vars(parser.parse_args([])), 'config': name, 'lr': 0.125}
    assert vars(args) == expected
    assert vars(default_args(config=find_recipe(name)))['batch_size'] == expected['batch_size']


def test_options_of_options_are_the_same() -> None:
    for args in (default_args(), default_args(config='nano_cifar10', lr=0.5), default_args(model_kwargs={'a': (1, 2)})):
        assert default_args(**vars(args)) == args
        before = Namespace(**vars(args))
        make_storable(args)
        assert args == before


@pytest.mark.parametrize(
    'name', ['config', 'resume', 'initial_checkpoint', 'experiment', 'output', 'interpolation', 'model_kwargs', 'mixup']
)
def test_none_is_off(name: str) -> None:
    assert vars(default_args(**{name: None})) == vars(default_args())


def test_none_as_timm_takes_it() -> None:
    assert default_args(color_jitter=None).color_jitter == 0.0
    with pytest.raises(UsageError, match='val_split is None, expected str'):
        default_args(val_split=None)


def test_what_is_no_option_is_stored_as_text() -> None:
    args = Namespace(**vars(default_args()), extra=Path('p'), found=(1, 2))
    make_storable(args)
    assert (args.extra, args.found) == ('p', (1, 2))


def test_recipe_is_what_is_trained(digits: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine.yaml').write_text('smoothing: 0.0\nweight_decay: 3e-4\nmodel_kwargs: {m: 1}\n')
    given = vars(small_args(digits, tmp_path))
    changed = {key: value for key, value in given.items() if value != vars(default_args())[key]}
    args = default_args(**{**changed, 'config': tmp_path / 'mine.yaml', 'epochs': 1})
    run = train(args).output_dir
    options = yaml.safe_load((run / 'args.yaml').read_text())
    assert (options['smoothing'], options['model_kwargs']) == (0.0, {'m': 1, 'seed': 42})


@pytest.mark.parametrize(
    'name, value, expected',
    [
        ('lr', np.float64(0.01), 0.01),
        ('lr', np.float32(0.5), 0.5),
        ('lr', torch.tensor(0.5), 0.5),
        ('lr', 1, 1.0),
        ('epochs', np.int64(3), 3),
        ('epochs', 3.0, 3),
        ('batch_size', '8', 8),
        ('device', torch.device('cpu'), 'cpu'),
        ('data_dir', Path('data'), 'data'),
        ('input_size', (3, 32, 32), [3, 32, 32]),
        ('mean', np.array([0.5, 0.25, 0.125]), [0.5, 0.25, 0.125]),
        ('opt_betas', (0.9, 0.99), [0.9, 0.99]),
        ('mixup', 0.2, 0.2),
        ('amp', np.bool_(True), True),
        ('warmup_epochs', 0.5, 0.5),
        ('search_holdout', 0.25, 0.25),
        ('model_kwargs', {'width_mult': np.float64(0.25), 'm': np.int64(2)}, {'width_mult': 0.25, 'm': 2}),
        (
            'model_kwargs',
            {'a': {'b': np.int64(3)}, 'c': [np.int64(5)], 'd': range(2)},
            {'a': {'b': 3}, 'c': [5], 'd': [0, 1]},
        ),
        ('input_size', [np.int64(3), 32, 32], [3, 32, 32]),
        ('mean', list(np.array([0.5, 0.25, 0.125], np.float32)), [0.5, 0.25, 0.125]),
        ('decay_milestones', range(1, 4), [1, 2, 3]),
        ('wandb_tags', [Path('a')], ['a']),
        ('experiment', date(2024, 1, 1), '2024-01-01'),
        ('model_kwargs', {'arch': sample(get_space('nano'), seed=0, step=0)}, None),
    ],
)
def test_values_of_python(name: str, value: Any, expected: Any) -> None:
    """What a user of Python has at hand, also if it is set afterwards, ends up as what a recipe may hold."""
    later = default_args()
    setattr(later, name, value)
    for args in (default_args(**{name: value}), later):
        make_storable(args)
        found = getattr(args, name)
        if expected is not None and name != 'data_dir':
            assert found == expected
        (kept,) = yaml.safe_load_all(yaml.safe_dump(found))
        assert kept == found or name == 'model_kwargs'  # whose tuples YAML makes lists
        assert type(found) in (int, float, bool, str, list, dict)


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('eval_metric', 'acc', "eval_metric is 'acc', allowed are 'top1', 'top5', 'loss'"),
        ('crop_mode', 'middle', "crop_mode is 'middle', allowed are"),
        ('clip_mode', 'max', "clip_mode is 'max', allowed are"),
        ('dist_bn', 'mean', "dist_bn is 'mean', allowed are"),
        ('mixup_mode', 'all', "mixup_mode is 'all', allowed are"),
        ('amp_dtype', 'fp16', "amp_dtype is 'fp16', allowed are 'float16', 'bfloat16'"),
        ('epochs', 1.5, 'epochs is 1.5, expected int'),
        ('seed', None, 'seed is None, expected int'),
        ('lr', float('nan'), 'lr is nan, expected float'),
        ('lr', True, 'lr is True, expected float'),
        ('lr', [0.1], 'lr is [0.1], expected a single value'),
        ('lr', 'fast', "lr is 'fast', expected float"),
        ('amp', 1, 'amp is 1, expected true or false'),
        ('experiment', True, 'experiment is True, expected str'),
        ('model', torch.nn.Identity(), 'model is Identity(), expected text or numbers'),
        ('model_kwargs', 'm=2', "model_kwargs must be a mapping, not 'm=2'"),
        ('model_kwargs', {'norm_layer': torch.nn.GroupNorm}, 'model_kwargs: norm_layer='),
        ('device_modules', 'mine', "device_modules is 'mine', expected a list"),
        ('input_size', (3, 32), 'input_size is [3, 32], expected 3 values'),
        ('opt_betas', [0.9, None], 'opt_betas is [0.9, None], expected a list of float'),
    ],
)
def test_wrong_values_are_refused_before_anything_is_done(
    name: str, value: Any, message: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        default_args(**{name: value})
    args = small_args(digits, tmp_path / 'runs')
    setattr(args, name, value)
    with pytest.raises(UsageError, match=re.escape(message)):
        train(args)
    assert not (tmp_path / 'runs').exists()


@given(
    st.sampled_from(['lr', 'epochs', 'experiment', 'mean', 'amp', 'model_kwargs', 'input_size', 'eval_metric']),
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 10**12), st.floats(), st.text(max_size=4), st.binary(max_size=2),
        st.lists(st.integers(0, 9) | st.text(max_size=2), max_size=4), st.tuples(st.floats(), st.none()),
        st.dictionaries(st.text(max_size=3), st.floats()), st.sets(st.integers(0, 3)), st.complex_numbers(),
    ),
)  # fmt: skip
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        args = default_args(**{name: value})
    except UsageError as e:
        assert str(e).startswith(name)
        return
    make_storable(args)
    before = vars(Namespace(**vars(args)))
    make_storable(args)
    assert vars(args) == before
    yaml.safe_dump(before[name])


def test_unknown_recipe_and_module(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe 'nano_cifar11' is neither a file nor one of"):
        default_args(config='nano_cifar11')
    with pytest.raises(UsageError, match='--device-modules no_such_module'):
        train(small_args(digits, tmp_path / 'runs', device_modules=['no_such_module']))
    assert not (tmp_path / 'runs').exists()


def test_modules_are_imported(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space of one's own in a file beside the script, as on the command line."""
    (tmp_path / 'space_of_options_test.py').write_text(
        'from timm_mixpath import BlockSpec, SearchSpace, register_space\n'
        "register_space(SearchSpace('of_options_test', (BlockSpec(8, 2), BlockSpec(8)), stem_chs=8, stem_stride=2))\n"
    )
    monkeypatch.chdir(tmp_path)
    overrides = dict(model='mixpath_of_options_test_supernet', device_modules=['space_of_options_test'], epochs=1)
    result = train(small_args(digits, tmp_path, **overrides))
    assert result.metrics['eval_top1'] >= 0


def test_a_run_that_had_ended_tells_its_metrics(digits: Path, tmp_path: Path) -> None:
    result = train(small_args(digits, tmp_path, epochs=1))
    again = train(small_args(digits, tmp_path, epochs=1, resume='auto'))
    assert result.metrics.keys() == again.metrics.keys()
    assert again.metrics == pytest.approx(result.metrics)
    assert (again.best_metric, again.best_epoch) == (result.best_metric, result.best_epoch)


def test_room_shows_what_it_has() -> None:
    import timm_mixpath.train as room

    assert {'TrainResult', 'default_args', 'train'} <= set(dir(room))
