"""Scale-free views of a Gramian."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.functional._checks import at_least_float32, check_gramian


def cosine_similarity(gramian: Tensor) -> Tensor:
    r"""Cosines of the angles between gradients, from their inner products.

    .. math:: C_{ij} = \frac{G_{ij}}{\sqrt{G_{ii} G_{jj}}}

    Args:
        gramian: :math:`G`, shape ``[K, K]``, inner products of the gradients.

    Returns:
        :math:`C`, shape ``[K, K]``, symmetric, in :math:`[-1, 1]`, with ones on the diagonal. A
        zero gradient has no direction: its cosine with every other gradient is 0, with itself 1.

    Raises:
        BalanceValueError: ``gramian`` is not square, or (on the CPU) not finite.

    Example:
        >>> import torch
        >>> cosine_similarity(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    check_gramian(gramian)
    gramian = at_least_float32(gramian)
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    # Division by infinity gives zero, as the cosines with a zero gradient should be.
    return cosines_from(gramian, norms.masked_fill(norms == 0, math.inf))


def cosines_from(gramian: Tensor, norms: Tensor) -> Tensor:
    """:func:`cosine_similarity` of a checked Gramian, given norms, infinite instead of zero."""
    # Two divisions: the product of two norms may leave the range of the dtype although the cosine
    # does not.
    cosines = gramian / norms.unsqueeze(1) / norms
    return ((cosines + cosines.T) / 2).clamp(-1.0, 1.0).fill_diagonal_(1.0)


def regularize(gramian: Tensor, relative: float | Tensor) -> Tensor:
    r"""Lengthen every gradient a little in a direction of its own.

    .. math:: G' = G + \rho \operatorname{diag}(G)

    The addition is relative to each gradient, so it commutes with any rescaling of the losses.

    Args:
        gramian: :math:`G`, shape ``[K, K]``.
        relative: :math:`\rho \ge 0`, the added fraction of each squared norm (no unit).

    Returns:
        :math:`G'`, shape ``[K, K]``.

    Example:
        >>> import torch
        >>> regularize(torch.tensor([[4.0, 2.0], [2.0, 1.0]]), 0.5)
        tensor([[6.0000, 2.0000],
                [2.0000, 1.5000]])
    """
    gramian = at_least_float32(gramian)
    return gramian + torch.diag(gramian.diagonal() * relative)


def share_between_equals(
    weights: Tensor, cosines: Tensor, norms: Tensor, precision: float
) -> Tensor:
    """Average the weights of gradients that no inner product tells apart.

    The combined gradient stays the same. Without it, round-off would decide how such gradients, any
    split of whose weight is optimal, share it. Two count as equal if their norms and their cosines
    with every gradient agree up to the relative ``precision`` of the inner products. No value is
    copied from an accelerator to the host.
    """
    tolerance = equality_tolerance(precision)
    if cosines.is_cpu and int((cosines >= 1.0 - tolerance).sum()) == len(cosines):
        return weights  # Only on the diagonal, so there is nothing to share.
    equal = torch.cdist(cosines, cosines, p=math.inf) <= tolerance
    equal &= (norms.unsqueeze(1) - norms).abs() <= tolerance * norms
    # Near-equality is not transitive; the first equal of each makes groups that are.
    first = equal.to(torch.uint8).argmax(dim=1)
    group = (first[:, None] == first).to(weights.dtype)
    return group @ weights / group.sum(dim=1)


def equality_tolerance(precision: float) -> float:
    """How far below one the cosine of two gradients may be that count as equal."""
    return 8 * precision
