"""The shortest of all coefficients that give the same direction."""

from __future__ import annotations

import numpy as np

from moo_balance.functional._directions import Array, Mask
from moo_balance.functional._nnls import EPS, nonnegative_quadratic

_DAMPING = 1e-5
_ROUNDS = 30


def least_norm(lengths: Array, cosines: Array, may: Mask, precision: float) -> Array:
    r"""The least :math:`\lVert y \rVert` with :math:`y \ge 0` and the direction of `lengths`.

    It is unique, so that the order of gradients does not matter where some depend on others. Damped
    steps on the projection onto the span reach it, each closer by the damping where no multiple
    becomes zero, however small the other eigenvalues are.

    Args:
        lengths: Non-negative multiples of unit gradients, shape [K].
        cosines: Their inner products, shape [K, K].
        may: Which of them may have a multiple, shape [K]; those that have one do.
        precision: Relative rounding unit of them.
    """
    chosen = may.nonzero()[0]
    count, total = len(chosen), float(lengths.max())
    values, vectors = np.linalg.eigh(cosines[np.ix_(chosen, chosen)])
    independent = values > 16 * count * (precision + 4 * EPS)
    if independent.all() or total == 0.0:
        return lengths
    span = vectors[:, independent]
    target = span.dot(lengths[chosen].dot(span)) / total
    matrix = span.dot(span.T) + _DAMPING * np.eye(count)
    found: Array = np.zeros(count)
    for _ in range(_ROUNDS):
        before, found = found, nonnegative_quadratic(matrix, target + _DAMPING * found)
        if np.abs(found - before).max() <= 1e-10:
            break
    shortest: Array = np.zeros(len(lengths))
    shortest[chosen] = found * total
    return shortest
