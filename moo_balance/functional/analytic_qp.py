"""The equality-constrained quadratic programme in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.functional._checks import (
    check_gramian,
    check_scales,
    precision,
    relative_scales,
    result_dtype,
    widest,
)
from moo_balance.functional._two import weights_of_two
from moo_balance.functional.gramian import cosines_from, share_between_equals


def analytic_qp_weights(gramian: Tensor, scales: Tensor | None = None) -> Tensor:
    r"""Weights of the shortest affine combination of K gradients.

    .. math:: \min_{\sum_i v_i = 1} v^\top Q v
              \quad\Longrightarrow\quad v = \frac{Q^{-1} \mathbf 1}{\mathbf 1^\top Q^{-1} \mathbf 1}

    The weights sum to one but may be negative or exceed one: the caller projects them. Two
    gradients use :math:`v_1 = (q_{22} - q_{12}) / (q_{11} + q_{22} - 2 q_{12})`, which is also
    right for parallel gradients, where :math:`Q` has no inverse. More are solved through the matrix
    of cosines. Where that is singular, the result is the limit of the solution under a vanishing
    ridge on the cosines. No value is copied from an accelerator to the host.

    Gradients that are equal up to rounding share the weight. Zero gradients, if any, share all the
    weight, as in :func:`~moo_balance.functional.min_norm_weights`. The order of the gradients does
    not matter, though many weights may be optimal where they are linearly dependent.

    Args:
        gramian: :math:`Q_{ij} = g_i^\top g_j`, shape ``[K, K]``; in the paper, of the gradients of
            log-losses.
        scales: What the gradients are divided by first, shape ``[K]``, as in
            :func:`~moo_balance.functional.min_norm_weights`; ``None`` for ones.

    Returns:
        :math:`v`, shape ``[K]``, finite, of sum 1, in the dtype of ``gramian`` or float32 if wider.

    Raises:
        BalanceValueError: ``gramian`` is not square, or (on the CPU) not finite; or ``scales`` does
            not match it or is negative.

    Source:
        Zhang, Duan, Huang and Zhu, "Balanced Rate-Distortion Optimization in Learned Image
        Compression", CVPR 2025 (arXiv 2502.20161), Solution 2.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[2.0, 4.0], [4.0, 10.0]])  # gradients (1, 1) and (3, 1)
        >>> analytic_qp_weights(gramian)
        tensor([ 1.5000, -0.5000])
    """
    return affine_weights(gramian, scales, share_zeros=True)


def affine_weights(gramian: Tensor, scales: Tensor | None, share_zeros: bool) -> Tensor:
    """:func:`analytic_qp_weights`; without `share_zeros`, zero gradients have no weight.

    Of two gradients, a zero one always has all of it.
    """
    if scales is not None:
        check_scales(gramian, scales)
    if gramian.shape == (2, 2):
        return weights_of_two(gramian, scales, convex=False)
    check_gramian(gramian)
    result = result_dtype(gramian)
    if gramian.shape[0] == 1:
        return torch.ones(1, dtype=result, device=gramian.device)
    wide = widest(gramian.detach())
    return _by_cosines(wide, scales, precision(gramian), share_zeros).to(result)


def _by_cosines(gramian: Tensor, scales: Tensor | None, eps: float, share_zeros: bool) -> Tensor:
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    lengths = norms.masked_fill(norms == 0, math.inf)
    cosines = cosines_from(gramian, lengths)
    if scales is not None:
        norms = norms * relative_scales(scales)
    zero = norms == 0
    lengths = norms.masked_fill(zero, math.inf)
    # Zero gradients, if any, are the only ones with an entry here, if they share.
    inverse = norms.amin() / lengths + zero if share_zeros else lengths.amin() / lengths
    # The ridge is well above the noise of the cosines, so that a singular matrix has a definite
    # limit.
    ridge = 64 * len(norms) * max(eps, 1e-14)
    matrix = cosines.clone().fill_diagonal_(1.0 + ridge)
    factor, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    if factor.is_cpu and factor.diagonal().abs().amin().item() > _REGULAR:
        solution = _solve(factor, pivots, inverse, ridge)
    else:
        # A small pivot enlarges rounding, which depends on the order of the gradients.
        order = _canonical_order(norms, cosines)
        factor, pivots, _ = torch.linalg.lu_factor_ex(matrix[order][:, order])
        solution = torch.empty_like(inverse)
        solution[order] = _solve(factor, pivots, inverse[order], ridge)
    weights = solution * inverse
    return share_between_equals(weights / weights.sum(), cosines, norms, eps)


_REGULAR = 1e-4  # a pivot that enlarges rounding to 1e-12


def _solve(factor: Tensor, pivots: Tensor, vector: Tensor, ridge: float) -> Tensor:
    """Solve with a factorised matrix, and remove the first-order error of the ridge in it."""
    solution: Tensor = torch.linalg.lu_solve(factor, pivots, vector.unsqueeze(1))
    correction = torch.linalg.lu_solve(factor, pivots, solution)
    return solution.add(correction, alpha=ridge).squeeze(1)


def _canonical_order(norms: Tensor, cosines: Tensor) -> Tensor:
    """An order of the gradients that does not depend on the one in which they are given.

    By norm, and where norms are equal by the cosines with the others, summed in sorted order.
    """
    steps = torch.arange(1, len(norms) + 1, dtype=norms.dtype, device=norms.device)
    keys = (cosines.sort(dim=1).values * steps).sum(dim=1)
    order = keys.argsort(stable=True)
    by_norm: Tensor = norms[order].argsort(stable=True)
    return order[by_norm]
