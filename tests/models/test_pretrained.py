"""The weights that ship inside the package, loaded as a user does, without a connection."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_args
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

import timm_mixpath
from timm_mixpath.hub.export import export
from timm_mixpath.models import pretrained
from timm_mixpath.models.pretrained import PACKAGED, packaged_weights
from timm_mixpath.train.loop import train
from timm_mixpath.utils.errors import RunError

ROOT = Path(timm_mixpath.__file__).parent
MB = 1e6


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


def test_what_ships_is_what_the_code_lists() -> None:
    folders = packaged_weights()
    assert folders and set(folders) == set(PACKAGED) == {path.name for path in (ROOT / 'weights').iterdir()}
    sizes = {name: (folder / 'model.safetensors').stat().st_size for name, folder in folders.items()}
    assert max(sizes.values()) <= 12 * MB and sum(sizes.values()) <= 30 * MB
    for name, folder in folders.items():
        assert hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest() == PACKAGED[name]
        assert {'README.md', 'config.json', 'model.safetensors', 'summary.csv'} <= {p.name for p in folder.iterdir()}
        with safe_open(folder / 'model.safetensors', 'pt') as f:
            assert {f.get_slice(key).get_dtype() for key in f.keys()} <= {'F16', 'I64'}  # noqa: SIM118
    assert [name for name in timm.list_pretrained('mixpath*') if name in PACKAGED] == sorted(PACKAGED)


def test_cards_name_ancestry_and_licence() -> None:
    notice = (ROOT.parent / 'NOTICE').read_text() if (ROOT.parent / 'NOTICE').exists() else None
    for name, folder in packaged_weights().items():
        card = ModelCard((folder / 'README.md').read_text())
        assert card.data.license and 'validate.py' in card.text and 'research' in card.text
        assert f"timm.create_model('hf-hub:timm-mixpath/{name}', pretrained=True)" in card.text
        assert notice is None or name in notice


@pytest.mark.parametrize('name', sorted(PACKAGED))
def test_packaged_weights_load_and_are_used_in_other_ways(name: str) -> None:
    config = json.loads((packaged_weights()[name] / 'config.json').read_text())
    model = timm.create_model(name, pretrained=True).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_classes == 10 and len(model.pretrained_cfg['label_names']) == 10
    assert timm.get_pretrained_cfg(name).num_classes == 10

    data_config = timm.data.resolve_model_data_config(model)
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct'):
        expected = config['pretrained_cfg'][key]
        assert data_config[key] == (tuple(expected) if isinstance(expected, list) else expected)

    x = torch.randn(2, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    assert model.forward_features(x).shape[2:] == timm.get_pretrained_cfg(name).pool_size
    by_default = timm.create_model(name.partition('.')[0], pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(x), by_default(x))

        finetune = timm.create_model(name, pretrained=True, num_classes=3).eval()
        assert torch.equal(finetune.forward_features(x), model.forward_features(x)) and finetune(x).shape == (2, 3)
        gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
        torch.testing.assert_close(gray(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)
        features = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
    assert [f.shape[1] for f in features] == [info['num_chs'] for info in model.feature_info]


def test_no_such_tag() -> None:
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('mixpath_lite0.nowhere', pretrained=True)
    with pytest.raises(
        RunError, match=r'mixpath_lite0 has no weights of this tag; there are mixpath_lite0\.in1k_ft_imagenette'
    ):
        timm.create_model('mixpath_lite0.untrained', pretrained=True)


def test_damaged_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = min(PACKAGED)
    shutil.copytree(packaged_weights()[name], tmp_path / name)
    monkeypatch.setattr(pretrained, '_WEIGHTS_DIR', tmp_path)
    overlay = dict(file=str(tmp_path / name / 'model.safetensors'))
    create = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    timm.create_model(name.partition('.')[0], **create)
    path = tmp_path / name / 'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=f'the weights of {name} inside the installed timm-mixpath are damaged'):
        timm.create_model(name.partition('.')[0], **create)


@pytest.mark.parametrize(
    'damage', ['weights', *(pytest.param(d, marks=pytest.mark.slow) for d in ('folder', 'config'))]
)
def test_an_incomplete_installation_imports_and_says_so(tmp_path: Path, damage: str) -> None:
    package = tmp_path / 'timm_mixpath'
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns('__pycache__'))
    folder = package / 'weights' / 'mixpath_lite0.in1k_ft_imagenette'
    if damage == 'folder':
        shutil.rmtree(package / 'weights')
    elif damage == 'config':
        (folder / 'config.json').write_text('{"pretrained_cfg"')
    else:
        (folder / 'model.safetensors').unlink()
    code = (
        'import timm, timm_mixpath\n'
        "assert timm.create_model('mixpath_lite0', num_classes=2)\n"
        'try:\n'
        "    timm.create_model('mixpath_lite0', pretrained=True)\n"
        'except timm_mixpath.utils.errors.RunError as e:\n'
        '    print(e)\n'
    )
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = {'folder': 'is missing); install it again', 'weights': 'is missing); install it again'}
    assert said.get(damage, 'config.json of') in result.stdout


def test_weights_of_the_backbone_and_of_ones_own(tmp_path: Path) -> None:
    """What an overlay names wins over what is packaged."""
    backbone = timm.create_model('tf_efficientnet_lite0', num_classes=4)
    save_file(backbone.state_dict(), tmp_path / 'backbone.safetensors')
    overlay = dict(file=str(tmp_path / 'backbone.safetensors'))
    model = timm.create_model('mixpath_lite0', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
    assert torch.equal(model.conv_stem.weight, backbone.conv_stem.weight)
    assert torch.equal(model.classifier.weight, backbone.classifier.weight)
    own = timm.create_model('mixpath_lite0', num_classes=4)
    save_file(own.state_dict(), tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'), num_classes=4)
    model = timm.create_model('mixpath_lite0', pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.state_dict().items())


def test_what_was_trained_from_packaged_weights_says_so(digits: Path, tmp_path: Path) -> None:
    """The licence of the weights that a training started from goes on; tag and classes do not."""
    args = small_args(digits, tmp_path, model='mixpath_lite0', pretrained=True, img_size=32, epochs=1)
    run = train(args).output_dir
    export(run / 'last.pth.tar', tmp_path / 'm')
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert 'from mixpath_lite0.in1k_ft_imagenette, whose weights are under the licence other' in cfg['notes'][0]
    assert not cfg.get('tag') and not cfg.get('license') and not cfg.get('label_names')
    assert 'label_descriptions' not in config and len(config['label_names']) == 10
