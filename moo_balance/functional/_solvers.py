"""The exact solvers on NumPy arrays, imported with the first Gramian that needs them.

Within a training step they run once, on the host. There NumPy's operations on K numbers take a
fraction of the time of PyTorch's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._directions import Array, Directions, directions
from moo_balance.functional._nnls import check_residual, make_definite, nonnegative_quadratic
from moo_balance.functional.gramian import equality_tolerance, share_between_equals

_TINY = 1e-290


def shortest_combination(
    gramian: Tensor, scales: Tensor | None, precision: float, share_zeros: bool = True
) -> Tensor:
    """Weights of the shortest convex combination of three gradients or more, verified.

    Args:
        gramian: Inner products, shape [K, K].
        scales: What the gradients are divided by first, shape [K]; None for ones.
        precision: Relative rounding unit of its entries.
        share_zeros: Give all the weight to zero gradients, if there are any; otherwise none.
    """
    gradients = directions(gramian, scales)
    others = gradients.norms > 0.0
    if share_zeros or others.all() or not others.any():
        return torch.from_numpy(_min_norm_weights(gradients, precision))
    squares, norms, cosines = gradients
    rest = Directions(squares[others], norms[others], cosines[others][:, others])
    weights = np.zeros(len(norms))
    weights[others] = _min_norm_weights(rest, precision)
    return torch.from_numpy(weights)


def _min_norm_weights(gradients: Directions, precision: float) -> Array:
    squares, norms, cosines = gradients
    shortest = norms.min()
    if squares.min() < 0.0:
        raise BalanceValueError(
            "Parameter `gramian` should have squared norms on its diagonal. "
            f"Found {squares.min():.3e}. Pass the inner products of actual gradients."
        )
    if shortest == 0.0:
        zero: Array = np.where(norms == 0.0, 1.0, 0.0)
        return zero / float(zero.sum())
    inverse = shortest / norms
    matrix, ridge, pivot = make_definite(cosines, precision)
    lengths = nonnegative_quadratic(matrix, inverse)
    scaled: Array = lengths * inverse
    total = float(sum(scaled.tolist()))
    weights: Array = scaled / total
    # Of two equal gradients the second has a pivot of this size.
    if pivot <= 4 * (equality_tolerance(precision) + ridge):
        weights = _share(weights, gradients, precision)
    # The cosines, symmetric and in range, are the problem that was solved; the Gramian may differ
    # by its own rounding.
    # A weight next to the least that a float64 holds has lost its digits.
    holds = inverse > _TINY
    shares = np.where(holds, weights / np.where(holds, inverse, 1.0), lengths / total)
    _verify_min_norm(cosines, inverse, shares, 1e-9 + 4 * ridge + 32 * precision)
    return weights


def _share(weights: Array, gradients: Directions, precision: float) -> Array:
    """:func:`share_between_equals` for arrays."""
    tensors = [torch.from_numpy(a) for a in (weights, gradients.cosines, gradients.norms)]
    shared: Array = share_between_equals(tensors[0], tensors[1], tensors[2], precision).numpy()
    return shared


def _verify_min_norm(cosines: Array, inverse: Array, shares: Array, tolerance: float) -> None:
    """Raise unless the optimality conditions hold."""
    residual = _min_norm_residual(cosines, inverse, shares)
    what = "Minimum-norm weights should satisfy their optimality conditions"
    check_residual(what, residual, tolerance, len(shares))


def _min_norm_residual(cosines: Array, inverse: Array, shares: Array) -> float:
    """``kkt_residual`` of gradients with these ``inverse`` norms, in any common unit.

    A share is the weight of a gradient times its norm.
    """
    length = shares.sum()
    along = cosines.dot(shares)
    missing = shares.dot(along) * inverse - along
    worst = np.maximum(missing, shares / length * np.abs(missing)).max()
    return float(worst / length)
