import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from commands import TRAIN_SCRIPT
from conftest import CLASSES

from timm_mixpath.train.loop import train
from timm_mixpath.train.options import apply_config, default_args
from timm_mixpath.utils.errors import UsageError
from timm_mixpath.utils.recipes import copy_recipe, find_recipe, list_recipes, recipe_dir

RECIPES = sorted(list_recipes())
STOCK_OPTIONS = (Path(__file__).parents[1] / 'stock_options.txt').read_text().split()


def parser():
    import argparse

    from timm_mixpath.train.options import add_train_options

    p = argparse.ArgumentParser()
    add_train_options(p)
    return p


def test_there_are_recipes_with_a_header() -> None:
    assert {'nano_supernet_cifar10', 'nano_cifar10', 's1_supernet_cifar10'} <= set(RECIPES)
    for name, first in list_recipes().items():
        assert first, f'{name} needs a first line that says what it is'
        text = (recipe_dir() / f'{name}.yaml').read_text()
        for part in (f'timm-mixpath train -c recipes/{name}.yaml', 'Hardware:', 'Time:', 'Run:', 'Hyper-parameters:'):
            assert part in text, f'{name}: header without {part}'


@pytest.mark.parametrize('name', RECIPES)
def test_keys_are_options_of_stock_train_script(name: str) -> None:
    config = yaml.safe_load((recipe_dir() / f'{name}.yaml').read_text())
    assert config.keys() <= set(STOCK_OPTIONS)


@pytest.mark.skipif(not TRAIN_SCRIPT, reason='needs train.py of a clone of pytorch-image-models, see TIMM_TRAIN_SCRIPT')
def test_stock_options_are_those_of_the_script() -> None:
    found = set(re.findall(r"add_argument\((?:\s*'-\w+',)?\s*['\"]--([\w-]+)", Path(TRAIN_SCRIPT).read_text()))
    assert {o.replace('-', '_') for o in found} >= set(STOCK_OPTIONS)


# Large models, most of which another recipe trains, too
LARGE = {
    'mixpath_a_imagenette',
    'mixpath_b_imagenet',
    'mixpath_c_cifar10',
    'nb101_supernet_gpu',
    'nb201_supernet_gpu',
    's1_supernet_cifar10',
    's2_supernet_imagenette',
    's3_supernet_imagenet',
}


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in RECIPES])
def test_recipe_parses_and_trains_a_step(name: str, digits: Path, tmp_path: Path) -> None:
    p = parser()
    config = apply_config(p, recipe_dir() / f'{name}.yaml')
    args = p.parse_args([])
    assert all(getattr(args, key) == value for key, value in config.items())
    overrides = dict(
        data_dir=str(digits), output=str(tmp_path), experiment='r', epochs=1, device='cpu', workers=0, batch_size=90,
        num_classes=CLASSES, img_size=16, val_split='', warmup_epochs=0, pretrained=False,
        # In bfloat16 oneDNN leaves gradients of pixels of a kernel that never meet an image as they were in memory
        amp=False,
    )  # fmt: skip
    for key, value in overrides.items():
        setattr(args, key, value)
    result = train(args)
    assert result.metrics['train_loss'] > 0
    assert timm.is_model(args.model) and torch.isfinite(torch.tensor(result.metrics['train_loss']))


def test_find_and_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = recipe_dir() / 'nano_cifar10.yaml'
    for name in ('nano_cifar10', 'nano_cifar10.yaml', 'recipes/nano_cifar10.yaml'):
        assert find_recipe(name) == expected
    copied = copy_recipe('nano_cifar10', 'mine')
    assert copied.read_text() == expected.read_text()
    assert find_recipe('mine/nano_cifar10.yaml') == Path('mine/nano_cifar10.yaml')
    with pytest.raises(UsageError, match='not overwritten'):
        copy_recipe('nano_cifar10', 'mine')
    with pytest.raises(UsageError, match=r"'nope'.*nano_cifar10"):
        find_recipe('nope')


@pytest.mark.parametrize(
    'text, message',
    [
        ('batch-size: 3', "'batch-size' is not an option"),
        ('- a', 'must map option names'),
        ('lr: [', 'not valid YAML'),
        ('epochs: many', "epochs is 'many', expected int"),
        ('scale: 1', 'expected a list'),
        ('lr: [1]', 'expected a single value'),
        ('epochs:', 'epochs is None, expected int'),
        ('epochs: 3.7', 'epochs is 3.7, expected int'),
        ('amp: 3', 'expected true or false'),
        ('amp_dtype: foo', "allowed are 'float16', 'bfloat16'"),
        ('model_kwargs: m=3', 'must be a mapping'),
    ],
)
def test_bad_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / 'r.yaml').write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as info:
        apply_config(parser(), tmp_path / 'r.yaml')
    assert '\n' not in str(info.value)


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / 'last.pth.tar').write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match=r"recipe '.*last.pth.tar' is not valid YAML: .*can't decode"):
        apply_config(parser(), tmp_path / 'last.pth.tar')


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    (tmp_path / 'r.yaml').write_text('min_lr: 1e-8\nepochs: 5')
    p = parser()
    apply_config(p, tmp_path / 'r.yaml')
    assert p.parse_args([]).min_lr == 1e-8


def test_default_args_refuses_unknown_names() -> None:
    assert default_args(lr=0.5).lr == 0.5
    with pytest.raises(UsageError, match="'learning_rate'"):
        default_args(learning_rate=0.5)
