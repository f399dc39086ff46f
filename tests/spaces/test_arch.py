import argparse
import copy
import json
import pickle
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ParseKwargs

from timm_mixpath import Arch, BlockChoice
from timm_mixpath.spaces.arch import SKIP

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)

kernels = st.integers(0, 15).map(lambda i: 2 * i + 1)
groups = st.lists(kernels, min_size=1, max_size=4, unique=True).map(tuple)
expansions = st.integers(1, 12) | st.integers(1, 99_999).map(lambda i: i / 10_000) | st.sampled_from([2.5, 4.5, 6.0])
choices = st.just(SKIP) | st.builds(BlockChoice, st.lists(groups, min_size=1, max_size=4).map(tuple), expansions)
archs = st.lists(choices, min_size=1, max_size=14).map(Arch.from_blocks)


def parse_model_kwargs(command_line: str) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    return parser.parse_args(shlex.split(command_line)).model_kwargs


@fixed
@given(archs)
def test_text_round_trip(arch: Arch):
    parsed = Arch.parse(str(arch))
    assert parsed == arch
    assert parsed.blocks == arch.blocks
    assert Arch.parse(str(parsed)) == str(parsed)


@fixed
@given(archs)
def test_dict_json_pickle_round_trip(arch: Arch):
    for back in (
        Arch.from_dict(arch.to_dict()),
        Arch.from_dict(json.loads(json.dumps(arch.to_dict()))),
        Arch.from_json(arch.to_json()),
        pickle.loads(pickle.dumps(arch)),
        copy.deepcopy(arch),
    ):
        assert type(back) is Arch
        assert back == arch
        assert back.blocks == arch.blocks
        assert hash(back) == hash(arch)


@fixed
@given(archs, st.randoms(use_true_random=False))
def test_order_of_kernels_is_irrelevant(arch: Arch, rng):
    def shuffled(group: tuple[int, ...]) -> str:
        return '+'.join(str(k) for k in rng.sample(group, len(group)))

    text = ','.join(
        'skip' if b.is_skip else f'k{".".join(shuffled(g) for g in b.groups)}_e{b.expand_ratio}' for b in arch.blocks
    )
    assert Arch(text) == arch
    assert hash(Arch(text)) == hash(arch)
    assert Arch(text).blocks == arch.blocks


@fixed
@given(archs)
def test_survives_timm_model_kwargs(arch: Arch):
    assert parse_model_kwargs(f'--model-kwargs arch={arch} m=2') == {'arch': str(arch), 'm': 2}


@pytest.mark.parametrize(
    'text', ['k3.5+7.9.3_e6', 'k3_e6', 'k3+5_e6,k7_e3', 'k3.5_e6,k3.5+7.9.3_e6', 'skip,k3_e4.5', 'k3_e0.75,skip']
)
def test_survives_an_unquoted_shell_word(text):
    word = subprocess.run(['sh', '-c', f'printf %s arch={text}'], capture_output=True, text=True, check=True).stdout
    assert parse_model_kwargs(f'--model-kwargs {word}') == {'arch': text}
    assert Arch(text) == text


@pytest.mark.parametrize(
    ('text', 'canonical', 'groups', 'expand_ratio', 'num_paths'),
    [
        ('k3_e6', 'k3_e6', ((3,),), 6, (1,)),
        ('k7+3_e3', 'k3+7_e3', ((3, 7),), 3, (2,)),
        ('k9+11+3_e6', 'k3+9+11_e6', ((3, 9, 11),), 6, (3,)),
        ('k3.7+5.9.3_e6', 'k3.5+7.9.3_e6', ((3,), (5, 7), (9,), (3,)), 6, (1, 2, 1, 1)),
        (' k3_e6\n', 'k3_e6', ((3,),), 6, (1,)),
        ('k03_e06', 'k3_e6', ((3,),), 6, (1,)),
        ('k3_e4.50', 'k3_e4.5', ((3,),), 4.5, (1,)),
        ('k3_e6.0', 'k3_e6', ((3,),), 6, (1,)),
        (' skip', 'skip', (), 0, ()),
    ],
)
def test_parse(text, canonical, groups, expand_ratio, num_paths):
    (block,) = Arch.parse(text).blocks
    assert str(Arch(text)) == canonical
    assert block == BlockChoice.parse(text)
    assert (block.groups, block.expand_ratio, block.num_paths) == (groups, expand_ratio, num_paths)


def test_blanks_around_blocks_are_dropped():
    assert Arch(' k3_e6 ,\tk5+3_e3 ') == 'k3_e6,k3+5_e3'


def test_is_its_own_text():
    arch = Arch('k7+3_e6,k5_e3')
    assert arch == 'k3+7_e6,k5_e3'
    assert {arch: 1}['k3+7_e6,k5_e3'] == 1
    assert len({arch, Arch('k3+7_e6,k5_e3'), Arch('k3+7_e6,k5_e6')}) == 2
    assert type(str(arch)) is str
    assert f'{arch}' == 'k3+7_e6,k5_e3'
    assert eval(repr(arch)) == arch
    assert Arch(arch) is arch
    assert json.loads(json.dumps({'arch': arch})) == {'arch': 'k3+7_e6,k5_e3'}


def test_groups_are_ordered():
    assert Arch('k3.5_e6') != Arch('k5.3_e6')


FORM = 'k<kernels>_e<expansion>'


@pytest.mark.parametrize(
    ('text', 'index', 'token', 'allowed'),
    [
        ('', 0, "''", FORM),
        (' ', 0, "''", FORM),
        (',', 0, "''", FORM),
        ('k3_e6,', 1, "''", FORM),
        (',k3_e6', 0, "''", FORM),
        ('k3_e6,,k3_e6', 1, "''", FORM),
        ('k3', 0, "'k3'", FORM),
        ('3_e6', 0, "'3_e6'", FORM),
        ('k3e6', 0, "'k3e6'", FORM),
        ('K3_e6', 0, "'K3_e6'", FORM),
        ('e6_k3', 0, "'e6_k3'", FORM),
        ('k3_e6_e3', 0, "'k3_e6_e3'", FORM),
        ('k1_000_e6', 0, "'k1_000_e6'", FORM),
        ('k3_e6,k5_e3,none', 2, "'none'", FORM),
        ('k3_e6,kx_e6', 1, "kernel 'x'", 'number'),
        ('k_e6', 0, "kernel ''", 'number'),
        ('k3+_e6', 0, "kernel ''", 'number'),
        ('k3++5_e6', 0, "kernel ''", 'number'),
        ('k3._e6', 0, "kernel ''", 'number'),
        ('k-3_e6', 0, "kernel '-3'", 'number'),
        ('k 3_e6', 0, "kernel ' 3'", 'number'),
        ('k3 +5_e6', 0, "kernel '3 '", 'number'),
        ('k3x3_e6', 0, "kernel '3x3'", 'number'),
        ('k٣_e6', 0, "kernel '٣'", 'number'),
        ('k３_e6', 0, "kernel '３'", 'number'),  # noqa: RUF001
        ('k4_e6', 0, 'kernel 4', 'odd positive integer'),
        ('k3_e6,k3+4_e6', 1, 'kernel 4', 'odd positive integer'),
        ('k0_e6', 0, 'kernel 0', 'odd positive integer'),
        ('k3.0_e6', 0, 'kernel 0', 'odd positive integer'),
        ('k3_e6,k3+3_e6', 1, 'kernel 3', 'once'),
        ('k3.5+7+5_e6', 0, 'kernel 5', 'once'),
        ('k3_e', 0, "expansion ''", 'number'),
        ('k3_ex', 0, "expansion 'x'", 'number'),
        ('k3_e6.54321', 0, "expansion '6.54321'", 'number'),
        ('k3_e-6', 0, "expansion '-6'", 'number'),
        ('k3_e٦', 0, "expansion '٦'", 'number'),
        ('k3_e6 k5_e3', 0, "'k3_e6 k5_e3'", FORM),
        ('k3_e6,k3_e0', 1, 'expansion 0', 'positive integer'),
        ('k3_e0.0', 0, 'expansion 0.0', 'positive'),
        ('k3_e4.', 0, "expansion '4.'", 'decimals'),
        ('k3_e1e1', 0, "expansion '1e1'", 'number'),
        ('skip_e3', 0, 'skip_e3', 'skip'),
    ],
)
def test_malformed_text(text, index, token, allowed):
    with pytest.raises(ValueError) as error:
        Arch.parse(text)
    message = str(error.value)
    assert f'arch block {index} ' in message
    assert token in message
    assert allowed in message


@pytest.mark.parametrize('value', [None, 3, 3.5, b'k3_e6', ['k3_e6'], ('k3_e6',), {'arch': 'k3_e6'}])
def test_not_text(value):
    with pytest.raises(ValueError, match=f'an arch is text.*not {type(value).__name__}'):
        Arch(value)


@pytest.mark.parametrize(
    ('groups', 'expand_ratio', 'message'),
    [
        ((), 6, 'at least one kernel'),
        (((),), 6, 'at least one kernel'),
        (((3,), ()), 6, 'at least one kernel'),
        (((3, 3),), 6, 'kernel 3 is given twice'),
        (((2,),), 6, 'kernel 2 is not an odd positive integer'),
        (((-3,),), 6, 'kernel -3 is not an odd positive integer'),
        (((3,),), 0, 'expansion 0 is not a positive integer'),
    ],
)
def test_bad_block_choice(groups, expand_ratio, message):
    with pytest.raises(ValueError, match=message):
        BlockChoice(groups, expand_ratio)


def test_no_blocks():
    with pytest.raises(ValueError, match='at least one block'):
        Arch.from_blocks([])


@pytest.mark.parametrize(
    'config',
    [
        None,
        {},
        {'blocks': None},
        {'blocks': []},
        {'blocks': ['k3_e6']},
        {'blocks': [{'expand_ratio': 6}]},
        {'blocks': [{'kernel_sizes': [[3]]}]},
        {'blocks': [{'kernel_sizes': [3], 'expand_ratio': 6}]},
        {'blocks': [{'kernel_sizes': [['3']], 'expand_ratio': 6}]},
        {'blocks': [{'kernel_sizes': [[4]], 'expand_ratio': 6}]},
        {'blocks': [{'kernel_sizes': [[3]], 'expand_ratio': '6'}]},
    ],
)
def test_bad_dict(config):
    with pytest.raises(ValueError):
        Arch.from_dict(config)


@pytest.mark.parametrize('text', ['', '{', '[]', '3', 'null', '{"blocks": 3}'])
def test_bad_json(text):
    with pytest.raises(ValueError):
        Arch.from_json(text)


def test_json_is_plain():
    assert json.loads(Arch('k7+3_e6,k5_e3').to_json()) == {
        'blocks': [
            {'kernel_sizes': [[3, 7]], 'expand_ratio': 6},
            {'kernel_sizes': [[5]], 'expand_ratio': 3},
        ]
    }


@pytest.mark.parametrize('kernel_sizes, expand_ratio', [([[3.0]], 6), ([[3]], 6.54321), ([[True]], 6), ([['3']], 6)])
def test_json_of_anything_but_integers_is_refused(kernel_sizes, expand_ratio):
    with pytest.raises(ValueError, match='is not a'):
        Arch.from_dict({'blocks': [{'kernel_sizes': kernel_sizes, 'expand_ratio': expand_ratio}]})
