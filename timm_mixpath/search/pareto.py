"""The Pareto front, and how crowded it is."""

from collections.abc import Sequence

import numpy as np

from ..utils.errors import needs

__all__ = ['crowding_distance', 'pareto_front', 'require_pymoo']


def pareto_front(values: np.ndarray) -> list[int]:
    """Return the indices of the rows that no other row dominates.

    A row dominates another if it is nowhere larger and somewhere smaller. Equal rows do not dominate each other.

    Args:
        values: Objectives to minimise, [num_candidates, num_objectives].
    """
    values = np.asarray(values, dtype=float)
    front: list[int] = []
    for index, row in enumerate(values):
        dominates = (values <= row).all(axis=1) & (values < row).any(axis=1)  # [num_candidates]
        if not dominates.any():
            front.append(index)
    return front


def crowding_distance(values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return NSGA-II's crowding distance with a weight per objective.

    The distance of a row is the mean over objectives, weighted as in MoGA (arXiv 1908.01314), of the gap between its
    two neighbours in that objective, relative to the range of all rows. Both ends of an objective get infinity. Of
    rows that are equal the first is taken, the others get 0.

    Args:
        values: Objectives of one front, [num_candidates, num_objectives].
        weights: Positive weight of each objective.

    Returns:
        Distances, [num_candidates]; finite ones are at most 1.
    """
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance

    unique, first = np.unique(np.asarray(values, dtype=float), axis=0, return_index=True)
    if len(unique) == 1:
        distance = np.full(1, np.inf)
    else:
        shares = np.asarray(weights, dtype=float) / np.sum(weights)
        distance = sum(share * calc_crowding_distance(unique[:, [j]]) for j, share in enumerate(shares))
    result = np.zeros(len(values))
    result[first] = distance
    return result


def require_pymoo() -> None:
    """Check that a pymoo is installed that a repeatable search can be made with.

    Raises:
        ImportError: It is not.
    """
    with needs('the search needs pymoo 0.6.1.6 or newer', 'search'):
        from pymoo.config import Config

        # pymoo 0.6.1.6 is the first whose operators draw from a random state of the run, not from numpy's global one
        from pymoo.util import default_random_state  # noqa: F401
    # pymoo prints a hint to stdout where its compiled modules are missing; nothing used here is among them
    Config.warnings['not_compiled'] = False
