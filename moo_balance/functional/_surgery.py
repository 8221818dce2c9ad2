"""The projections of PCGrad and GradVac, in cosines, for all gradients at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moo_balance.functional._directions import Array, Directions
from moo_balance.functional.gramian import equality_tolerance

Order = npt.NDArray[np.int64]
"""Which gradients each one meets, one after another, shape [K, K - 1]."""


class Corrections(NamedTuple):
    """Corrected gradients, and the cosines that were met.

    Row i of ``parts`` [K, K] has the coefficients of the corrected gradient i in unit gradients,
    relative to its own norm. ``cosines`` [K, K] are those between gradient i, as corrected so far,
    and the original gradient j; NaN where one of the two was zero, and on the diagonal.
    """

    parts: Array
    cosines: Array


def draw_order(count: int, generator: torch.Generator) -> Order:
    """For each gradient, all others in a random order."""
    keys = torch.rand((count, count - 1), generator=generator, dtype=torch.float64, device="cpu")
    drawn: Order = keys.numpy().argsort(1)
    return drawn + (drawn >= np.arange(count)[:, None])


def project_conflicts(cosines: Array, order: Order) -> Array:
    """Remove from each gradient its components along those that it opposes.

    All gradients take their first projection, then their second, and so on. A projection removes
    the component along an original gradient.

    Returns:
        ``parts`` of :class:`Corrections`.
    """
    rows = np.arange(len(cosines))
    parts: Array = np.eye(len(cosines))
    along = cosines.copy()
    for others in order.T:
        opposed = np.minimum(along[rows, others], 0.0)
        if opposed.any():
            parts[rows, others] -= opposed
            along -= opposed[:, None] * cosines[others]
    return parts


def raise_cosines(
    gradients: Directions, targets: Array, order: Order, precision: float
) -> Corrections:
    """Turn each gradient towards those with which its cosine is below a target.

    Args:
        gradients: K of them.
        targets: Cosines, shape [K, K].
        order: As for :func:`project_conflicts`.
        precision: Relative rounding unit of the inner products.
    """
    cosines, count = gradients.cosines, len(gradients.norms)
    tolerance = equality_tolerance(precision)
    rows, nonzero = np.arange(count), gradients.norms > 0.0
    goals = targets[rows, order.T]  # visit by visit, as all below
    aims = np.sqrt(np.maximum(1.0 - goals**2, 2 * tolerance))
    met: Array = np.empty_like(goals)
    parts, along, sizes = np.eye(count), cosines.copy(), np.ones(count)
    for visit, others in enumerate(order.T):
        squares = np.einsum("ij,ij->i", parts, along)
        # What rounding leaves of a combination that vanishes has no direction.
        valid = (squares > tolerance * sizes**2) & nonzero & nonzero[others]
        lengths = np.sqrt(np.where(valid, squares, 1.0))
        cosine = np.minimum(np.maximum(along[rows, others] / lengths, -1.0), 1.0)
        met[visit] = np.where(valid, cosine, np.nan)
        low = valid & (cosine < goals[visit] - tolerance)
        if low.any():
            # The sine of the difference of the two angles, by the sine of the target.
            turn = goals[visit] / aims[visit] * np.sqrt(1.0 - cosine**2) - cosine
            steps = np.where(low, lengths * turn, 0.0)
            parts[rows, others] += steps
            along += steps[:, None] * cosines[others]
            sizes += np.abs(steps)
    ordered: Array = np.full((count, count), np.nan)
    ordered[rows, order.T] = met
    return Corrections(parts, ordered)


def add_corrections(parts: Array, norms: Array, shares: Sequence[float]) -> Array:
    """Coefficients [K] of the original gradients in a weighted sum of the corrected ones."""
    sizes = norms * np.array(shares)
    zero = norms == 0.0
    return np.where(zero, shares, sizes.dot(parts) / np.where(zero, 1.0, norms))
