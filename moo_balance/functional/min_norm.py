"""The shortest vector in the convex hull of K gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import (
    at_least_float32,
    check_gramian,
    check_scales,
    check_square,
    precision,
    result_dtype,
)
from moo_balance.functional._two import weights_of_two


def min_norm_weights(gramian: Tensor, scales: Tensor | None = None) -> Tensor:
    r"""Weights of the shortest convex combination of K gradients (MGDA).

    .. math:: \min_{w \ge 0,\ \sum_i w_i = 1} \; w^\top G w
              = \Bigl\lVert \sum_i w_i g_i \Bigr\rVert^2

    The direction :math:`d = \sum_i w_i g_i` conflicts with no gradient:
    :math:`g_i^\top d \ge \lVert d \rVert^2`.

    Two gradients have a closed form, which stays on the device:
    :math:`w_1 \propto \max(\lVert g_2 \rVert^2 - g_1^\top g_2, 0)` and likewise for :math:`w_2`;
    gradients that are equal up to rounding share the weight. More are solved exactly by a finite
    active-set method on the CPU in float64, at the price of one copy to the host. It works on
    cosines, so that gradients of very different length lose no digits: with :math:`C` the cosines,
    :math:`b_i = \min_j \lVert g_j \rVert / \lVert g_i \rVert` and
    :math:`y_i \propto w_i \lVert g_i \rVert`, the problem above becomes the non-negative least
    squares problem

    .. math:: \min_{y \ge 0} \; \tfrac12 y^\top C y - b^\top y ,

    which a ridge on :math:`C` of the size of its rounding keeps bounded where a combination of the
    gradients vanishes.

    Zero gradients, if any, share all the weight, and the combination is zero: that is the shortest
    one. In a training run it would be the end, so that :class:`~moo_balance.BalancedOptimizer`
    leaves such losses out, as satisfied. When several weights
    attain the minimum, gradients that are equal up to rounding receive equal weights.

    Args:
        gramian: :math:`G_{ij} = g_i^\top g_j`, shape ``[K, K]``.
        scales: :math:`n \ge 0`, shape ``[K]``, to have the weights of :math:`g_i / n_i`, as from
            :func:`~moo_balance.functional.scale_gramian`, but without an overflow where scales
            differ by many orders of magnitude; ``None`` for ones.

    Returns:
        :math:`w`, shape ``[K]``, on the simplex, on the device of ``gramian``, in its dtype or
        float32 if wider.

    Raises:
        BalanceValueError: ``gramian`` is not square, not finite, or (for K > 2) not positive
            semidefinite; or ``scales`` does not match it or is negative.
        ConvergenceError: The optimality conditions do not hold to tolerance (for K > 2).

    Source:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
        Comptes Rendus Mathématique 350, 2012; closed form for two: Sener and Koltun, "Multi-Task
        Learning as Multi-Objective Optimization", NeurIPS 2018, Algorithm 1. Their official code
        stops at 0.999 where this reaches 1.

    Example:
        >>> import torch
        >>> min_norm_weights(torch.tensor([[2.0, 0.0], [0.0, 6.0]]))
        tensor([0.7500, 0.2500])
        >>> min_norm_weights(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        tensor([0.5714, 0.2857, 0.1429])
    """
    return convex_weights(gramian, scales)


def convex_weights(gramian: Tensor, scales: Tensor | None, share_zeros: bool = True) -> Tensor:
    """:func:`min_norm_weights`; without `share_zeros`, zero gradients have no weight.

    Of two gradients, a zero one always has all of it.
    """
    if scales is not None:
        check_scales(gramian, scales)
    if gramian.shape == (2, 2):
        return weights_of_two(gramian, scales, convex=True)
    check_square(gramian)
    result = result_dtype(gramian)
    if gramian.shape[0] == 1:
        check_gramian(gramian)
        return torch.ones(1, dtype=result, device=gramian.device)
    from moo_balance.functional._solvers import shortest_combination  # loads NumPy

    weights = shortest_combination(gramian, scales, precision(gramian), share_zeros)
    return weights.to(result).to(gramian.device)


def kkt_residual(gramian: Tensor, weights: Tensor) -> Tensor:
    r"""How far weights are from solving the min-norm problem, free of every scale.

    .. math:: \max_i \max\left(
        \frac{\max(0,\; w^\top G w - (G w)_i)}{\lVert g_i \rVert \, \sigma},\;
        \frac{w_i \, \lvert (G w)_i - w^\top G w \rvert}{\sigma^2}
        \right), \qquad \sigma = \sum_j w_j \lVert g_j \rVert

    The first term measures dual feasibility (no gradient may conflict with the direction), the
    second complementary slackness (a gradient with weight is exactly as far along the direction as
    the direction is long). Both are unchanged when all gradients are scaled together; 0/0 counts as
    0.

    Args:
        gramian: :math:`G`, shape ``[K, K]``.
        weights: :math:`w`, shape ``[K]``, on the simplex.

    Returns:
        The residual, a 0-d tensor; 0 at the solution, infinite when a zero gradient was left
        without weight.

    Raises:
        BalanceValueError: ``gramian`` is not square (or on the CPU not finite), or ``weights`` does
            not match it.

    Source:
        The Karush-Kuhn-Tucker conditions of the quadratic programme in :func:`min_norm_weights`.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> kkt_residual(gramian, min_norm_weights(gramian))
        tensor(0.)
        >>> kkt_residual(gramian, torch.tensor([1.0, 0.0]))
        tensor(0.5774)
    """
    check_gramian(gramian)
    if weights.shape != gramian.shape[:1]:
        raise BalanceValueError(
            f"Parameter `weights` should have shape ({gramian.shape[0]},), as a row of `gramian`. "
            f"Found shape {tuple(weights.shape)}."
        )
    gramian = at_least_float32(gramian)
    weights = weights.to(gramian.dtype)
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    length = weights @ norms
    along = gramian @ weights
    squared = weights @ along
    infeasible = _ratio((squared - along).clamp(min=0.0), norms * length)
    slack = _ratio(weights * (along - squared).abs(), length * length)
    return torch.maximum(infeasible, slack).amax()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(numerator == 0, 0.0, numerator / denominator)
