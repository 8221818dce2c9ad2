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
    keys = torch.rand((count, count - 1), generator=generator, dtype=torch.float64)
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
    parts: Array = np.eye(count)
    met: Array = np.full((count, count), np.nan)
    along = cosines.copy()
    for others in order.T:
        squares, sizes = (parts * along).sum(1), np.abs(parts).sum(1)
        # What rounding leaves of a combination that vanishes has no direction.
        valid = (squares > tolerance * sizes**2) & nonzero & nonzero[others]
        lengths = np.sqrt(np.where(valid, squares, 1.0))
        cosine = np.clip(along[rows, others] / lengths, -1.0, 1.0)
        met[rows, others] = np.where(valid, cosine, np.nan)
        steps = lengths * _multiple(cosine, targets[rows, others], tolerance)
        steps = np.where(valid, steps, 0.0)
        if steps.any():
            parts[rows, others] += steps
            along += steps[:, None] * cosines[others]
    return Corrections(parts, met)


def _multiple(cosine: Array, target: Array, tolerance: float) -> Array:
    r"""The multiple of a unit vector that raises the cosine of another one with it to a target.

    It is :math:`\sin(\theta - \theta^*) / \sin \theta^*`, with the cosines of the two angles.
    """
    sine, aim = np.sqrt(1.0 - cosine**2), np.sqrt(np.maximum(1.0 - target**2, 2 * tolerance))
    multiple: Array = np.where(cosine < target - tolerance, (target * sine - cosine * aim) / aim, 0)
    return multiple


def add_corrections(parts: Array, norms: Array, shares: Sequence[float]) -> Array:
    """Coefficients [K] of the original gradients in a weighted sum of the corrected ones."""
    sizes = norms * np.array(shares)
    zero = norms == 0.0
    return np.where(zero, shares, sizes.dot(parts) / np.where(zero, 1.0, norms))
