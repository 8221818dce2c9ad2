"""Non-negative least squares in Gramian form, the finite method behind the exact solvers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from moo_balance.errors import BalanceValueError
from moo_balance.functional._matrix import EPS, Matrix, Vector

# Measured on random Gramians up to K = 64: three rounds leave up to twice the time, twelve save
# none.
_EXCHANGES = 6


class Definite(NamedTuple):
    """A matrix that was made safely positive definite, and what that took."""

    matrix: Matrix
    ridge: float
    pivot: float


def definite(cosines: Matrix, precision: float) -> Definite:
    """Add the ridge that a matrix of cosines needs to be safely positive definite.

    The smallest ridge covers the rounding of a float64 sum of K terms. It grows only while the
    matrix, perhaps computed in a narrower dtype of relative ``precision``, still shows negative
    curvature.
    """
    count = len(cosines)
    ridge = 4 * count * EPS
    limit = max(1e-4, 64 * count * precision)
    while ridge <= limit:
        matrix = cosines.ridged(ridge)
        pivot = matrix.pivot()
        if pivot > 0.0:
            return Definite(matrix, ridge, pivot)
        ridge *= 8
    raise BalanceValueError(
        "Parameter `gramian` should be positive semidefinite. Found a matrix of cosines with "
        f"eigenvalue {float(torch.linalg.eigvalsh(cosines.tensor())[0]):.3e}. "
        "Pass the inner products of actual gradients."
    )


def nonnegative_quadratic(matrix: Matrix, vector: Vector) -> Vector:
    r"""Minimise :math:`\tfrac12 y^\top A y - b^\top y` over :math:`y \ge 0`, A positive definite.

    Lawson and Hanson's method ("Solving Least Squares Problems", 1974, chapter 23) on the normal
    equations, started not from zero but from a guess at the support. Each step adds the index with
    the most negative gradient. The gradient counts as non-negative down to the rounding error of
    its own evaluation; the caller verifies the result.
    """
    return _Problem(matrix, vector).solved()


class _Problem:
    """The problem: A of shape [K, K] with entries around one, and b of shape [K].

    The support of a solution is where it is positive; elsewhere it is zero.
    """

    def __init__(self, matrix: Matrix, vector: Vector) -> None:
        self.matrix, self.vector = matrix, vector
        self.largest = max(map(abs, vector))

    def solved(self) -> Vector:
        """The method itself."""
        solution = self._guess()
        refused: set[int] = set()
        for _ in range(10 * len(solution)):
            outside = [i for i, y in enumerate(solution) if y == 0.0 and i not in refused]
            gradient = self._gradient(solution) if outside else []
            entering = min(outside, key=gradient.__getitem__, default=-1)
            if entering < 0 or gradient[entering] >= -self._rounding(solution):
                break
            places = [i for i, y in enumerate(solution) if y > 0.0 or i == entering]
            target = self.matrix.solution(self.vector, places)
            # By theory the entering variable becomes positive. Where round-off says otherwise,
            # taking it would cycle.
            if target[entering] <= 0.0:
                refused.add(entering)
            else:
                solution = self._walk(solution, target, places)
                refused.clear()
        return solution

    def _gradient(self, solution: Vector) -> Vector:
        along = self.matrix.times(solution)
        return [a - b for a, b in zip(along, self.vector, strict=True)]

    def _rounding(self, solution: Vector) -> float:
        """Bound on the rounding error of one entry of the gradient."""
        return 4 * len(solution) * EPS * (sum(map(abs, solution)) + self.largest)

    def _guess(self) -> Vector:
        """The unconstrained minimiser on a support where it is positive; often the optimal one.

        A few rounds exchange every index that violates its condition at once (block principal
        pivoting: Júdice and Pires, Computers & Operations Research 21, 1994), which may cycle;
        later rounds only drop, so they end.
        """
        places = list(range(len(self.vector)))
        for rounds in itertools.count():
            solution = self.matrix.solution(self.vector, places)
            better = [i for i in places if solution[i] > 0.0]
            if rounds < _EXCHANGES and len(places) < len(solution):
                better = self._exchanged(solution, better, places)
            if better == places:
                break
            places = better
        return solution

    def _exchanged(self, solution: Vector, kept: list[int], places: list[int]) -> list[int]:
        """Those to keep, and those outside whose gradient is negative."""
        gradient, bound = self._gradient(solution), -self._rounding(solution)
        outside = set(range(len(solution))).difference(places)
        return sorted([*kept, *(i for i in outside if gradient[i] < bound)])

    def _walk(self, solution: Vector, target: Vector, places: list[int]) -> Vector:
        """Go from a feasible ``solution`` towards ``target``; drop what reaches zero on the way."""
        while falling := [i for i in places if target[i] <= 0.0]:
            ratios = {i: solution[i] / (solution[i] - target[i] or 1.0) for i in falling}
            first = min(falling, key=ratios.__getitem__)
            reach = min(max(ratios[first], 0.0), 1.0)
            moved = [y + reach * (t - y) for y, t in zip(solution, target, strict=True)]
            places = [i for i in places if i != first and (target[i] > 0.0 or moved[i] > 0.0)]
            solution = [0.0] * len(moved)
            for i in places:
                solution[i] = max(moved[i], 0.0)
            target = self.matrix.solution(self.vector, places)
        return target
