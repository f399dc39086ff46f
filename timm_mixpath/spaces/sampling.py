"""Stateless sampling: the arch of a step is a function of (space, seed, step).

Every rank of a distributed run computes the same arch without talking to the others, although timm's train.py seeds
each rank's global generators differently, and a resumed run goes on with the sequence it would have had.
"""

import random
from collections.abc import Callable

from .space import Space

__all__ = ['STRATEGIES', 'check_strategy', 'sample', 'shuffled']


STRATEGIES = ('paths', 'uniform', 'fair')


def sample(space: Space, *, seed: int, step: int, strategy: str = 'paths') -> str:
    """Sample an arch for a step of supernet training.

    Strategies:

    - `'paths'`: as MixPath's released code does. Wherever paths are summed their number is uniform in 1..m, and then
      that many are drawn uniformly without replacement: uniform over the number of paths, not over combinations.
    - `'uniform'`: all archs are equally likely (single-path one-shot, arXiv 1904.00420).
    - `'fair'`: in every s steps each entry of the vector, of s values, takes each of its values once, in a random
      order (the strict fairness of FairNAS, arXiv 1907.01845, with one optimizer step per arch).

    Args:
        space: Space to sample from.
        seed: Seed of the sequence.
        step: Position in the sequence, from 0.
        strategy: One of the above.

    Returns:
        The arch, the same on every machine and Python version for the same arguments.

    Raises:
        ValueError: Unknown strategy.
    """
    check_strategy(strategy)
    if strategy == 'fair':
        vector: list[int] = []
        for index, size in enumerate(space.gene_sizes):
            draw = random.Random(f'{seed}/{step // size}/{index}').random
            vector.append(shuffled(range(size), draw)[step % size])
        return space.decode(vector)
    # Text seeds go through SHA-512, so neighbouring steps are unrelated. Only random() is promised to give the same
    # numbers in every Python version, hence no randrange() and no sample().
    draw = random.Random(f'{seed}/{step}').random
    if strategy == 'uniform':
        return space.sample_uniform(draw)
    return space.sample(draw)


def check_strategy(strategy: str) -> str:
    """Return the name of a strategy.

    Raises:
        ValueError: There is none of that name.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f'unknown sampling {strategy!r}, known are {", ".join(STRATEGIES)}')
    return strategy


def shuffled(values: range, draw: Callable[[], float]) -> list[int]:
    """Return the values in a random order."""
    rest = list(values)
    return [rest.pop(int(draw() * len(rest))) for _ in values]
