"""Spaces with blocks that can be skipped and expansions that are no whole numbers."""

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_mixpath import Arch, BackboneSpace, BlockSpec, sample

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)

SPACE = BackboneSpace(
    name='tiny',
    blocks=(
        BlockSpec(8, expand_ratios=(1,), kernel_sizes=(3, 5)),
        BlockSpec(8, expand_ratios=(3, 4.5, 6.0), kernel_sizes=(3, 5, 7), can_skip=True),
        BlockSpec(8, expand_ratios=(6,), kernel_sizes=(3, 5), num_groups=2, can_skip=True),
    ),
    backbone_arch=Arch('k3_e1,k5_e6,k3.5_e6'),
    block_names=('blocks.0.0', 'blocks.1.0', 'blocks.1.1'),
)


def test_vectors_reach_every_arch_and_nothing_else() -> None:
    vectors = product(*map(range, SPACE.gene_sizes))
    archs = {SPACE.decode(vector) for vector in vectors}
    expected = {','.join(map(str, blocks)) for blocks in product(*(SPACE.choices(i) for i in range(3)))}
    assert archs == expected and len(archs) == SPACE.size
    assert [SPACE.num_choices(i) for i in range(3)] == [3, 3 * 6 + 1, 9 + 1]
    for arch in archs:
        assert SPACE.decode(SPACE.encode(arch)) == arch == SPACE.arch(arch)


def test_part_without_more_than_the_backbone() -> None:
    part = SPACE.without_more()
    expected = set()
    for vector in product(*map(range, SPACE.gene_sizes)):
        arch = SPACE.decode(vector)
        groups = [(group, own) for choice, own in zip(arch.blocks, (3, 5, 5)) for group in choice.groups]
        if all(len(group) == 1 and group[0] <= own for group, own in groups):
            expected.add(arch)
    archs = {part.decode(vector) for vector in product(*map(range, part.gene_sizes))}
    assert archs == expected and len(archs) == part.size < SPACE.size
    assert part.default_arch == SPACE.default_arch in archs
    assert (part.name, part.block_names) == (SPACE.name, SPACE.block_names)


@fixed
@given(st.data())
def test_a_skipped_block_has_one_vector(data: st.DataObject) -> None:
    vector = [data.draw(st.integers(0, size - 1)) for size in SPACE.gene_sizes]
    arch = SPACE.decode(vector)
    for index, choice in enumerate(arch.blocks):
        genes = [0, 2, 4][index]
        assert choice.is_skip == (index > 0 and vector[genes] == len(SPACE.blocks[index].expand_ratios))
    assert SPACE.decode(SPACE.encode(arch)) == arch


@pytest.mark.parametrize('strategy', ['paths', 'fair'])
def test_skipping_counts_as_one_expansion(strategy: str) -> None:
    archs = [Arch(sample(SPACE, seed=0, step=i, strategy=strategy)) for i in range(2000)]
    counts = Counter('skip' if a.blocks[1].is_skip else a.blocks[1].expand_ratio for a in archs)
    assert set(counts) == {'skip', 3, 4.5, 6}
    assert all(abs(count - 500) < 90 for count in counts.values())  # four standard deviations
    assert not any(a.blocks[0].is_skip for a in archs)


def test_uniform_draws_all_choices_alike() -> None:
    """To skip a block is one of them, although its vectors are as many as its kernels have values."""
    archs = [Arch(sample(SPACE, seed=0, step=i, strategy='uniform')) for i in range(6000)]
    for index in range(3):
        counts = Counter(str(arch.blocks[index]) for arch in archs)
        expected = len(archs) / SPACE.num_choices(index)
        assert set(counts) == set(map(str, SPACE.choices(index)))
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize(
    'arch, message',
    [
        ('skip,k5_e6,k3.5_e6', r"block 0 \('skip'\) is not in space 'tiny': the block can not be skipped"),
        ('k3_e1,k5_e5,k3.5_e6', 'expansion 5 is not one of 3, 4.5, 6'),
        ('k3_e1,k5_e6,k3_e6', '1 channel groups, the space has 2'),
        ('k3_e1,k3+5+7_e6,skip', '3 paths, at most m=2'),
    ],
)
def test_what_it_does_not_hold(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.arch(arch)


def test_default_is_the_backbone() -> None:
    assert SPACE.default_arch == 'k3_e1,k5_e6,k3.5_e6'
    assert SPACE.with_max_paths(1).default_arch == SPACE.default_arch
    with pytest.raises(ValueError, match='kernel 5 is not one of 3'):
        BackboneSpace('x', (BlockSpec(8, kernel_sizes=(3,)),), Arch('k5_e6'), ('blocks.0.0',), max_paths=1)


def test_sample_draws_from_the_whole_space() -> None:
    draw = random.Random(0).random
    assert len({SPACE.sample(draw) for _ in range(30_000)}) == SPACE.size
