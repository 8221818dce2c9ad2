"""Non-negative least squares in Gramian form, the finite method behind the exact solvers.

Everything here runs on the CPU in float64, where K is small and a look at a value costs nothing.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional.gramian import regularize

Array: TypeAlias = Any
"""A NumPy array. NumPy is imported where it is used: the package is imported with torch alone."""

_EPS = torch.finfo(torch.float64).eps
# Measured on random Gramians up to K = 64: three rounds leave up to twice the time, twelve save
# none.
_EXCHANGES = 6


def definite(cosines: Tensor, precision: float) -> tuple[Tensor, float]:
    """Make a matrix of cosines safely positive definite; also returns the ridge that this took.

    The smallest ridge covers the rounding of a float64 sum of K terms. It grows only while the
    matrix, perhaps computed in a narrower dtype of relative ``precision``, still shows negative
    curvature.
    """
    count = cosines.shape[0]
    ridge = 4 * count * _EPS
    limit = max(1e-4, 64 * count * precision)
    while ridge <= limit:
        matrix = regularize(cosines, ridge)
        if int(torch.linalg.cholesky_ex(matrix).info) == 0:
            return matrix, ridge
        ridge *= 8
    raise BalanceValueError(
        "Parameter `gramian` should be positive semidefinite. Found a matrix of cosines with "
        f"eigenvalue {float(torch.linalg.eigvalsh(cosines)[0]):.3e}. "
        "Pass the inner products of actual gradients."
    )


def nonnegative_quadratic(matrix: Tensor, vector: Tensor) -> Tensor:
    r"""Minimise :math:`\tfrac12 y^\top A y - b^\top y` over :math:`y \ge 0`, A positive definite.

    Lawson and Hanson's method ("Solving Least Squares Problems", 1974, chapter 23) on the normal
    equations, started not from zero but from a guess at the support. Each step adds the index with
    the most negative gradient. The gradient counts as non-negative down to the rounding error of
    its own evaluation; the caller verifies the result.
    """
    # In NumPy: the steps are many and tiny, and its operations start three times as fast.
    return torch.from_numpy(_Problem(matrix.numpy(), vector.numpy()).solved())


class _Problem:
    """The problem as arrays, A of shape [K, K] and b of shape [K]."""

    def __init__(self, matrix: Array, vector: Array) -> None:
        self.matrix, self.vector = matrix, vector
        self.largest = float(abs(vector).max())

    def solved(self) -> Array:
        """The method itself."""
        support, solution = self._guess()
        refused = support & False
        for _ in range(10 * len(self.vector)):
            gradient = self._gradient(solution)
            gradient[support | refused] = math.inf
            entering = int(gradient.argmin())
            if gradient[entering] >= -self._rounding(solution):
                break
            enlarged = support.copy()
            enlarged[entering] = True
            target = self._solve_on(enlarged)
            # By theory the entering variable becomes positive. Where round-off says otherwise,
            # taking it would cycle.
            if target[entering] <= 0:
                refused[entering] = True
            else:
                support, solution = self._walk(enlarged, solution, target)
                refused[:] = False
        return solution

    def _gradient(self, solution: Array) -> Array:
        gradient: Array = self.matrix @ solution
        gradient -= self.vector
        return gradient

    def _rounding(self, solution: Array) -> float:
        """Bound on the rounding error of one entry of the gradient, for entries of A around one."""
        return 4 * len(solution) * _EPS * (float(abs(solution).sum()) + self.largest)

    def _solve_on(self, support: Array) -> Array:
        """Unconstrained minimiser with the entries outside ``support`` held at zero."""
        import numpy as np

        places = support.nonzero()[0]
        solution: Array = np.zeros_like(self.vector)
        block = self.matrix[places[:, None], places]
        solution[places] = np.linalg.solve(block, self.vector[places])
        return solution

    def _guess(self) -> tuple[Array, Array]:
        """A support on which the unconstrained minimiser is positive; often the optimal one.

        A few rounds exchange every index that violates its condition at once (block principal
        pivoting: Júdice and Pires, Computers & Operations Research 21, 1994), which may cycle;
        later rounds only drop, so they end.
        """
        support = self.vector == self.vector
        for rounds in itertools.count():
            solution = self._solve_on(support)
            better = solution > 0
            if rounds < _EXCHANGES:
                better |= ~support & (self._gradient(solution) < -self._rounding(solution))
            if (better == support).all():
                break
            support = better
        return support, solution

    def _walk(self, support: Array, solution: Array, target: Array) -> tuple[Array, Array]:
        """Go from a feasible ``solution`` towards ``target``; drop what reaches zero on the way."""
        while True:
            falling = (support & (target <= 0)).nonzero()[0]
            if not len(falling):
                return support, target
            reach = solution[falling] / (solution[falling] - target[falling])
            first = int(reach.argmin())
            solution = solution + min(max(float(reach[first]), 0.0), 1.0) * (target - solution)
            support = support.copy()
            support[falling[solution[falling] <= 0]] = False
            support[falling[first]] = False
            solution = solution.clip(min=0.0) * support
            target = self._solve_on(support)
