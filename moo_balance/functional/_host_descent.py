"""The same steps as in ``_projected_descent.py`` for any number of weights, with NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moo_balance.functional._directions import Array


def descend(
    products: Array,
    offset: Array,
    weights: Array,
    lr: float,
    ridge: float,
    momentum: float,
    iterations: int,
) -> Array:
    """The weights after the steps, in memory of their own."""
    velocity, ranks = np.zeros_like(weights), np.arange(1, len(weights) + 1)
    for _ in range(iterations):
        velocity = momentum * velocity + products @ weights + ridge * weights + offset
        weights = _project(weights - lr * velocity, ranks)
    return weights


def _project(vector: Array, ranks: npt.NDArray[np.int_]) -> Array:
    """The nearest point of the simplex, as ``project_simplex`` finds it."""
    shifted: Array = vector - vector.max()
    descending = np.sort(shifted)[::-1]
    excess = np.cumsum(descending) - 1.0
    kept = max(int((descending * ranks > excess).sum()), 1)
    result: Array = np.maximum(shifted - excess[kept - 1] / kept, 0.0)
    return result
