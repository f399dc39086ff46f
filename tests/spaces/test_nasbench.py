"""Archs of the benchmark cell spaces."""

import pickle
import random
from collections import Counter
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import rows

from timm_mixpath import NB101Space, NB201Space, get_space, sample

BEST = '|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|'


def test_sizes():
    assert get_space('nb201').size == 5**6 == len(set(_all(NB201Space())))
    assert get_space('nb101').size == 34 * 3 == len(set(_all(NB101Space())))
    # of the edges of a node at most m are not none: 1 + 4, 1 + 2 * 4, 1 + 3 * 4, and with pairs 16 and 3 * 16 more
    assert get_space('nb201', m=1).size == 5 * 9 * 13
    assert get_space('nb201', m=2).size == 5 * 25 * (13 + 48) == len(set(_all(get_space('nb201', m=2))))
    assert get_space('nb101', m=1).size == 9
    for space in (NB201Space(), NB101Space()):
        for m in range(1, space.max_paths_limit + 1):
            assert space.with_max_paths(m).default_arch in _all(space.with_max_paths(m))


def _all(space) -> list[str]:
    return [space.decode(vector) for vector in product(*map(range, space.gene_sizes))]


def test_the_table_of_nb201_is_in_the_space():
    space, cells = get_space('nb201'), [row['cell'] for row in rows('nb201.csv')]
    assert len(cells) == 7775
    assert all(space.arch(cell) == cell for cell in cells)  # canonical as they are


def test_the_table_of_nb101_is_in_the_space():
    space = get_space('nb101')
    for row in rows('nb101_multipath.csv'):
        arch = space.arch(row['ops'])
        assert arch == row['ops']
        assert arch.ops == (*row['parallel_ops'].split('|'), row['agg_op'])


@pytest.mark.parametrize(
    'space', [NB201Space(), NB201Space(max_paths=2), NB101Space(), NB101Space(max_paths=3)], ids=str
)
@given(data=st.data())
def test_vectors_and_text_round_trip(space, data):
    vector = tuple(data.draw(st.integers(0, size - 1)) for size in space.gene_sizes)
    arch = space.decode(vector)
    assert space.encode(arch) == vector
    again = space.arch(str(arch))
    assert (again, again.ops) == (arch, arch.ops)
    copy = pickle.loads(pickle.dumps(arch))
    assert (copy, copy.ops, type(copy)) == (arch, arch.ops, type(arch))


@given(text=st.text(alphabet='|+~012nor_conv_3x3skip') | st.text())
def test_no_text_is_more_than_a_value_error(text):
    for space in (NB201Space(), NB101Space()):
        try:
            arch = space.arch(text)
        except ValueError:
            continue
        assert space.arch(str(arch)) == arch


def test_text_in_another_order():
    space = get_space('nb201')
    assert space.arch(BEST.replace('|skip_connect~0|nor_conv_3x3~1|', '|nor_conv_3x3~1|skip_connect~0|')) == BEST
    space = get_space('nb101')
    text = 'input|maxpool3x3|conv1x1-bn-relu|conv3x3-bn-relu|output'
    assert space.arch(text) == 'input|conv1x1-bn-relu|maxpool3x3|conv3x3-bn-relu|output'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('k3_e6', 'has 1 nodes joined by'),
        (BEST.replace('skip_connect', 'skip'), "operation 'skip' of arch .* is not one of none, skip_connect"),
        (BEST.replace('nor_conv_3x3~2', 'nor_conv_3x3~3'), 'node 3 .* has edges from 0, 1, 3, needed is one from each'),
        (BEST.replace('nor_conv_3x3~2', 'nor_conv_3x3~1'), 'two edges from node 1'),
        (BEST[1:], 'not edges between'),
        (3, 'an arch is text, not int'),
    ],
)
def test_wrong_cells_of_nb201(text, message):
    with pytest.raises(ValueError, match=message):
        get_space('nb201').arch(text)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('conv1x1-bn-relu|maxpool3x3', 'is not input, parallel operations'),
        ('input|conv1x1-bn-relu|output', 'is not input, parallel operations'),
        ('input|conv5x5|maxpool3x3|output', "operation 'conv5x5' .* is not one of conv1x1-bn-relu"),
        ('input|' + 'maxpool3x3|' * 6 + 'output', '5 parallel operations, at most m=4'),
        (None, 'an arch is text, not NoneType'),
    ],
)
def test_wrong_cells_of_nb101(text, message):
    with pytest.raises(ValueError, match=message):
        get_space('nb101').arch(text)


def test_m_bounds_the_paths():
    with pytest.raises(ValueError, match='node 2 has 2 inputs that are not none, at most m=1'):
        get_space('nb201', m=1).arch(BEST)
    with pytest.raises(ValueError, match=r'm=4 is out of range for space .nb201., allowed are 1 to 3'):
        get_space('nb201', m=4)
    with pytest.raises(ValueError, match='entry 1 of the vector is 5, allowed are 0 to 4'):
        get_space('nb201').decode([0, 5, 0, 0, 0, 0])


def test_live_edges_by_search_for_a_way():
    """Against a plain search: an edge is live if some way from node 0 to node 3 runs along it."""
    space = get_space('nb201')
    draw = random.Random(0)
    for vector in draw.sample(range(5**6), 300):
        arch = space.decode([vector // 5**i % 5 for i in range(6)])
        edges = {(i, j + 1): op for j, ops in enumerate(space.nodes(arch)) for i, op in enumerate(ops) if op != 'none'}
        ways = [way for way in ([0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3]) if all(e in edges for e in pairwise(way))]
        expected = {edge for way in ways for edge in pairwise(way)}
        live = {(i, node): op for node, ops in enumerate(space.live_edges(arch), 1) for i, op in ops}
        assert live == {edge: edges[edge] for edge in expected}


def test_sampling_is_uniform_over_the_number_of_paths():
    space, counts, ops = get_space('nb201'), [Counter(), Counter(), Counter()], Counter()
    n = 6000
    for step in range(n):
        for node, edges in enumerate(space.nodes(sample(space, seed=3, step=step))):
            counts[node][node + 1 - edges.count('none')] += 1
            ops.update(op for op in edges if op != 'none')
    assert set(counts[0]) == {1}
    for node in (1, 2):
        expected = n / (node + 1)
        assert set(counts[node]) == set(range(1, node + 2))
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts[node].values())
    expected = ops.total() / 4
    assert all(abs(count - expected) < 5 * expected**0.5 for count in ops.values())

    space = get_space('nb101')
    paths = Counter(len(sample(space, seed=3, step=step).ops) - 1 for step in range(n))
    assert set(paths) == {1, 2, 3, 4}
    assert all(abs(count - n / 4) < 5 * (n / 4) ** 0.5 for count in paths.values())
