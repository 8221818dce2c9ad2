"""Projection onto the cone of directions that conflict with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import check_square, precision


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
    start = coefficients.detach().to("cpu", torch.float64)
    if not bool(start.isfinite().all()):
        raise BalanceValueError(
            f"Parameter `coefficients` should be finite. Found {start.tolist()}."
        )
    from moo_balance.functional._solvers import addition_into_dual_cone  # loads NumPy

    added = addition_into_dual_cone(gramian, start, precision(gramian))
    return (start + added).to(result).to(gramian.device)
