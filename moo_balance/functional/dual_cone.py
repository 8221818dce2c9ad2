"""Projection onto the cone of directions that conflict with no gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional._checks import check_square, precision
from moo_balance.functional._directions import Array, Directions, directions
from moo_balance.functional._nnls import make_definite, nonnegative_quadratic


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
    start: Array = coefficients.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(start).all():
        raise BalanceValueError(
            f"Parameter `coefficients` should be finite. Found {start.tolist()}."
        )
    total = start + _addition(gradients, start, precision(gramian))
    return torch.from_numpy(total).to(result).to(gramian.device)


def _addition(gradients: Directions, start: Array, precision: float) -> Array:
    """What has to be added to the coefficients to take the direction into the dual cone."""
    _, norms, cosines = gradients
    lengths = start * norms
    scale = np.abs(lengths).max()
    if scale == 0.0:
        return np.zeros(len(start))
    lengths = lengths / scale
    matrix, ridge, _ = make_definite(cosines, precision)
    added = nonnegative_quadratic(matrix, -cosines.dot(lengths))
    _verify(cosines, lengths, added, 1e-9 + 4 * ridge)
    # A zero gradient keeps its coefficient.
    divisors: Array = np.where(norms == 0.0, np.inf, norms)
    return added * float(scale) / divisors


def _verify(cosines: Array, lengths: Array, added: Array, tolerance: float) -> None:
    """Raise unless no gradient conflicts and each added one is orthogonal to the direction."""
    total = np.abs(lengths).sum() + added.sum()
    along = cosines.dot((lengths + added) / total)
    residual = np.maximum(-along, added / total * np.abs(along)).max()
    if not residual <= tolerance:
        raise ConvergenceError(
            f"The dual-cone projection should satisfy its conditions to {tolerance:.1e}. "
            f"Found a residual of {residual:.3e} for {len(lengths)} gradients. "
            "Compute the Gramian in float64."
        )
