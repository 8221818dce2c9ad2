"""Symmetric matrices on the host, few rows or many.

Within a training step the exact solvers run once, after a backward pass that left nothing of them
in the processor's caches. What they cost there is less the arithmetic than how much code it passes
through. So a few rows are Python floats, whose code is always warm, and only many are NumPy's.
"""

from __future__ import annotations

import math
import sys
from operator import mul
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[float]
Array: TypeAlias = Any
"""A NumPy array. NumPy is imported where it is used: the package is imported with torch alone."""

EPS = sys.float_info.epsilon
# Measured after a backward pass: floats take a third of the time of NumPy's operations for K = 6
# and half of it for K = 10. Beyond, hard problems take them longer.
FEW = 10


class Matrix(Protocol):
    """A symmetric matrix [K, K] with a diagonal around one, and what the exact solvers ask of it.

    Vectors are lists of K floats, ``places`` indices in ascending order.
    """

    def __len__(self) -> int:
        """K."""

    def ridged(self, ridge: float) -> Matrix:
        """The matrix with ``ridge`` added to its diagonal."""

    def pivot(self) -> float:
        """The smallest pivot of the Cholesky factorisation; zero unless it is positive definite."""

    def times(self, vector: Vector) -> Vector:
        """The product with a vector."""

    def solution(self, vector: Vector, places: list[int]) -> Vector:
        """What the rows at ``places`` turn into ``vector`` there, with zeros elsewhere."""

    def tensor(self) -> Tensor:
        """The entries, in float64."""


class Few:
    """Rows of Python floats."""

    def __init__(self, rows: list[Vector]) -> None:
        self.rows = rows
        self._factor: list[Vector] = []

    def __len__(self) -> int:
        return len(self.rows)

    def ridged(self, ridge: float) -> Few:
        rows = [row.copy() for row in self.rows]
        for i, row in enumerate(rows):
            row[i] += ridge
        return Few(rows)

    def pivot(self) -> float:
        self._factor, least = _cholesky(self.rows)
        return least

    def times(self, vector: Vector) -> Vector:
        return [sum(map(mul, row, vector)) for row in self.rows]

    def solution(self, vector: Vector, places: list[int]) -> Vector:
        factor = self._factor
        if len(places) < len(self.rows) or not factor:
            factor, _ = _cholesky([[self.rows[i][j] for j in places] for i in places])
        rest = _forward(factor, [vector[i] for i in places])
        found = [0.0] * len(vector)
        for place, row in zip(reversed(places), reversed(factor), strict=True):
            found[place] = value = rest.pop() / row[-1]
            rest = [r - value * entry for r, entry in zip(rest, row, strict=False)]
        return found

    def tensor(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.float64)


def _cholesky(rows: list[Vector]) -> tuple[list[Vector], float]:
    """The lower factor, row by row; and the smallest pivot, zero unless all are positive."""
    factor: list[Vector] = []
    least = math.inf
    for i, row in enumerate(rows):
        entries = _forward(factor, row)
        pivot = row[i] - sum(map(mul, entries, entries))
        if pivot < least:
            least = max(pivot, 0.0)
        # Rounding may get a part of a definite matrix here; its pivot is then what rounding makes.
        factor.append([*entries, math.sqrt(pivot if pivot > 0.0 else EPS)])
    return factor, least


def _forward(factor: list[Vector], vector: Vector) -> Vector:
    """Solve with a lower factor, for as many entries as it has rows."""
    found: Vector = []
    for row, value in zip(factor, vector, strict=False):
        found.append((value - sum(map(mul, row, found))) / row[-1])
    return found


class Many:
    """A NumPy array."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def ridged(self, ridge: float) -> Many:
        array = self.array.copy()
        array.ravel()[:: len(array) + 1] += ridge
        return Many(array)

    def pivot(self) -> float:
        import numpy as np

        try:
            factor = np.linalg.cholesky(self.array)
        except np.linalg.LinAlgError:
            return 0.0
        return float(factor.diagonal().min()) ** 2

    def times(self, vector: Vector) -> Vector:
        product: Vector = self.array.dot(vector).tolist()
        return product

    def solution(self, vector: Vector, places: list[int]) -> Vector:
        import numpy as np

        block = self.array
        if len(places) < len(vector):
            chosen = np.array(places, dtype=np.intp)
            block = block.take(chosen, 0).take(chosen, 1)
        found = [0.0] * len(vector)
        part = np.linalg.solve(block, [vector[i] for i in places])
        for place, value in zip(places, part.tolist(), strict=True):
            found[place] = value
        return found

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.array)
