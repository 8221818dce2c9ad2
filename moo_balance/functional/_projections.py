"""Equal projections on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moo_balance.functional._directions import Array, directions
from moo_balance.functional.equal_projections import RANK


def coefficients_of_projections(
    gramian: Tensor, targets: Sequence[float] | None, precision: float, to_sum: bool
) -> Tensor:
    """Coefficients of the direction with these projections on the unit gradients.

    Args:
        gramian: Inner products, shape [K, K].
        targets: The projections, up to a common factor, shape [K]; None for ones.
        precision: Relative rounding unit of the Gramian's entries.
        to_sum: The length of IMTL-G instead of ConFIG's.
    """
    _, norms, cosines = directions(gramian)
    wanted: Array = np.ones(len(norms)) if targets is None else np.array(targets)
    present = norms > 0.0
    coefficients: Array = np.zeros(len(norms))
    if present.any():
        chosen = present.nonzero()[0]
        cosines = cosines.take(chosen, 0).take(chosen, 1)
        solution, reached = _solve(cosines, wanted[chosen], precision)
        scale = _scale_to_sum if to_sum else _scale_to_projections
        coefficients[chosen] = scale(solution, reached, norms[chosen])
    return torch.from_numpy(coefficients)


def _solve(cosines: Array, wanted: Array, precision: float) -> tuple[Array, Array]:
    """The least-squares solution y of C y = p of least norm, and what C y is."""
    count = len(wanted)
    values, vectors = np.linalg.eigh(cosines)
    vectors = vectors[:, values > RANK * count * precision * values[-1]]
    values = values[-vectors.shape[1] :]
    parts = wanted.dot(vectors)
    # Nothing but rounding is left of a direction that gives no projection.
    if parts.dot(parts) <= count * precision * wanted.dot(wanted):
        return wanted, wanted
    return vectors.dot(parts / values), vectors.dot(parts)


# All products are relative, so that none overflows.


def _scale_to_sum(solution: Array, reached: Array, norms: Array) -> Array:
    """Coefficients that sum to 1, or to less where that direction is too long."""
    shortest, longest = float(norms.min()), float(norms.max())
    scaled: Array = solution * (shortest / norms)
    length = math.sqrt(float(solution.dot(reached)))
    scaled /= max(float(scaled.sum()), length * (shortest / longest))
    return scaled


def _scale_to_projections(solution: Array, reached: Array, norms: Array) -> Array:
    """Coefficients of the direction that is as long as the projections on it sum to."""
    size = float(norms.dot(reached)) / float(solution.dot(reached))
    coefficients: Array = solution * (size / norms)
    return coefficients
