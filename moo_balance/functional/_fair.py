"""The equation of alpha-fairness on NumPy arrays, by a damped Newton method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moo_balance.functional._directions import Array, directions
from moo_balance.functional._nnls import EPS, check_residual, make_definite, nonnegative_quadratic
from moo_balance.functional.fair import SHORTEST

_STEPS = 60
_TOLERANCE = 1e-9
_RIDGES = tuple(10.0**-exponent for exponent in range(9))
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
        solution = _minimize(Barrier(matrix, fair - unit, power))
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


class _Point(NamedTuple):
    """A value of s with what depends on it: A s, the terms q s ** (1 - power), and F."""

    solution: Array
    along: Array
    terms: Array
    value: float


class Barrier(NamedTuple):
    r"""The function :math:`F(s) = \tfrac12 s^\top A s - \sum_i q_i \int s_i^{-\gamma}` of s > 0.

    Its gradient :math:`A s - q s^{-\gamma}` vanishes where the equation holds. A is positive
    definite, so F is strictly convex and bounded below; and its slope is infinite where some
    :math:`s_i` is zero. So there is one minimum, and it is inside.

    Args:
        matrix: A, shape [K, K], with a diagonal of about one.
        fair: :math:`\log q`, shape [K], at most zero.
        power: :math:`\gamma > 0`.
    """

    matrix: Array
    fair: Array
    power: float

    def minimize(self, start: Array) -> Array:
        r"""Newton's method with a backtracking line search, from any positive `start`.

        Newton's direction is a descent direction, as the Hessian :math:`A + \gamma q
        s^{-\gamma-1}` is positive definite. The step follows that tangent, straight or on a curve,
        such that s stays positive, and is halved until F falls by a fixed part of what the tangent
        promises. In steps relative to s the third derivative is bounded by the second,
        :math:`\lvert F''' \rvert \le (\gamma + 1) F'' / s`. So in the compact set of lower F, a
        step of fixed relative size is always taken, and F falls by a fixed amount until s is close
        to the minimum, where the full step is taken and convergence is quadratic.
        """
        point = self._at(start)
        before = np.inf
        for _ in range(_STEPS):
            step, slope = self._newton_step(point)
            size = float(np.abs(step).max())
            # Rounding keeps a step from shrinking further.
            if size <= 1e-12 or before / 2 < size < 1e-3:
                break
            before = size
            moved = self._search(point, step, slope)
            if moved is None:
                break
            point = moved
        return point.solution

    def residual(self, solution: Array) -> float:
        """The largest error in the equation, relative to the size of its terms."""
        wanted = np.exp(self.fair - self.power * np.log(solution))
        sizes = np.abs(self.matrix).dot(solution) + wanted
        errors = np.where(solution > _LEAST, wanted - self.matrix.dot(solution), 0.0)
        return float((np.abs(errors) / sizes).max())

    def _at(self, solution: Array) -> _Point:
        along = self.matrix.dot(solution)
        logs, rest = np.log(solution), 1.0 - self.power
        terms = np.exp(self.fair + rest * logs)
        if abs(rest) > 0.1:
            gain = float(terms.sum()) / rest
        else:  # near the logarithm the difference of two powers would lose digits
            growth = np.expm1(rest * logs) / rest if rest else logs
            gain = float(np.exp(self.fair).dot(growth))
        return _Point(solution, along, terms, float(solution.dot(along)) / 2 - gain)

    def _newton_step(self, point: _Point) -> tuple[Array, float]:
        """Newton's step relative to s, and how fast F falls along it.

        The system is scaled to a unit diagonal.
        """
        solution, along, terms, _ = point
        roots = np.sqrt(terms)
        scale = np.hypot(solution, np.sqrt(self.power) * roots)
        part, curvature = solution / scale, np.sqrt(self.power) * roots / scale
        residual = roots * (roots / scale) - part * along
        held = (solution <= _LEAST) & (residual < 0.0)
        if held.any():
            part, curvature = np.where(held, 0.0, part), np.where(held, 1.0, curvature)
            residual = np.where(held, 0.0, residual)
        system = self.matrix * part[:, None] * part
        system.ravel()[:: len(scale) + 1] += curvature * curvature
        scaled = np.linalg.solve(system, residual)
        return scaled / scale, float(scaled.dot(residual))

    def _search(self, point: _Point, step: Array, slope: float) -> _Point | None:
        """The first step, of all that are halved again and again, that lowers F enough.

        A straight step keeps the balance of gradients that nearly cancel, but all of it ends where
        one s would become negative; a curved one lets each s fall as far as it should.
        """
        rounding = 8 * EPS * (abs(point.value) + float(point.solution.sum()) ** 2)
        fall = float(-step.min())
        straight = 1.0 if fall < 0.9 else 0.9 / fall
        for halvings in range(40):
            fraction = 0.5**halvings
            length = fraction * straight
            moved = self._at(np.maximum(point.solution * (1.0 + length * step), _LEAST))
            if straight < 1.0:
                curved = self._at(self._bend(point.solution, fraction * step))
                if not moved.value <= curved.value:
                    moved, length = curved, fraction
            if moved.value <= point.value + rounding - 1e-4 * length * slope:
                return moved
        return None

    def _bend(self, solution: Array, step: Array) -> Array:
        """Increases are linear; decreases are those of a power of 1 / s."""
        falling = (1.0 + self.power * np.maximum(-step, 0.0)) ** (-1 / self.power)
        return np.maximum(solution * np.where(step > 0.0, 1.0 + step, falling), _LEAST)


def _minimize(barrier: Barrier) -> Array:
    r"""The minimum, from that for orthogonal gradients; verified.

    Where that takes too many steps, because gradients nearly cancel and :math:`\gamma` is far from
    1, it is the end of a path of minima with ever smaller ridges.
    """
    start = np.exp(barrier.fair / (1 + barrier.power))
    solution = barrier.minimize(start)
    if not barrier.residual(solution) <= _TOLERANCE:
        solution = start
        for ridge in (*_RIDGES, 0.0):
            matrix = barrier.matrix + ridge * np.eye(len(start))
            solution = barrier._replace(matrix=matrix).minimize(solution)
        what = "Fair weights should satisfy their equation"
        advice = "Choose `alpha` closer to 1, or compute the Gramian in float64."
        check_residual(what, barrier.residual(solution), _TOLERANCE, len(start), advice)
    return solution
