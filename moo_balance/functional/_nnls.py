"""Non-negative least squares in Gramian form, the finite method of the exact solvers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional._directions import Array, Mask

EPS = float(np.finfo(np.float64).eps)

# Measured on random Gramians up to K = 64: three rounds leave up to twice the time, twelve save
# none.
_EXCHANGES = 6


class Definite(NamedTuple):
    """A matrix made safely positive definite, the ridge added, and the smallest pivot."""

    matrix: Array
    ridge: float
    pivot: float


def check_residual(
    what: str,
    residual: float,
    tolerance: float,
    count: int,
    advice: str = "Compute the Gramian in float64.",
) -> None:
    """Refuse a solution for `count` gradients that misses its conditions."""
    if not residual <= tolerance:
        raise ConvergenceError(
            f"{what} to {tolerance:.1e}. Found a residual of {residual:.3e} for {count} gradients. "
            f"{advice}"
        )


def make_definite(cosines: Array, precision: float) -> Definite:
    """Add the ridge that a matrix of cosines needs to be safely positive definite.

    The smallest ridge covers the rounding of a float64 sum of K terms. It grows only while the
    matrix, perhaps computed in a narrower dtype of relative ``precision``, still shows negative
    curvature.
    """
    count = len(cosines)
    ridge = 4 * count * EPS
    limit = max(1e-4, 64 * count * precision)
    while ridge <= limit:
        matrix = cosines.copy()
        matrix.ravel()[:: count + 1] += ridge
        pivot = _smallest_pivot(matrix)
        if pivot > 0.0:
            return Definite(matrix, ridge, pivot)
        ridge *= 8
    raise BalanceValueError(
        "Parameter `gramian` should be positive semidefinite. Found a matrix of cosines with "
        f"eigenvalue {float(np.linalg.eigvalsh(cosines)[0]):.3e}. "
        "Pass the inner products of actual gradients."
    )


def _smallest_pivot(matrix: Array) -> float:
    """The smallest pivot of the Cholesky factorisation; 0 if the matrix is not definite."""
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return 0.0
    return float(factor.diagonal().min()) ** 2


def nonnegative_quadratic(matrix: Array, vector: Array) -> Array:
    r"""Minimise :math:`\tfrac12 y^\top A y - b^\top y` over :math:`y \ge 0`, A positive definite.

    Lawson and Hanson's method ("Solving Least Squares Problems", 1974, chapter 23) on the normal
    equations, started not from zero but from a guess of the support, that is, of where the solution
    is positive. Each step adds the index with the most negative gradient. The gradient counts as
    non-negative down to the rounding error of its own evaluation; the caller verifies the result.

    Args:
        matrix: A, shape [K, K], with entries around one.
        vector: b, shape [K].
    """
    solution = _guess(matrix, vector)
    refused = np.zeros(len(vector), bool)
    for _ in range(10 * len(vector)):
        support = solution > 0.0
        outside = ~(support | refused)
        if not outside.any():
            break
        gradient = np.where(outside, matrix.dot(solution) - vector, 0.0)
        entering = int(gradient.argmin())
        if gradient[entering] >= -_rounding(solution, vector):
            break
        support[entering] = True
        target = _solve_on(support, matrix, vector)
        # In exact arithmetic the entering variable becomes positive. Where rounding makes it
        # negative, taking it would cycle.
        if target[entering] <= 0.0:
            refused[entering] = True
        else:
            solution = _walk(solution, target, support, matrix, vector)
            refused[:] = False
    return solution


def _guess(matrix: Array, vector: Array) -> Array:
    """The unconstrained minimiser on a support where it is positive; often the optimal one.

    A few rounds exchange every index that violates its condition at once (block principal
    pivoting: Júdice and Pires, Computers & Operations Research 21, 1994), which may cycle; later
    rounds only remove indices, so they end.
    """
    support = np.ones(len(vector), bool)
    for rounds in itertools.count():
        solution = _solve_on(support, matrix, vector)
        better = solution > 0.0
        if rounds < _EXCHANGES and not support.all():
            gradient = matrix.dot(solution) - vector
            better |= ~support & (gradient < -_rounding(solution, vector))
        if (better == support).all():
            break
        support = better
    return solution


def _walk(solution: Array, target: Array, support: Mask, matrix: Array, vector: Array) -> Array:
    """Go from a feasible ``solution`` towards ``target``; remove what reaches zero on the way."""
    while (falling := support & (target <= 0.0)).any():
        moved = solution - target
        ratios = np.where(falling, solution / np.where(moved == 0.0, 1.0, moved), np.inf)
        first = int(ratios.argmin())
        reach = min(max(float(ratios[first]), 0.0), 1.0)
        moved = solution + reach * (target - solution)
        support = support & ((target > 0.0) | (moved > 0.0))
        support[first] = False
        solution = np.where(support, np.maximum(moved, 0.0), 0.0)
        target = _solve_on(support, matrix, vector)
    return target


def _solve_on(support: Mask, matrix: Array, vector: Array) -> Array:
    """Solve A y = b on the rows and columns of the support, with y zero elsewhere."""
    solution: Array = np.zeros(len(vector))
    if support.all():
        solution[:] = np.linalg.solve(matrix, vector)
    else:
        chosen = support.nonzero()[0]
        block = matrix.take(chosen, 0).take(chosen, 1)
        solution[chosen] = np.linalg.solve(block, vector[chosen])
    return solution


def _rounding(solution: Array, vector: Array) -> float:
    """Bound on the rounding error of one entry of the gradient."""
    size = float(np.abs(solution).sum()) + float(np.abs(vector).max())
    return 4 * len(solution) * EPS * size


# ------------------------------------------------------------ many right-hand sides


def nonnegative_quadratics(matrix: Array, vectors: Array, supports: Mask | None = None) -> Array:
    """:func:`nonnegative_quadratic` for each row of ``vectors``, shape [N, K].

    The exchanges of :func:`_guess` are made for all rows together, in one call of the linear
    solver. What they leave unsolved, which is rare, goes to the finite method row by row.

    Args:
        matrix: A, shape [K, K].
        vectors: The vectors b, shape [N, K].
        supports: Where solutions are expected to be positive, shape [N, K]; None where the
            objective falls from zero on.
    """
    solutions: Array = np.zeros(vectors.shape)
    support = vectors > 0.0 if supports is None else supports
    rows = np.arange(len(vectors))  # those that are not solved yet
    for _ in range(_ROUNDS):
        target = vectors[rows]
        trial = _solve_on_each(support, matrix, target)
        slack = trial.dot(matrix) - target + _roundings(trial, target)
        better = (support & (trial > 0.0)) | (~support & (slack < 0.0))
        solved = (better == support).all(axis=1)
        solutions[rows[solved]] = trial[solved]
        rows, support = rows[~solved], better[~solved]
        if not len(rows):
            return solutions
    for row in rows:
        solutions[row] = nonnegative_quadratic(matrix, vectors[row])
    return solutions


# Measured on random Gramians up to K = 64.
_ROUNDS = 12


def _solve_on_each(supports: Mask, matrix: Array, vectors: Array) -> Array:
    """Solve A y = b on each support, with y zero elsewhere.

    Supports of different sizes become systems of one size: the indices of each come first, and the
    identity stands for what lies outside.
    """
    size = max(int(supports.sum(axis=1).max()), 1)
    chosen = np.argsort(~supports, axis=1, kind="stable")[:, :size]
    inside = np.take_along_axis(supports, chosen, axis=1)
    systems = matrix[chosen[:, :, None], chosen[:, None, :]]
    systems *= inside[:, :, None] & inside[:, None, :]
    diagonal = np.arange(size)
    systems[:, diagonal, diagonal] += ~inside
    targets = np.where(inside, np.take_along_axis(vectors, chosen, axis=1), 0.0)
    solutions: Array = np.zeros(vectors.shape)
    np.put_along_axis(solutions, chosen, np.linalg.solve(systems, targets[..., None])[..., 0], 1)
    return solutions


def _roundings(solutions: Array, vectors: Array) -> Array:
    """:func:`_rounding` for each row, shape [N, 1]."""
    sizes = np.abs(solutions).sum(axis=1) + np.abs(vectors).max(axis=1)
    rounding: Array = 4 * solutions.shape[1] * EPS * sizes[:, None]
    return rounding
