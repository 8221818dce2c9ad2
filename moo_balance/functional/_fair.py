"""The equation of alpha-fairness on NumPy arrays, by a damped Newton method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moo_balance.errors import ConvergenceError
from moo_balance.functional._directions import Array, directions
from moo_balance.functional._nnls import EPS, make_definite, nonnegative_quadratic
from moo_balance.functional.fair import SHORTEST

_STEPS = 200
_LEAST = 1e-150  # as good as zero, and its square is not


def solve_fair(
    gramian: Tensor, power: float, preference: Sequence[float] | None, precision: float
) -> Tensor:
    r"""Weights with :math:`G w = (p / w)^\gamma`, verified.

    Args:
        gramian: Inner products, shape [K, K].
        power: :math:`\gamma = 1 / \alpha`.
        preference: p, shape [K]; None for ones.
        precision: Relative rounding unit of the Gramian's entries.
    """
    _, norms, cosines = directions(gramian)
    wanted = np.ones(len(norms)) if preference is None else np.array(preference)
    weights: Array = np.zeros(len(norms))
    chosen = (norms > 0.0).nonzero()[0]
    if len(chosen):
        wanted, lengths = wanted[chosen] / wanted[chosen].mean(), np.log(norms[chosen])
        matrix = _regularize(cosines.take(chosen, 0).take(chosen, 1), precision)
        fair = power * np.log(wanted) + (power - 1) * lengths
        unit = float(fair.max())
        solution = minimize_barrier(matrix, fair - unit, power)
        _verify(matrix, solution, fair - unit, power)
        logs = np.log(solution) + unit / (1 + power) - lengths
        weights[chosen] = np.exp(np.minimum(logs, 709.0))
    return torch.from_numpy(weights)


def _regularize(cosines: Array, precision: float) -> Array:
    """Add a ridge where a convex combination of the unit gradients all but vanishes."""
    matrix = make_definite(cosines, precision).matrix
    # The shortest one has the weights y / sum(y), and the squared length 1 / sum(y).
    total = float(nonnegative_quadratic(matrix, np.ones(len(matrix))).sum())
    matrix.ravel()[:: len(matrix) + 1] += max(SHORTEST**2 - 1 / total, 0.0)
    return matrix


def minimize_barrier(matrix: Array, fair: Array, power: float) -> Array:
    r"""Minimise :math:`F(s) = \tfrac12 s^\top A s - \sum_i q_i \int s_i^{-\gamma}` over s > 0.

    The gradient :math:`A s - q s^{-\gamma}` vanishes where the equation holds. A is positive
    definite, so F is strictly convex and bounded below, and its gradient is infinite where some
    :math:`s_i` is zero: there is one minimum, inside.

    Newton's direction is a descent direction as the Hessian :math:`A + \gamma q s^{-\gamma-1}` is
    positive definite. The step goes along a curve with that tangent on which s stays positive:
    increases are linear, decreases are hyperbolic. It is halved until F falls by a fixed part of
    the slope, so that F falls by a fixed amount at least, as long as s is far from the minimum in
    the compact set of lower F. (In relative steps the third derivative is bounded by the second,
    :math:`|F'''| \le (\gamma + 1) F'' / s`.) Near the minimum the full step is taken and
    convergence is quadratic.

    Args:
        matrix: A, shape [K, K], with a diagonal of about one.
        fair: :math:`\log q`, shape [K], at most zero.
        power: :math:`\gamma > 0`.
    """
    solution: Array = np.exp(fair / (1 + power))  # for orthogonal gradients
    value = _objective(matrix, solution, fair, power)
    before = np.inf
    for _ in range(_STEPS):
        step, slope = _newton_step(matrix, solution, fair, power)
        size = float(np.abs(step).max())
        # Rounding keeps a step from shrinking further.
        if size <= 1e-12 or before / 2 < size < 1e-3:
            break
        before, fraction = size, 1.0
        allowed = value + 8 * EPS * (abs(value) + float(solution.sum()) ** 2)
        moved = _move(solution, step, power)
        while (trial := _objective(matrix, moved, fair, power)) > allowed - fraction * slope / 1e4:
            fraction /= 2
            moved = _move(solution, fraction * step, power)
            if fraction < 1e-9:
                return solution
        solution, value = moved, trial
    return solution


def _newton_step(matrix: Array, solution: Array, fair: Array, power: float) -> tuple[Array, float]:
    """Newton's step relative to the solution, and how fast F falls along it.

    The system is scaled to a unit diagonal.
    """
    roots = np.exp((fair + (1 - power) * np.log(solution)) / 2)
    scale = np.hypot(solution, np.sqrt(power) * roots)
    part = solution / scale
    curvature = np.sqrt(power) * roots / scale
    residual = roots * (roots / scale) - part * matrix.dot(solution)
    held = (solution <= _LEAST) & (residual < 0.0)
    if held.any():
        part, curvature = np.where(held, 0.0, part), np.where(held, 1.0, curvature)
        residual = np.where(held, 0.0, residual)
    system = matrix * part[:, None] * part
    system.ravel()[:: len(scale) + 1] += curvature * curvature
    scaled = np.linalg.solve(system, residual)
    return scaled / scale, float(scaled.dot(residual))


def _move(solution: Array, step: Array, power: float) -> Array:
    falling = (1.0 + power * np.maximum(-step, 0.0)) ** (-1 / power)
    return np.maximum(solution * np.where(step > 0.0, 1.0 + step, falling), _LEAST)


def _objective(matrix: Array, solution: Array, fair: Array, power: float) -> float:
    quadratic = float(solution.dot(matrix.dot(solution))) / 2
    logs = np.log(solution)
    if power == 1.0:
        return quadratic - float(np.exp(fair).dot(logs))
    return quadratic - float(np.exp(fair + (1 - power) * logs).sum()) / (1 - power)


def _verify(matrix: Array, solution: Array, fair: Array, power: float) -> None:
    """Raise unless the equation holds, relative to the size of its terms."""
    wanted = np.exp(fair - power * np.log(solution))
    sizes = np.abs(matrix).dot(solution) + wanted
    errors = np.where(solution > _LEAST, wanted - matrix.dot(solution), 0.0)
    residual = float((np.abs(errors) / sizes).max())
    if not residual <= 1e-9:
        raise ConvergenceError(
            "Fair weights should satisfy their equation to 1.0e-09. "
            f"Found a residual of {residual:.3e} for {len(solution)} gradients. "
            "Compute the Gramian in float64."
        )
