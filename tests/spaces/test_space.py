from dataclasses import FrozenInstanceError, replace
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_mixpath import Arch, BlockSpec, SearchSpace, get_space, list_spaces, register_space

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@st.composite
def spaces_and_vectors(draw) -> tuple[SearchSpace, list[int]]:
    space = draw(st.sampled_from([get_space(name, m) for name in ('s1', 's2', 's3', 'nano') for m in (1, 2, 3)]))
    return space, [draw(st.integers(0, size - 1)) for size in space.gene_sizes]


def test_s1_is_the_published_space():
    s1 = get_space('s1')
    assert [b.out_chs for b in s1.blocks] == [48, 48, 96, 96, 96, 192, 192, 192, 256, 256, 320, 320]
    assert [b.stride for b in s1.blocks] == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert {b.expand_ratios for b in s1.blocks} == {(3, 6)}
    assert {b.kernel_sizes for b in s1.blocks} == {(3, 5, 7, 9)}
    assert (s1.stem_chs, s1.stem_stride, s1.num_features, s1.act_layer) == (32, 1, 1280, 'relu6')
    assert (s1.max_paths, s1.max_paths_limit) == (4, 4)
    assert s1.input_size == (3, 32, 32)


@pytest.mark.parametrize(('name', 'num_groups', 'm'), [('s2', 1, 2), ('s3', 4, 1)])
def test_imagenet_spaces_leave_the_kernels_of_mixnet_m_open(name, num_groups, m):
    space = get_space(name)
    assert [b.out_chs for b in space.blocks] == [32] * 2 + [40] * 4 + [80] * 4 + [120] * 4 + [200] * 4
    assert [i for i, b in enumerate(space.blocks) if b.stride == 2] == [0, 2, 6, 14]
    assert [i for i, b in enumerate(space.blocks) if b.expand_ratios == (3,)] == [1, 11, 12, 13]
    assert {b.expand_ratios for b in space.blocks} == {(3,), (6,)}
    assert [b.se_ratio for b in space.blocks] == [0] * 2 + [0.5] * 4 + [0.25] * 4 + [0.5] * 8
    assert {b.kernel_sizes for b in space.blocks} == {(3, 5, 7, 9)}
    assert {b.num_groups for b in space.blocks} == {num_groups}
    assert (space.max_paths, space.max_paths_limit, space.ds_chs, space.num_features) == (m, 4, 24, 1536)
    assert (space.input_size, space.num_classes) == ((3, 224, 224), 1000)


@pytest.mark.parametrize(('m', 'num_subsets'), [(1, 4), (2, 10), (3, 14), (4, 15)])
def test_channel_groups_choose_on_their_own(m, num_subsets):
    s3 = get_space('s3', m)
    assert s3.gene_sizes == (1, *[num_subsets] * 4) * 18
    assert s3.num_choices(0) == num_subsets**4
    assert s3.size == num_subsets**72
    if m == 1:
        assert len({str(c) for c in s3.choices(0)}) == 256
    arch = s3.decode([0, 3, 0, 1, 2] * 18)
    assert str(arch.blocks[0]) == 'k9.3.5.7_e6'
    assert s3.encode(arch) == (0, 3, 0, 1, 2) * 18


@pytest.mark.parametrize(('m', 'num_choices'), [(1, 8), (2, 20), (3, 28), (4, 30)])
def test_s1_number_of_choices(m, num_choices):
    s1 = get_space('s1', m)
    assert [s1.num_choices(i) for i in range(12)] == [num_choices] * 12
    assert s1.size == num_choices**12
    assert len({str(c) for c in s1.choices(0)}) == num_choices


@pytest.mark.parametrize('m', [1, 2, 3])
def test_choices_are_all_subsets_up_to_m(m):
    space = get_space('nano', m)
    subsets = {c for k in range(1, m + 1) for c in combinations((3, 5, 7), k)}
    assert {(c.groups[0], c.expand_ratio) for c in space.choices(4)} == {(s, e) for s in subsets for e in (3, 6)}
    assert space.gene_sizes == (2, len(subsets)) * 8


@fixed
@given(spaces_and_vectors())
def test_decode_encode_round_trip(space_and_vector):
    space, vector = space_and_vector
    arch = space.decode(vector)
    assert space.encode(arch) == tuple(vector)
    assert space.encode(str(arch)) == tuple(vector)
    assert space.arch(arch) == arch


def test_decode_covers_every_choice():
    space = SearchSpace('one', (BlockSpec(8, kernel_sizes=(3, 5, 7)),), max_paths=2)
    archs = {space.decode((e, k)) for e in range(2) for k in range(6)}
    assert archs == {Arch.from_blocks([c]) for c in space.choices(0)}
    assert len(archs) == space.size == 12


def test_encoding_does_not_depend_on_the_order_in_the_table():
    space = SearchSpace('unsorted', (BlockSpec(8, kernel_sizes=(7, 3, 5), expand_ratios=(6, 3)),), max_paths=3)
    for choice in space.choices(0):
        arch = Arch.from_blocks([choice])
        assert space.decode(space.encode(arch)) == arch


@pytest.mark.parametrize('length', [0, 15, 17])
def test_decode_wrong_length(length):
    with pytest.raises(ValueError, match=f'{length} entries.*needs 16'):
        get_space('nano').decode([0] * length)


@pytest.mark.parametrize(('position', 'value', 'largest'), [(0, 2, 1), (4, -1, 1), (1, 6, 5), (15, 100, 5)])
def test_decode_out_of_range(position, value, largest):
    vector = [0] * 16
    vector[position] = value
    with pytest.raises(ValueError, match=f'entry {position} .* is {value}, allowed are 0 to {largest}'):
        get_space('nano').decode(vector)


@pytest.mark.parametrize(
    ('block', 'words'),
    [
        ('k9_e6', ['kernel 9', '3, 5, 7']),
        ('k3+9_e6', ['kernel 9', '3, 5, 7']),
        ('k3_e4', ['expansion 4', '3, 6']),
        ('k3+5+7_e6', ['3 paths', 'm=2']),
        ('k3.5_e6', ['2 channel groups', '1']),
    ],
)
@pytest.mark.parametrize('index', [0, 5])
def test_arch_outside_the_space(index, block, words):
    blocks = ['k3_e6'] * 8
    blocks[index] = block
    with pytest.raises(ValueError) as error:
        get_space('nano').arch(','.join(blocks))
    for word in [f'arch block {index} ', repr(block), "'nano'", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize('num_blocks', [1, 7, 9])
def test_arch_of_another_depth(num_blocks):
    with pytest.raises(ValueError, match=f"{num_blocks} blocks, space 'nano' needs 8"):
        get_space('nano').arch(','.join(['k3_e6'] * num_blocks))


def test_arch_gives_the_canonical_arch():
    text = ','.join(['k5+3_e3'] * 8)
    arch = get_space('nano').arch(text)
    assert type(arch) is Arch
    assert arch == ','.join(['k3+5_e3'] * 8)


def test_default_arch_is_mobilenet_v2():
    assert get_space('s1').default_arch == ','.join(['k3_e6'] * 12)
    assert get_space('s1', 1).default_arch == get_space('s1').default_arch


@pytest.mark.parametrize('m', [0, -1, 4, 2.0, '2', True])
def test_m_out_of_range(m):
    with pytest.raises(ValueError, match=r"m=.* out of range for space 'nano', allowed are 1 to 3"):
        get_space('nano', m)


def test_m_is_limited_by_the_smallest_block():
    blocks = (BlockSpec(8), BlockSpec(8, kernel_sizes=(3, 5)))
    assert SearchSpace('two', blocks, max_paths=2).max_paths_limit == 2
    with pytest.raises(ValueError, match='allowed are 1 to 2'):
        SearchSpace('two', blocks, max_paths=3)


@pytest.mark.parametrize('blocks', [(), (BlockSpec(8, expand_ratios=()),), (BlockSpec(8, kernel_sizes=()),)])
def test_empty_space(blocks):
    with pytest.raises(ValueError, match="space 'empty'"):
        SearchSpace('empty', blocks, max_paths=1)


def test_get_space():
    assert {'s1', 'nano'} <= set(list_spaces())
    assert list_spaces() == sorted(list_spaces())
    assert get_space('s1', 2) == replace(get_space('s1'), max_paths=2)
    with pytest.raises(ValueError, match=r"'s9'.*nano.*s1"):
        get_space('s9')


def test_spaces_are_immutable():
    with pytest.raises(FrozenInstanceError):
        get_space('s1').max_paths = 1


@pytest.mark.parametrize(
    ('width_mult', 'stem_chs', 'out_chs', 'num_features'),
    [
        (1.0, 24, [24, 24, 48, 48, 48, 96, 96, 96], 384),
        (0.5, 16, [16, 16, 24, 24, 24, 48, 48, 48], 384),
        (2.0, 48, [48, 48, 96, 96, 96, 192, 192, 192], 768),
    ],
)
def test_scaled(width_mult, stem_chs, out_chs, num_features):
    space = get_space('nano').scaled(width_mult)
    assert (space.stem_chs, space.num_features) == (stem_chs, num_features)
    assert [b.out_chs for b in space.blocks] == out_chs
    assert [b.stride for b in space.blocks] == [b.stride for b in get_space('nano').blocks]
    assert (space.name, space.size, space.default_arch) == (
        'nano',
        get_space('nano').size,
        get_space('nano').default_arch,
    )


@pytest.mark.parametrize('width_mult', [0.0, -1.0, float('nan')])
def test_scaled_by_nonsense(width_mult):
    with pytest.raises(ValueError, match=r'width_mult=.*positive'):
        get_space('nano').scaled(width_mult)


def test_stages_break_at_width_and_stride():
    blocks = (BlockSpec(8), BlockSpec(8), BlockSpec(8, stride=2), BlockSpec(8), BlockSpec(16))
    assert [len(s) for s in SearchSpace('stages', blocks).stages] == [2, 2, 1]
    assert [len(s) for s in get_space('s1').stages] == [2, 3, 3, 2, 2]


OWN = SearchSpace(
    name='own_for_test',
    blocks=(BlockSpec(8), BlockSpec(16, stride=2, kernel_sizes=(3, 5), expand_ratios=(2, 4)), BlockSpec(16)),
    stem_chs=8,
    num_features=32,
    num_classes=5,
    input_size=(3, 16, 16),
)


def test_register_own_space():
    register_space(OWN)
    register_space(replace(OWN))  # an equal one is the same space
    assert get_space('own_for_test') == OWN
    assert {'mixpath_own_for_test', 'mixpath_own_for_test_supernet'} <= set(timm.list_models('mixpath_*'))

    supernet = timm.create_model('mixpath_own_for_test_supernet').eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    supernet.active_arch = arch = 'k3+9_e6,k3+5_e4,k7_e3'
    model = timm.create_model('mixpath_own_for_test', arch=arch).eval()
    assert model.arch == arch
    assert model(x).shape == (2, 5)
    assert model.default_cfg['input_size'] == (3, 16, 16)
    torch.testing.assert_close(supernet.extract()(x), supernet(x), rtol=1e-5, atol=1e-5)


def test_register_conflict():
    register_space(OWN)
    with pytest.raises(ValueError, match="'own_for_test' exists already"):
        register_space(replace(OWN, num_features=64))
    with pytest.raises(ValueError, match="'s1' exists already"):
        register_space(replace(OWN, name='s1'))
    assert get_space('own_for_test') == OWN
    assert len(get_space('s1').blocks) == 12


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(input_size=32), r'input_size=\(32,\) must be channels, height and width'),
        (dict(input_size=(32, 32)), r'input_size=\(32, 32\) must be channels'),
        (dict(input_size=(3, 0, 32)), r'input_size=\(3, 0, 32\) must be'),
        (dict(stem_stride=0), 'stem_stride=0 must be an integer of at least 1'),
        (dict(stem_chs=0), 'stem_chs=0 must be'),
        (dict(num_features=32.0), r'num_features=32\.0 must be'),
        (dict(ds_chs=0), 'ds_chs=0 must be'),
        (dict(num_classes=-1), 'num_classes=-1 must be an integer of at least 0'),
        (dict(blocks=(BlockSpec(24.5),)), r'out_chs=24\.5 must be a positive integer'),
    ],
)
def test_sizes_of_a_space(change, message):
    with pytest.raises(ValueError, match=message):
        replace(OWN, **change)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(act_layer='rellu'), "no network can be built of space 'of_mistakes': unknown activation 'rellu'"),
        (dict(blocks=(BlockSpec(8, act_layer='rellu'),)), "unknown activation 'rellu'"),
        (dict(blocks=(BlockSpec(8, exp_groups=5),)), 'must be divisible by groups'),
    ],
)
def test_a_mistake_leaves_the_name_free(change, message):
    with pytest.raises(ValueError, match=message):
        register_space(replace(OWN, **{'name': 'of_mistakes', **change}))
    assert 'of_mistakes' not in list_spaces()
    assert not timm.list_models('mixpath_of_mistakes*')


def test_sizes_of_numpy():
    block = BlockSpec(np.int64(16), stride=np.int64(2), kernel_sizes=np.array([3, 5]), expand_ratios=(2, 4))
    space = replace(
        OWN, blocks=(OWN.blocks[0], block, OWN.blocks[2]), num_features=np.int64(32), input_size=np.array([3, 16, 16])
    )
    assert space == OWN and repr(space) == repr(OWN)
    for ratios in ((2.0, 4.0), np.array([2, 4]), np.array([2.0, 4.0])):  # an arch writes them as whole numbers
        other = replace(OWN, blocks=(OWN.blocks[0], replace(block, expand_ratios=ratios), OWN.blocks[2]))
        assert other == OWN and repr(other) == repr(OWN)


def test_sizes_as_a_list():
    assert replace(OWN, input_size=[3, 16, 16]) == OWN
    assert hash(replace(OWN, input_size=[3, 16, 16])) == hash(OWN)


@pytest.mark.parametrize('name', ['', 'my space', 'my-space', '1st', 'a.b', 'MixPath', 's1_supernet'])
def test_register_bad_name(name):
    with pytest.raises(ValueError, match='lower case letters'):
        register_space(replace(OWN, name=name))
    assert name not in list_spaces()


def test_register_refuses_the_name_of_another_model():
    register_model_name = 's2_of_somebody_else'

    @timm.models.register_model
    def mixpath_s2_of_somebody_else(pretrained=False, **kwargs):
        raise AssertionError

    with pytest.raises(ValueError, match='there is a model'):
        register_space(replace(OWN, name=register_model_name))
    assert register_model_name not in list_spaces()


@pytest.mark.parametrize(
    'spec, text',
    [
        (BlockSpec(8, kernel_sizes=(3, 3)), 'kernel 3 is given twice'),
        (BlockSpec(8, kernel_sizes=(4,)), 'kernel 4 is not an odd'),
        (BlockSpec(8, expand_ratios=(0,)), 'expansion 0'),
        (BlockSpec(8, kernel_sizes=()), 'at least one'),
    ],
)
def test_space_with_impossible_blocks(spec, text):
    with pytest.raises(ValueError, match=text):
        SearchSpace('bad', (spec,), max_paths=1)
