"""The problem of CAGrad: the best worst improvement within a ball around the mean gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moo_balance.functional._directions import Array, Directions
from moo_balance.functional._least_norm import least_norm
from moo_balance.functional._nnls import check_residual, make_definite, nonnegative_quadratic

_ROUNDS = 100
_TINY = 1e-290


class _Problem(NamedTuple):
    r"""Maximize the worst improvement within a ball, in multiples of unit gradients.

    The direction is :math:`d = g_0 + \sum_i x_i u_i` with :math:`x \ge 0`. It is the point of
    :math:`\{d : u_i^\top d \ge \lambda e_i\}` next to :math:`g_0`, with inverse norms
    :math:`e_i` up to a factor, for the largest :math:`\lambda` at which that point is in the ball.
    """

    matrix: Array  # cosines, plus a ridge
    along: Array  # of unit gradients and the centre
    inverse: Array  # e
    radius: float


class _Point(NamedTuple):
    """The nearest point for one lambda: x, its distance from the centre, and what was solved."""

    lengths: Array
    distance: float
    problem: _Problem


def add_conflict_averse(
    gradients: Directions, shares: Sequence[float], c: float, precision: float
) -> Array:
    """What CAGrad adds to the coefficients `shares` of the centre, shape [K]."""
    norms, cosines = gradients.norms, gradients.cosines
    sizes = norms * np.array(shares)
    scale = float(sizes.max())
    if scale == 0.0 or c == 0.0:
        return np.zeros(len(norms))
    sizes = sizes / scale
    divisors: Array = np.where(norms == 0.0, np.inf, norms)
    along = cosines.dot(sizes)
    square = float(sizes.dot(along))
    if square <= 4 * len(norms) * precision * float(sizes.sum()) ** 2:
        return np.zeros(len(norms))  # a mean of zero, up to rounding
    radius = c * math.sqrt(square)
    matrix, ridge, pivot = make_definite(cosines, precision)
    problem = _Problem(matrix, along, divisors.min() / divisors, radius)
    vanishes = 16 * len(norms) * (precision + ridge)
    lengths, level = _solve(problem, cosines, vanishes)
    # Multiples that nearly cancel have been made of rounding: a larger ridge keeps them small.
    while level < 0.0 and ridge < 1e-6 and _vanishes(lengths, cosines, vanishes):
        ridge *= 100
        problem = problem._replace(matrix=cosines + ridge * np.eye(len(norms)))
        lengths, level = _solve(problem, cosines, vanishes)
    tolerance = 1e-9 + 4 * ridge + 32 * precision
    lacking = level * problem.inverse - along - cosines.dot(lengths)
    lacking = lacking / float(sizes.sum() + lengths.sum())
    _verify(problem, cosines, lengths, lacking, tolerance)
    if pivot <= 1e-9 + 1e4 * precision:
        may = (lengths > 0.0) | (lacking >= -tolerance)
        lengths = least_norm(lengths, cosines, may, precision)
    return lengths * (scale / divisors)


def _solve(problem: _Problem, cosines: Array, vanishes: float) -> tuple[Array, float]:
    """Find x and lambda, by the root of the distance, which is convex and increases with it.

    On a support of x the squared distance is a quadratic function of lambda, whose root is the
    solution if the support stays. Otherwise a step of Newton's method leads closer.

    Where a convex combination of the gradients vanishes, up to the relative squared length
    `vanishes`, lambda cannot be positive. If zero leaves room in the ball, the nearest direction
    without a conflict is taken.
    """
    _, along, inverse, radius = problem
    finite = inverse > 0.0
    low, high = -math.inf, float(((along + radius)[finite] / inverse[finite]).min())
    level, before = high, inverse < 0.0
    for _ in range(_ROUNDS):
        point = _nearest(problem, level)
        lengths, distance = point.lengths, point.distance
        if level > 0.0 and _vanishes(lengths, cosines, vanishes):
            level = high = 0.0
            point = _nearest(problem, level)
            lengths, distance = point.lengths, point.distance
            if distance <= radius:
                return lengths, level
        support = lengths > 0.0
        # The root of a support that has stayed is as exact as rounding permits.
        if abs(distance - radius) <= (1e-10 if (support == before).all() else 1e-14) * radius:
            break
        before = support
        low, high = (level, high) if distance < radius else (low, level)
        following = _advance(point, low, high)
        if following == level:
            break
        level = following
    # Without the ridge, it is on the sphere.
    distance = math.sqrt(max(float(lengths.dot(cosines.dot(lengths))), 0.0))
    near = abs(distance - radius) <= 1e-9 * radius
    return (lengths * (radius / distance) if near else lengths), level


def _vanishes(lengths: Array, cosines: Array, limit: float) -> bool:
    """Whether a combination vanishes, up to a relative squared length."""
    return bool(lengths.dot(cosines.dot(lengths)) <= limit * lengths.sum() ** 2)


def _nearest(problem: _Problem, level: float) -> _Point:
    """Solve for one lambda.

    A condition that no direction within two radii can violate is replaced by one of that size,
    next to which rounding does not hide the others.
    """
    matrix, along, inverse, radius = problem
    loose = level * inverse - along < -2 * radius
    along, inverse = np.where(loose, 2 * radius, along), np.where(loose, 0.0, inverse)
    lengths = nonnegative_quadratic(matrix, level * inverse - along)
    distance = math.sqrt(float(lengths.dot(matrix.dot(lengths))))
    return _Point(lengths, distance, problem._replace(along=along, inverse=inverse))


def _advance(point: _Point, low: float, high: float) -> float:
    """The next lambda, between two bounds."""
    lengths, distance, problem = point
    support = (lengths > 0.0).nonzero()[0]
    if len(support):
        level = _root(problem, support)
        if low < level < high:
            return level
        _, along, inverse, radius = problem
        level = float(lengths.dot(along) + radius * distance) / float(lengths.dot(inverse))
        if low < level < high:
            return level
    return (low + high) / 2 if low > -math.inf else high


def _root(problem: _Problem, support: npt.NDArray[np.intp]) -> float:
    """The lambda at which the point of this support is as far away as the radius."""
    matrix, along, inverse, radius = problem
    sides = np.stack([inverse[support], along[support]], 1)
    products = sides.T.dot(np.linalg.solve(matrix[np.ix_(support, support)], sides))
    square, half, rest = products[0, 0], products[0, 1], products[1, 1] - radius**2
    inside = half * half - square * rest
    return float((half + math.sqrt(inside)) / square) if inside >= 0.0 < square else math.nan


def _verify(
    problem: _Problem, cosines: Array, lengths: Array, lacking: Array, tolerance: float
) -> None:
    """Raise unless all losses with a multiple improve alike, the others more, within the ball."""
    total = float(lengths.sum())
    worst = np.maximum(lacking, lengths / max(total, _TINY) * np.abs(lacking)).max()
    distance = math.sqrt(max(float(lengths.dot(cosines.dot(lengths))), 0.0))
    residual = max(float(worst), (distance - problem.radius) / (total + problem.radius))
    what = "The direction of CAGrad should satisfy its conditions"
    check_residual(what, residual, tolerance, len(lengths))
