"""Supernets in the layout of the authors' released code, played by a plain network written from its description."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from timm_mixpath import Arch, MixPathSupernet, get_space, sample
from timm_mixpath.models.released import checkpoint_filter_fn
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.utils.errors import RunError

OUT_CHS = (48, 48, 96, 96, 96, 192, 192, 192, 256, 256, 320, 320)
EXPANSIONS, KERNELS = (3, 6), (3, 5, 7, 9)
README = Path(__file__).parents[2] / 'recipes' / 'README.md'


class ReleasedBlock(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, stride: int, m: int) -> None:
        super().__init__()
        mids = [e * in_chs for e in EXPANSIONS]
        self.stride, self.residual = stride, stride == 1 and in_chs == out_chs
        self.pw = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_chs, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6()) for mid in mids
        )
        self.mix_conv = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(mid, mid, k, stride=stride, padding=k // 2, groups=mid, bias=False),
                    nn.BatchNorm2d(mid),
                    nn.ReLU6(),
                )
                for k in KERNELS
            )
            for mid in mids
        )
        self.pw_linear = nn.ModuleList(nn.Conv2d(mid, out_chs, 1, bias=False) for mid in mids)
        self.mix_bn = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(out_chs) for _ in range(m)) for _ in mids)

    def forward(self, x: torch.Tensor, t: int, kernels: list[int]) -> torch.Tensor:
        y = self.pw[t](x)
        y = torch.stack([self.mix_conv[t][k](y) for k in kernels]).sum(0)
        y = self.mix_bn[t][len(kernels) - 1](self.pw_linear[t](y))
        return x + y if self.residual else y


class ReleasedSupernet(nn.Module):
    """S1 with the parameter names of the released code; `choices` gives (t, kernel indices) for each block."""

    def __init__(self, m: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.Inverted_Block = nn.ModuleList(
            ReleasedBlock(i, o, 2 if n in (2, 5) else 1, m) for n, (i, o) in enumerate(zip((32, *OUT_CHS), OUT_CHS))
        )
        self.last_conv = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: torch.Tensor, choices: list[tuple[int, list[int]]]) -> torch.Tensor:
        x = self.stem(x)
        for block, (t, kernels) in zip(self.Inverted_Block, choices):
            x = block(x, t, kernels)
        x = self.last_conv(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


@cache
def released(m: int = 4, num_classes: int = 10) -> ReleasedSupernet:
    with torch.random.fork_rng():
        torch.manual_seed(m)
        return reference.perturb(ReleasedSupernet(m, num_classes), seed=m).eval()


@cache
def loaded(m: int = 4) -> MixPathSupernet:
    return create(m=m, pretrained=True, pretrained_cfg_overlay=dict(state_dict=released(m).state_dict()))


def create(**kwargs: Any) -> MixPathSupernet:
    return timm.create_model('mixpath_s1_supernet', **kwargs).eval()


def as_choices(arch: Arch) -> list[tuple[int, list[int]]]:
    return [(EXPANSIONS.index(b.expand_ratio), [KERNELS.index(k) for k in b.groups[0]]) for b in arch.blocks]


def make_input(in_chans: int = 3) -> torch.Tensor:
    return torch.randn(1, in_chans, 32, 32, generator=torch.Generator().manual_seed(0))


def difference(supernet: nn.Module, theirs: ReleasedSupernet, arch: Arch | str) -> float:
    """Largest difference of the outputs, relative to the largest output where that is above 1."""
    if isinstance(supernet, MixPathSupernet):
        supernet.active_arch = arch
    with torch.inference_mode():
        expected = theirs(make_input(), as_choices(Arch(arch)))
        return ((supernet(make_input()) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def covering_archs(m: int) -> Iterator[str]:
    """Archs that use every weight: every kernel, and every number of paths, of every expansion."""
    for expand_ratio in EXPANSIONS:
        for kernels in [(k,) for k in KERNELS] + [KERNELS[:n] for n in range(2, m + 1)]:
            yield ','.join([f'k{"+".join(map(str, kernels))}_e{expand_ratio}'] * len(OUT_CHS))


SAMPLED = str(sample(get_space('s1', 2), seed=0, step=0))


@pytest.mark.parametrize('m', [1, 2, 3, 4])
def test_every_weight_agrees(m):
    for arch in covering_archs(m):
        assert difference(loaded(m), released(m), arch) < 1e-5, arch


@settings(max_examples=12, deadline=None)
@given(m=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_sampled_archs_agree(m, seed):
    arch = sample(get_space('s1', m), seed=seed, step=0)
    assert difference(loaded(m), released(m), arch) < 1e-5
    assert difference(loaded(m).extract(arch), released(m), arch) < 1e-5


def test_a_wrong_choice_would_show():
    archs = list(covering_archs(4))
    with torch.inference_mode():
        outputs = [released()(make_input(), as_choices(Arch(arch))) for arch in archs]
    gaps = [(a - b).abs().max().item() for i, a in enumerate(outputs) for b in outputs[:i]]
    assert min(gaps) > 1e-2


def save_pth(path: Path, state_dict: dict) -> str:
    torch.save(state_dict, path / 'released.pth')
    return str(path / 'released.pth')


def save_safetensors(path: Path, state_dict: dict) -> str:
    save_file(state_dict, path / 'released.safetensors')
    return str(path / 'released.safetensors')


def by_pretrained(file: str) -> nn.Module:
    return create(m=2, pretrained=True, pretrained_cfg_overlay=dict(file=file))


def by_checkpoint_path(file: str) -> nn.Module:
    return create(m=2, checkpoint_path=file)


def by_filter(file: str) -> nn.Module:
    model = create(m=2)
    load_checkpoint(model, file, filter_fn=checkpoint_filter_fn)
    return model


def by_local_dir(file: str) -> nn.Module:
    folder = Path(file).parent
    name = 'model.safetensors' if file.endswith('.safetensors') else 'pytorch_model.bin'
    save_for_hf(create(m=2), folder, safe_serialization=True)
    (folder / 'model.safetensors').unlink()
    Path(file).rename(folder / name)
    return load_model(folder).model


@pytest.mark.parametrize('save', [save_pth, save_safetensors], ids=lambda f: f.__name__)
@pytest.mark.parametrize('load', [by_pretrained, by_checkpoint_path, by_filter, by_local_dir], ids=lambda f: f.__name__)
def test_files(tmp_path: Path, save: Callable[[Path, dict], str], load: Callable[[str], nn.Module]):
    assert difference(load(save(tmp_path, released(2).state_dict())), released(2), SAMPLED) < 1e-5


def add_prefix(prefix: str) -> Callable[[dict], dict]:
    return lambda state_dict: {prefix + key: value for key, value in state_dict.items()}


@pytest.mark.parametrize(
    'wrap',
    [
        add_prefix('module.'),
        lambda state_dict: dict(epoch=3, state_dict=state_dict),
        lambda state_dict: dict(model=add_prefix('module.')(state_dict)),
        lambda state_dict: dict(supernet=add_prefix('module.')(state_dict), optimizer=dict(state={0: dict(step=1)})),
        lambda state_dict: {k: v for k, v in state_dict.items() if not k.endswith('num_batches_tracked')},
    ],
    ids=['module', 'state_dict', 'model', 'other name', 'no counters'],
)
def test_wrapped(tmp_path: Path, wrap: Callable[[dict], dict]):
    wrapped = wrap(dict(released(2).state_dict()))
    assert difference(by_checkpoint_path(save_pth(tmp_path, wrapped)), released(2), SAMPLED) < 1e-5
    # timm unwraps files; what comes from a URL or as a state dict is left to the filter
    filtered = checkpoint_filter_fn(wrapped, loaded(2))
    expected = loaded(2).state_dict()
    assert filtered.keys() == expected.keys()
    assert all(torch.equal(filtered[key], value) for key, value in expected.items())


def test_load_state_dict_of_a_wrapper():
    wrapper = nn.ModuleDict(dict(net=create(m=2)))
    wrapper['net'].sample_step.fill_(5)
    result = wrapper.load_state_dict(add_prefix('net.')(released(2).state_dict()))
    assert not result.missing_keys and not result.unexpected_keys
    assert difference(wrapper['net'], released(2), SAMPLED) < 1e-5
    assert wrapper['net'].sample_step.item() == 0  # a sequence of its own that has not begun


def test_smaller_m_leaves_shadows_out():
    supernet = create(m=2)
    supernet.load_state_dict(released(4).state_dict())
    for arch in covering_archs(2):
        assert difference(supernet, released(4), arch) < 1e-5


def test_other_number_of_classes(tmp_path: Path):
    theirs = released(2, num_classes=100)
    file = save_pth(tmp_path, theirs.state_dict())
    # of the checkpoint's own size
    assert difference(create(m=2, num_classes=100, checkpoint_path=file), theirs, SAMPLED) < 1e-5
    overlay = dict(file=file, num_classes=100)
    assert difference(create(m=2, pretrained=True, pretrained_cfg_overlay=overlay), theirs, SAMPLED) < 1e-5
    # timm's ways with another: a new classifier on pretrained weights, torch's error on a checkpoint
    supernet = create(m=2, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert supernet.classifier.out_features == 7
    assert torch.equal(supernet.conv_head.weight, theirs.last_conv[0].weight)
    assert create(m=2, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)(make_input()).shape == (1, 1280)
    with pytest.raises(RuntimeError, match=r'size mismatch for classifier\.weight'):
        create(m=2, num_classes=7, checkpoint_path=file)


def test_other_input_channels_and_features():
    overlay = dict(state_dict=released(2).state_dict())
    supernet = create(m=2, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    supernet.active_arch = SAMPLED
    with torch.inference_mode():
        gray = make_input(1)
        expected = released(2)(gray.expand(-1, 3, -1, -1), as_choices(Arch(SAMPLED)))
        torch.testing.assert_close(supernet(gray), expected, rtol=1e-5, atol=1e-5)
    features = create(m=2, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(features.model.conv_stem.weight, released(2).stem[0].weight)


def without(key: str) -> Callable[[dict], dict]:
    return lambda state_dict: {k: v for k, v in state_dict.items() if k != key}


def changed(key: str, value: Any) -> Callable[[dict], dict]:
    return lambda state_dict: {**state_dict, key: value}


WRONG = {
    'missing': (
        without('Inverted_Block.7.mix_conv.1.2.0.weight'),
        dict(m=2),
        "lacks 'Inverted_Block.7.mix_conv.1.2.0.weight' for mixpath_s1_supernet",
    ),
    'missing many': (
        lambda state_dict: {k: v for k, v in state_dict.items() if '.pw_linear.' not in k},
        dict(m=2),
        r"lacks 'Inverted_Block.0.pw_linear.0.weight' \(and 23 more\)",
    ),
    'missing shadow': (without('Inverted_Block.3.mix_bn.0.1.bias'), dict(m=2), "lacks 'Inverted_Block.3.mix_bn.0.1.b"),
    'no shadows': (
        lambda state_dict: {k: v for k, v in state_dict.items() if '.mix_bn.' not in k},
        dict(m=2),
        "lacks 'Inverted_Block.0.mix_bn.0.0.weight'",
    ),
    'unknown': (
        changed('Inverted_Block.2.pw.0.0.bias', torch.zeros(144)),
        dict(m=2),
        "a key that mixpath_s1_supernet has not: 'Inverted_Block.2.pw.0.0.bias'",
    ),
    'unknown block': (changed('Inverted_Block.12.pw.0.0.weight', torch.zeros(1)), dict(m=2), "'Inverted_Block.12.pw"),
    'impossible m': (changed('Inverted_Block.2.mix_bn.0.4.bias', torch.zeros(96)), dict(m=2), r'mix_bn\.0\.4\.bias'),
    'shape': (
        changed('Inverted_Block.0.mix_conv.0.1.0.weight', torch.zeros(96, 1, 7, 7)),
        dict(m=2),
        r"'Inverted_Block.0.mix_conv.0.1.0.weight' .* has shape \(96, 1, 7, 7\), .* needs shape \(96, 1, 5, 5\)",
    ),
    'no tensor': (changed('stem.1.weight', 1.0), dict(m=2), "'stem.1.weight' .* has type float"),
    'larger m': (dict, dict(m=3), 'has m=2, this mixpath_s1_supernet m=3: create it with m=2'),
    'sbn': (dict, dict(m=2, sum_norm='bn'), "create it with sum_norm='sbn'"),
    'width': (dict, dict(m=2, width_mult=0.5), r"'stem.1.weight' .* has shape \(32,\), .* needs shape \(16,\)"),
    'no supernet': (dict, dict(model_name='mixpath_s1'), 'does not fit mixpath_s1: load it into mixpath_s1_supernet'),
    'space': (
        dict,
        dict(model_name='mixpath_nano_supernet'),
        'a key that mixpath_nano_supernet has not',
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_checkpoints_give_one_sentence(case: str):
    change, kwargs, message = WRONG[case]
    kwargs = {'model_name': 'mixpath_s1_supernet', **kwargs}
    overlay = dict(state_dict=change(dict(released(2).state_dict())))
    with pytest.raises(RunError, match=message) as error:
        timm.create_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert '\n' not in str(error.value) and len(str(error.value)) < 200


def test_wrong_checkpoint_changes_nothing():
    model = create(m=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change, _, message = WRONG['shape']
    with pytest.raises(RunError, match=message):
        model.load_state_dict(change(dict(released(2).state_dict())))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_own_checkpoints_are_left_alone(tmp_path: Path):
    supernet = reference.perturb(timm.create_model('mixpath_nano_supernet'))
    supernet.sample_step.fill_(5)
    state_dict = supernet.state_dict()
    assert checkpoint_filter_fn(state_dict, supernet) is state_dict
    torch.save(dict(state_dict=state_dict), tmp_path / 'own.pth')
    for kwargs in (
        dict(checkpoint_path=str(tmp_path / 'own.pth')),
        dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'own.pth'))),
    ):
        other = timm.create_model('mixpath_nano_supernet', **kwargs).state_dict()
        assert other.keys() == state_dict.keys()
        assert all(torch.equal(other[key], value) for key, value in state_dict.items())
    with pytest.raises(RuntimeError, match='Missing key'):
        supernet.load_state_dict({})


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
    (block,) = [text for text in blocks if 'released.pth' in text]
    save_pth(tmp_path, released(4).state_dict())
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(block, scope)
    assert difference(scope['supernet'].eval(), released(4), SAMPLED) < 1e-5
    model = load_model('s1-supernet')
    assert difference(model.model, released(4), SAMPLED) < 1e-5
    assert tuple(model.data_config['mean']) == scope['supernet'].pretrained_cfg['mean']
