import os
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from timm_mixpath import Arch, BlockSpec, SearchSpace, get_space, sample

# Space, m, seed, step, arch. A change here changes every published run: never edit, only add.
GOLDEN = [
    (
        's1',
        4,
        0,
        0,
        'k5+7+9_e3,k3+5+7+9_e6,k3+9_e6,k7+9_e6,k7_e3,k5+7+9_e3,k3+5+7+9_e6,k3+7+9_e3,k5_e6,k5+9_e6,k3+5+9_e3,k3+5_e6',
    ),
    (
        's1',
        4,
        0,
        1,
        'k5+7_e6,k3+5+7+9_e6,k3+5+7_e3,k3+5+7+9_e3,k5+9_e6,k5_e3,'
        'k3+5+7+9_e3,k3+5+9_e3,k5+7+9_e3,k9_e6,k3+5+7+9_e3,k7+9_e6',
    ),
    (
        's1',
        2,
        42,
        1000,
        'k9_e6,k5+7_e6,k7+9_e6,k3+9_e6,k3+5_e3,k7+9_e6,k5_e3,k7_e6,k5+7_e3,k5+9_e6,k5+9_e3,k3+9_e6',
    ),
    ('nano', 2, 0, 0, 'k3+7_e3,k3+7_e6,k3_e3,k3_e6,k3+7_e6,k3_e6,k5_e6,k5+7_e6'),
    ('nano', 3, 7, 123456, 'k5_e6,k3+5+7_e3,k5+7_e6,k5_e6,k3+5_e3,k7_e6,k3+5+7_e3,k3+7_e3'),
]


@pytest.fixture(scope='module')
def draws() -> dict[int, list[Arch]]:
    """1500 archs of S1 for every m, 18,000 block choices each."""
    return {m: [sample(get_space('s1', m), seed=1, step=step) for step in range(1500)] for m in (1, 2, 3, 4)}


@pytest.mark.parametrize(('name', 'm', 'seed', 'step', 'arch'), GOLDEN)
def test_golden_values(name, m, seed, step, arch):
    assert sample(get_space(name, m), seed=seed, step=step) == arch


@pytest.mark.slow
def test_same_in_another_process():
    code = (
        'import random, torch\n'
        'from timm_mixpath import get_space, sample\n'
        'random.seed(99), torch.manual_seed(99)\n'
        'for step in (3, 2, 0, 1):\n'
        '    print(step, sample(get_space("s1"), seed=5, step=step))\n'
    )
    env = {**os.environ, 'PYTHONHASHSEED': '123'}
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout
    expected = [f'{step} {sample(get_space("s1"), seed=5, step=step)}' for step in (3, 2, 0, 1)]
    assert output.splitlines() == expected


def test_stateless():
    space = get_space('nano', 3)
    forward = [sample(space, seed=0, step=step) for step in range(20)]
    backward = [sample(space, seed=0, step=step) for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_steps_and_seeds_differ():
    space = get_space('s1')
    archs = {sample(space, seed=seed, step=step) for seed in range(20) for step in range(20)}
    assert len(archs) == 400  # of 30 ** 12, a collision would be a bug
    # seed and step are not simply added or joined
    assert sample(space, seed=1, step=11) != sample(space, seed=11, step=1)
    assert sample(space, seed=1, step=23) != sample(space, seed=12, step=3)


def test_leaves_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = sample(get_space('s1'), seed=0, step=0)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert sample(get_space('s1'), seed=0, step=0) == first


@pytest.mark.parametrize('m', [1, 2, 3, 4])
def test_stays_in_the_space(m, draws):
    space = get_space('s1', m)
    assert all(space.arch(arch) == arch for arch in draws[m])


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((c - expected) ** 2 / expected for c in counts)


# 99.99% points of chi-square for the degrees of freedom below
LIMITS = {0: 1e-9, 1: 15.2, 2: 18.5, 3: 21.2, 5: 25.8}


@pytest.mark.parametrize('m', [1, 2, 3, 4])
def test_uniform_over_number_of_paths(m, draws):
    counts = Counter(block.num_paths[0] for arch in draws[m] for block in arch.blocks)
    assert sorted(counts) == list(range(1, m + 1))
    assert chi_square(list(counts.values())) < LIMITS[m - 1]


@pytest.mark.parametrize('m', [2, 4])
def test_uniform_over_expansions(m, draws):
    counts = Counter(block.expand_ratio for arch in draws[m] for block in arch.blocks)
    assert sorted(counts) == [3, 6]
    assert chi_square(list(counts.values())) < LIMITS[1]


@pytest.mark.parametrize('num_paths', [1, 2, 3, 4])
def test_uniform_over_kernels_of_a_size(num_paths, draws):
    counts = Counter(b.groups[0] for arch in draws[4] for b in arch.blocks if b.num_paths[0] == num_paths)
    subsets = list(combinations((3, 5, 7, 9), num_paths))
    assert sorted(counts) == subsets
    assert chi_square([counts[s] for s in subsets]) < LIMITS[len(subsets) - 1]


def test_every_block_is_uniform_over_expansion_and_number(draws):
    for index in range(12):
        counts = Counter((a.blocks[index].expand_ratio, a.blocks[index].num_paths[0]) for a in draws[3])
        assert len(counts) == 6
        assert chi_square(list(counts.values())) < LIMITS[5]


@pytest.mark.parametrize(('block', 'step'), [(1, 0), (0, 1)])
def test_neighbouring_blocks_and_steps_are_independent(block, step, draws):
    pairs = Counter()
    for first, second in zip(draws[1], draws[1][step:]):
        pairs[first.blocks[0].expand_ratio, second.blocks[block].expand_ratio] += 1
    assert len(pairs) == 4
    assert chi_square(list(pairs.values())) < LIMITS[3]


def test_blocks_of_different_choices():
    space = SearchSpace(
        'mixed', (BlockSpec(8, kernel_sizes=(3, 5), expand_ratios=(2,)), BlockSpec(8, kernel_sizes=(11, 1, 3)))
    )
    archs = [sample(space, seed=0, step=step) for step in range(300)]
    assert {a.blocks[0] for a in archs} == set(space.choices(0))
    assert {a.blocks[1] for a in archs} == set(space.choices(1))


@pytest.mark.parametrize('m', [1, 2])
def test_channel_groups_are_sampled_on_their_own(m):
    space = get_space('s3', m)
    archs = [sample(space, seed=0, step=step) for step in range(400)]
    assert all(space.arch(arch) == arch for arch in archs)
    groups = [[b.groups[g] for arch in archs for b in arch.blocks] for g in range(4)]
    for group in groups:
        counts = Counter(map(len, group))
        assert sorted(counts) == list(range(1, m + 1))
        assert chi_square(list(counts.values())) < LIMITS[m - 1]
        singles = Counter(kernels for kernels in group if len(kernels) == 1)
        assert chi_square([singles[k,] for k in (3, 5, 7, 9)]) < LIMITS[3]
    # Neighbouring groups agree as often as independent ones would: 1 in 4 for single kernels
    pairs = [a == b for a, b in zip(groups[0], groups[1]) if len(a) == len(b) == 1]
    assert abs(sum(pairs) / len(pairs) - 0.25) < 4 * (0.25 * 0.75 / len(pairs)) ** 0.5
