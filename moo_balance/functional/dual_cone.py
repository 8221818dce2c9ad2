"""Projection onto the cone of directions that conflict with no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional._checks import check_square, precision
from moo_balance.functional._host import Directions, directions
from moo_balance.functional._matrix import Matrix, Vector
from moo_balance.functional._nnls import definite, nonnegative_quadratic


def project_dual_cone(gramian: Tensor, coefficients: Tensor) -> Tensor:
    r"""Coefficients of the closest direction that conflicts with no gradient.

    With the gradients as rows of :math:`J` and :math:`G = J J^\top`, the direction :math:`J^\top u`
    is projected onto the dual cone :math:`\{d : J d \ge 0\}`. The projection is :math:`J^\top v`
    with

    .. math:: v = \arg\min_{v \ge u} v^\top G v .

    It is found exactly, by the same finite method on the CPU in float64 as
    :func:`~moo_balance.functional.min_norm_weights`, at the price of one copy to the host. When
    several :math:`v` give the same direction, one of moderate size is returned.
    A zero gradient keeps its coefficient.

    Args:
        gramian: :math:`G`, shape ``[K, K]``.
        coefficients: :math:`u`, shape ``[K]``; a row of the identity projects one gradient, as
            UPGrad does for each.

    Returns:
        :math:`v \ge u`, shape ``[K]``, on the device of ``gramian``, in the wider of the two dtypes
        and float32.

    Raises:
        BalanceValueError: ``gramian`` is not square, finite and positive semidefinite, or
            ``coefficients`` does not match it or is not finite.
        ConvergenceError: The optimality conditions do not hold to tolerance.

    Source:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024 (arXiv
        2406.16232), Proposition 1.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])  # gradients (1, 0) and (-1, 1)
        >>> project_dual_cone(gramian, torch.tensor([1.0, 0.0]))  # (1, 0) becomes (0.5, 0.5)
        tensor([1.0000, 0.5000])
    """
    check_square(gramian)
    if coefficients.shape != gramian.shape[:1]:
        raise BalanceValueError(
            f"Parameter `coefficients` should have shape ({gramian.shape[0]},), as a row of "
            "`gramian`. "
            f"Found shape {tuple(coefficients.shape)}."
        )
    result = torch.promote_types(
        torch.promote_types(gramian.dtype, coefficients.dtype), torch.float32
    )
    gradients = directions(gramian)
    start: Vector = coefficients.tolist()
    if not all(map(math.isfinite, start)):
        raise BalanceValueError(f"Parameter `coefficients` should be finite. Found {start}.")
    added = _addition(gradients, start, precision(gramian))
    return gramian.new_tensor([u + a for u, a in zip(start, added, strict=True)], dtype=result)


def _addition(gradients: Directions, start: Vector, precision: float) -> Vector:
    """What has to be added to the coefficients to take the direction into the dual cone."""
    _, norms, cosines = gradients
    lengths = [u * norm for u, norm in zip(start, norms, strict=True)]
    scale = max(map(abs, lengths))
    if scale == 0.0:
        return [0.0] * len(start)
    lengths = [length / scale for length in lengths]
    matrix, ridge, _ = definite(cosines, precision)
    added = nonnegative_quadratic(matrix, [-along for along in cosines.times(lengths)])
    _verify(cosines, lengths, added, 1e-9 + 4 * ridge)
    return [a * scale / norm if norm else 0.0 for a, norm in zip(added, norms, strict=True)]


def _verify(cosines: Matrix, lengths: Vector, added: Vector, tolerance: float) -> None:
    """Raise unless no gradient conflicts and each added one is orthogonal to the direction."""
    total = sum(map(abs, lengths)) + sum(added)
    along = cosines.times([(u + a) / total for u, a in zip(lengths, added, strict=True)])
    residual = max(max(-d, a / total * abs(d)) for d, a in zip(along, added, strict=True))
    if not residual <= tolerance:
        raise ConvergenceError(
            f"The dual-cone projection should satisfy its conditions to {tolerance:.1e}. "
            f"Found a residual of {residual:.3e} for {len(lengths)} gradients. "
            "Compute the Gramian in float64."
        )
