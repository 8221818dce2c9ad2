"""The balance transformation of Aligned-MTL, on NumPy arrays."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from moo_balance.functional._directions import Array, Directions

Scale: TypeAlias = Literal["min", "median", "rmse"]

RANK = 4.0
"""An eigenvalue counts if it is above this many roundings, times K, of the largest one.

The official code takes 1. Rounding was seen to make 0.8 of an eigenvalue of zero, in Gramians of
dependent gradients, from ten to a thousand parameters, in both dtypes."""


def align(gradients: Directions, scale: Scale, precision: float) -> Array:
    r"""The symmetric matrix :math:`B`, shape [K, K], that makes :math:`B G B` a multiple of 1.

    It is a function of the matrix :math:`G` alone, hence the same whichever eigenvectors of equal
    eigenvalues are computed.
    """
    lengths = gradients.norms / max(float(gradients.norms.max()), np.finfo(np.float64).tiny)
    values, vectors = np.linalg.eigh(gradients.cosines * lengths * lengths[:, None])
    kept = values > RANK * len(values) * precision * values[-1]
    if not kept.any() or not lengths.any():
        return np.eye(len(values))
    values, vectors = values[kept], vectors[:, kept]
    balanced: Array = (vectors * np.sqrt(_common(values, scale) / values)).dot(vectors.T)
    return balanced


def _common(values: Array, scale: Scale) -> float:
    """What all eigenvalues, which ascend, are set to."""
    if scale == "rmse":
        return float(values.mean())
    return float(values[0 if scale == "min" else (len(values) - 1) // 2])
