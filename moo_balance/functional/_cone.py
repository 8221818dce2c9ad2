"""Projection onto the dual cone on NumPy arrays, of several directions together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moo_balance.functional._directions import Array, Directions, directions
from moo_balance.functional._nnls import EPS, check_residual, make_definite, nonnegative_quadratics

# Below this pivot solutions have lost more digits than a ridge of the size of _RIDGE costs.
_SINGULAR = 1e-7
_RIDGE = EPS**0.5
_ROUNDS = 8


def addition_into_dual_cone(gramian: Tensor, coefficients: Tensor, precision: float) -> Tensor:
    """What has to be added to coefficients to take directions into the dual cone, verified.

    Args:
        gramian: Inner products, shape [K, K].
        coefficients: Of the directions, shape [N, K], finite, float64 on the CPU.
        precision: Relative rounding unit of the Gramian's entries.
    """
    return torch.from_numpy(_addition(directions(gramian), coefficients.numpy(), precision))


def _addition(gradients: Directions, start: Array, precision: float) -> Array:
    _, norms, cosines = gradients
    lengths = start * norms
    scales = np.abs(lengths).max(axis=1, keepdims=True)
    scales[scales == 0.0] = 1.0
    lengths = lengths / scales
    matrix, ridge, pivot = make_definite(cosines, precision)
    vectors = -lengths.dot(cosines)
    if pivot > _SINGULAR:
        added = nonnegative_quadratics(matrix, vectors)
    else:
        added = _solve_singular(cosines, vectors, max(ridge, _RIDGE))
    _verify(cosines, lengths, added, 1e-8 + 4 * ridge)
    # A zero gradient keeps its coefficient.
    added *= scales
    added /= np.where(norms == 0.0, np.inf, norms)
    return added


def _solve_singular(cosines: Array, vectors: Array, ridge: float) -> Array:
    """Solutions for each vector that rounding does not choose among all that there are.

    A ridge of the square root of the rounding unit makes the solution unique. The proximal point
    method (Rockafellar, SIAM Journal on Control and Optimization 14, 1976) then removes its effect:
    each round regularizes towards the solution of the round before.
    """
    matrix = cosines + ridge * np.eye(len(cosines))
    solutions = nonnegative_quadratics(matrix, vectors)
    for _ in range(_ROUNDS):
        before = solutions
        solutions = nonnegative_quadratics(matrix, vectors + ridge * before, before > 0.0)
        # What is left of the ridge's effect on the products of gradients and directions.
        if ridge * np.abs(solutions - before).max() <= 1e-11:
            break
    return solutions


def _verify(cosines: Array, lengths: Array, added: Array, tolerance: float) -> None:
    """Raise unless no gradient conflicts and each added one is orthogonal to the direction."""
    totals = np.abs(lengths).sum(axis=1, keepdims=True) + added.sum(axis=1, keepdims=True)
    totals[totals == 0.0] = 1.0
    along = ((lengths + added) / totals).dot(cosines)
    residual = np.maximum(-along, added / totals * np.abs(along)).max()
    what = "The dual-cone projection should satisfy its conditions"
    check_residual(what, float(residual), tolerance, lengths.shape[1])
