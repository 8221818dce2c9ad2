"""Projection onto the cone of directions that conflict with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional._checks import check_gramian, precision
from moo_balance.functional._nnls import definite, nonnegative_quadratic
from moo_balance.functional.gramian import cosine_similarity


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
    check_gramian(gramian)
    if coefficients.shape != gramian.shape[:1]:
        raise BalanceValueError(
            f"Parameter `coefficients` should have shape ({gramian.shape[0]},), as a row of "
            "`gramian`. "
            f"Found shape {tuple(coefficients.shape)}."
        )
    result = torch.promote_types(
        torch.promote_types(gramian.dtype, coefficients.dtype), torch.float32
    )
    start = coefficients.detach().to("cpu", torch.float64)
    host = gramian.detach().to("cpu", torch.float64)
    check_gramian(host)
    if not bool(torch.isfinite(start).all()):
        raise BalanceValueError(
            f"Parameter `coefficients` should be finite. Found {start.tolist()}."
        )
    return (start + _addition(host, start, precision(gramian))).to(gramian.device, result)


def _addition(gramian: Tensor, start: Tensor, precision: float) -> Tensor:
    """What has to be added to the coefficients to take the direction into the dual cone."""
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    lengths = start * norms
    scale = lengths.abs().amax()
    if float(scale) == 0.0:
        return torch.zeros_like(start)
    cosines = cosine_similarity(gramian)
    matrix, ridge = definite(cosines, precision)
    added = nonnegative_quadratic(matrix, -(cosines @ (lengths / scale)))
    _verify(cosines, lengths / scale, added, 1e-9 + 4 * ridge)
    zero = norms == 0
    return (added * scale / norms.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def _verify(cosines: Tensor, lengths: Tensor, added: Tensor, tolerance: float) -> None:
    """Raise unless no gradient conflicts and each added one is orthogonal to the direction."""
    total = lengths.abs().sum() + added.sum()
    along = cosines @ (lengths + added) / total
    residual = float(torch.maximum(-along, added / total * along.abs()).amax())
    if not residual <= tolerance:
        raise ConvergenceError(
            f"The dual-cone projection should satisfy its conditions to {tolerance:.1e}. "
            f"Found a residual of {residual:.3e} for {len(lengths)} gradients. "
            "Compute the Gramian in float64."
        )
