"""Non-negative least squares in Gramian form, the finite method behind the exact solvers.

Everything here runs on the CPU in float64, where K is small and a look at a value costs nothing.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional.gramian import regularize

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
    support, solution = _guess(matrix, vector)
    refused = torch.zeros_like(support)
    for _ in range(10 * len(vector)):
        gradient = matrix @ solution - vector
        entering = int(gradient.masked_fill(support | refused, torch.inf).argmin())
        settled = bool(support[entering] | refused[entering])
        if settled or bool(gradient[entering] >= -_rounding(solution, vector)):
            break
        enlarged = support.clone()
        enlarged[entering] = True
        target = _solve_on(enlarged, matrix, vector)
        # By theory the entering variable becomes positive. Where round-off says otherwise, taking
        # it would cycle.
        refused[entering] = target[entering] <= 0
        if not refused[entering]:
            support, solution = _walk(matrix, vector, enlarged, solution, target)
            refused.zero_()
    return solution


def _rounding(solution: Tensor, vector: Tensor) -> Tensor:
    """Bound on the rounding error of one entry of the gradient, for entries of A around one."""
    return 4 * len(vector) * _EPS * (solution.abs().sum() + vector.abs().amax())


def _solve_on(support: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    """Unconstrained minimiser with the entries outside ``support`` held at zero."""
    block = torch.where(
        support[:, None] & support, matrix, torch.eye(len(vector), dtype=matrix.dtype)
    )
    factor = torch.linalg.cholesky_ex(block).L
    return torch.cholesky_solve((vector * support)[:, None], factor)[:, 0]


def _guess(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """A support on which the unconstrained minimiser is positive; often already the optimal one.

    A few rounds exchange every index that violates its condition at once (block principal pivoting:
    Júdice and Pires, Computers & Operations Research 21, 1994), which may cycle; later rounds only
    drop, so they end.
    """
    support = torch.ones_like(vector, dtype=torch.bool)
    for rounds in itertools.count():
        solution = _solve_on(support, matrix, vector)
        better = support & (solution > 0)
        if rounds < _EXCHANGES:
            gradient = matrix @ solution - vector
            better |= ~support & (gradient < -_rounding(solution, vector))
        if torch.equal(better, support):
            break
        support = better
    return support, solution


def _walk(
    matrix: Tensor, vector: Tensor, support: Tensor, solution: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Go from a feasible ``solution`` towards ``target``; drop what reaches zero on the way."""
    while True:
        falling = support & (target <= 0)
        if not bool(falling.any()):
            return support, target
        reach = (solution / (solution - target)).masked_fill(~falling, torch.inf)
        first = int(reach.argmin())
        solution = solution + reach[first].clamp(0.0, 1.0) * (target - solution)
        support = support & ~(falling & (solution <= 0))
        support[first] = False
        solution = solution.clamp(min=0.0) * support
        target = _solve_on(support, matrix, vector)
