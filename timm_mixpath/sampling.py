"""Stateless sampling: the arch of a step is a function of (space, seed, step).

Every rank of a distributed run computes the same arch without talking to the others, although timm's train.py seeds
each rank's global generators differently, and a resumed run goes on with the sequence it would have had.
"""

import random

from .arch import Arch, BlockChoice, cached_choice
from .space import SearchSpace

__all__ = ['sample']


def sample(space: SearchSpace, *, seed: int, step: int) -> Arch:
    """Sample an arch as MixPath's supernet training does.

    Per block the expansion is uniform, and in every channel group the number of paths is uniform in 1..m and then
    that many kernels are drawn uniformly without replacement: uniform over the number of paths, not over combinations
    (MixPath, released code).

    Args:
        space: Space to sample from.
        seed: Seed of the sequence.
        step: Position in the sequence, from 0.

    Returns:
        The arch, the same on every machine and Python version for the same arguments.
    """
    # Text seeds go through SHA-512, so neighbouring steps are unrelated. Only random() is promised to give the same
    # numbers in every Python version, hence no randrange() and no sample().
    draw = random.Random(f'{seed}/{step}').random

    blocks: list[BlockChoice] = []
    for spec in space.blocks:
        expand_ratio = spec.expand_ratios[int(draw() * len(spec.expand_ratios))]
        groups: list[tuple[int, ...]] = []
        for _ in range(spec.num_groups):
            num_paths = 1 + int(draw() * space.max_paths)
            kernel_sizes = list(spec.kernel_sizes)
            paths = [kernel_sizes.pop(int(draw() * len(kernel_sizes))) for _ in range(num_paths)]
            groups.append(tuple(sorted(paths)))
        blocks.append(cached_choice(tuple(groups), expand_ratio))
    return Arch.from_blocks(blocks)
