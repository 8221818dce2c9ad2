"""Projection onto the cone of directions that conflict with no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import check_square, precision
from moo_balance.functional._pair import Pair, read_pair

_EPS = torch.finfo(torch.float64).eps


def project_dual_cone(gramian: Tensor, coefficients: Tensor) -> Tensor:
    r"""Coefficients of the closest direction that conflicts with no gradient.

    With the gradients as rows of :math:`J` and :math:`G = J J^\top`, the direction :math:`J^\top u`
    is projected onto the dual cone :math:`\{d : J d \ge 0\}`. The projection is :math:`J^\top v`
    with

    .. math:: v = \arg\min_{v \ge u} v^\top G v .

    It is found exactly on the CPU in float64, at the price of one copy to the host: for two
    gradients in closed form, else by a finite active-set method. Several directions are projected
    together, in much less time than one after the other. Where several :math:`v` give the same
    direction, because gradients depend on each other linearly, the one returned is of moderate
    size and does not depend on the order of the gradients. A zero gradient keeps its coefficient.

    Args:
        gramian: :math:`G`, shape ``[K, K]``.
        coefficients: :math:`u`, shape ``[K]``, or ``[N, K]`` for N directions; the rows of the
            identity project every gradient, as UPGrad does.

    Returns:
        :math:`v \ge u`, in the shape of ``coefficients``, on the device of ``gramian``, in the
        wider of the two dtypes and float32.

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
    count = gramian.shape[0]
    if coefficients.ndim not in (1, 2) or coefficients.shape[-1] != count:
        raise BalanceValueError(
            f"Parameter `coefficients` should have shape ({count},), as a row of `gramian`, or "
            f"(N, {count}). Found shape {tuple(coefficients.shape)}."
        )
    result = torch.promote_types(
        torch.promote_types(gramian.dtype, coefficients.dtype), torch.float32
    )
    start = coefficients.detach().to("cpu", torch.float64)
    if not math.isfinite(start.sum().item()) and not bool(start.isfinite().all()):
        raise BalanceValueError(
            f"Parameter `coefficients` should be finite. Found {start.tolist()}."
        )
    projected = _project(gramian.detach(), start) if len(start) else start
    return projected.to(result).to(gramian.device)


def _project(gramian: Tensor, start: Tensor) -> Tensor:
    if gramian.shape[0] == 2:
        pair = read_pair(gramian)
        projected = [_project_among_two(pair, row) for row in start.reshape(-1, 2).tolist()]
        return torch.tensor(projected, dtype=torch.float64, device="cpu").view(start.shape)
    from moo_balance.functional._cone import addition_into_dual_cone  # loads NumPy

    directions = start.unsqueeze(0) if start.ndim == 1 else start
    added = addition_into_dual_cone(gramian, directions, precision(gramian))
    return start + added.reshape(start.shape)


def _project_among_two(pair: Pair, start: Sequence[float]) -> list[float]:
    r"""The closed form: remove what conflicts with one gradient, or everything.

    In units of the lengths :math:`\ell_i = u_i \lVert g_i \rVert`, with c the cosine, what is added
    is the solution y of :math:`\min_{y \ge 0} \lVert (\ell_1 + y_1) e_1 + (\ell_2 + y_2) e_2
    \rVert`: zero, or positive for one gradient, or such that nothing is left.
    """
    first, second, cosine = pair
    if first == 0.0 or second == 0.0:
        return [max(u, 0.0) if norm else u for u, norm in zip(start, pair, strict=False)]
    one, other = start[0] * first, start[1] * second
    # How far the direction is against each gradient.
    against, against_other = -(one + cosine * other), -(other + cosine * one)
    if against <= 0.0 and against_other <= 0.0:
        return list(start)
    worst, rest = max(against, against_other), min(against, against_other)
    if cosine * worst - rest < -4 * _EPS * (worst + abs(rest)):
        return [0.0, 0.0]
    if against == worst:
        return [start[0] + worst / first, start[1]]
    return [start[0], start[1] + worst / second]
