"""The problem of priority-constrained descent, on NumPy arrays."""

from __future__ import annotations

import math

import numpy as np

from moo_balance.functional._directions import Array, Directions, Mask
from moo_balance.functional._least_norm import least_norm
from moo_balance.functional._nnls import make_definite, nonnegative_quadratic


def follow_primary(
    gradients: Directions, primary: int | None, sizes: Array, least: Array, precision: float
) -> Array:
    r"""Coefficients of the nearest direction to the primary gradient with enough progress.

    In unit gradients :math:`u` and relative lengths :math:`q`, it is
    :math:`d = q_1 u_1 + \sum_j x_j u_j` with the :math:`x \ge 0` of the smallest :math:`\|d\|` for
    which :math:`u_j \cdot d \ge` `least`, scaled to the length of the primary gradient. Without a
    primary one :math:`q_1 = 0`, and the length is the mean length of the others.

    Args:
        gradients: K of them.
        primary: Which one is the primary; None if there is none.
        sizes: The relative lengths q, shape [K].
        least: The least progress along each unit gradient; that of the primary is not used.
        precision: Relative rounding unit of the inner products.
    """
    norms, cosines = gradients.norms, gradients.cosines
    others = norms > 0.0
    start: Array = np.zeros(len(norms))
    if primary is not None:
        others[primary] = False
        start[primary] = sizes[primary]
    lengths = start + _multiples(cosines, others, least - cosines.dot(start), precision)
    square, total = float(lengths.dot(cosines.dot(lengths))), float(lengths.sum())
    if square <= 4 * len(norms) * precision * total**2:
        return np.zeros(len(norms))
    length = norms[primary] if primary is not None else norms[others].mean()
    # The quotient of two norms first: their product may leave the range of a float64.
    ratios: Array = length / np.where(norms > 0.0, norms, np.inf)
    return lengths / math.sqrt(square) * ratios


def _multiples(cosines: Array, others: Mask, missing: Array, precision: float) -> Array:
    """The x of :func:`follow_primary`, shape [K]; zeros if no direction has all the progress."""
    multiples: Array = np.zeros(len(others))
    chosen = others.nonzero()[0]
    if not (missing[chosen] > 0.0).any():
        return multiples
    cosines, missing = cosines[np.ix_(chosen, chosen)], missing[chosen]
    matrix, ridge, pivot = make_definite(cosines, precision)
    found = nonnegative_quadratic(matrix, missing)
    # A convex combination of them vanishes: some progress excludes some other.
    vanishes = 16 * len(chosen) * (precision + ridge)
    if found.dot(cosines.dot(found)) <= vanishes * found.sum() ** 2:
        return multiples
    if pivot <= 1e-9 + 1e4 * precision:
        found = _polish(found, cosines, matrix, missing)
        lacking = missing - cosines.dot(found)
        tolerance = 1e-9 + 4 * ridge + 32 * precision
        may = (found > 0.0) | (lacking >= -tolerance * float(found.sum() + missing.max()))
        found = least_norm(found, cosines, may, precision)
    multiples[chosen] = found
    return multiples


def _polish(found: Array, cosines: Array, matrix: Array, missing: Array) -> Array:
    """Reach the progress without what the ridge of `matrix` takes from it."""
    support = (found > 0.0).nonzero()[0]
    block = matrix[np.ix_(support, support)]
    for _ in range(2):
        rest = missing[support] - cosines[support].dot(found)
        found = found.copy()
        found[support] = np.maximum(found[support] + np.linalg.solve(block, rest), 0.0)
    return found
