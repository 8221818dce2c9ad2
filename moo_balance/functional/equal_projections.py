"""The direction that has the same projection on every unit gradient."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import check_gramian, precision, result_dtype
from moo_balance.functional._pair import Pair, read_pair
from moo_balance.functional._preferences import read_preference

_LENGTHS = ("config", "imtl_g")

RANK = 8
"""Eigenvalues of cosines count as zero up to K times as many rounding units of the largest."""


def equal_projections(
    gramian: Tensor,
    preference: Tensor | None = None,
    length: Literal["config", "imtl_g"] = "config",
) -> Tensor:
    r"""Coefficients of the direction with equal projections on all unit gradients.

    With the unit gradients :math:`u_i = g_i / \lVert g_i \rVert`, their cosines :math:`C` and
    preferences :math:`p` of mean 1,

    .. math:: C y = p, \qquad x = \sum_i y_i u_i
              \quad\Longrightarrow\quad u_i^\top x = p_i

    Two lengths of that direction were published:

    ============  ==========================================  ======================================
    length        :math:`d`                                   coefficients
    ============  ==========================================  ======================================
    ``"config"``  :math:`\sum_i (g_i^\top \hat x)\, \hat x`   sum to nothing in particular
    ``"imtl_g"``  :math:`\sum_i \alpha_i g_i`,                sum to 1, see below
                  :math:`\alpha_i \propto y_i / \lVert g_i
                  \rVert`
    ============  ==========================================  ======================================

    Where gradients depend on each other linearly, :math:`y` is the least-squares solution of least
    norm, by the pseudo-inverse. Projections may then differ, and a gradient may conflict with the
    direction. If no direction is left (two opposite gradients), neither is one of the result:
    coefficients are finite, and their combination is zero.

    Weights :math:`\alpha_i` may be negative, and so may :math:`\sum_i y_i / \lVert g_i \rVert`, by
    which they are divided. If that is near zero the published step is of any length, and if it is
    negative every loss rises along it. It is therefore taken to be at least :math:`\lVert x \rVert
    / \max_i \lVert g_i \rVert`, which changes nothing where no weight is negative: the direction is
    never longer than the longest gradient, and the coefficients may sum to less than 1.

    Args:
        gramian: :math:`G_{ij} = g_i^\top g_j`, shape ``[K, K]``.
        preference: Positive, shape ``[K]``, in any unit; ``None`` for equal projections.
        length: As above.

    Returns:
        Coefficients of the raw gradients, shape ``[K]``, on the device of ``gramian``, in its dtype
        or float32 if wider. A zero gradient has none, and is ignored.

    Raises:
        BalanceValueError: ``gramian`` is not square or not finite, ``preference`` is not positive
            or does not match it, or ``length`` is none of the two.

    Source:
        Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks", ICLR 2025 (arXiv 2408.11104); Liu et al., "Towards Impartial Multi-task
        Learning", ICLR 2021, as generalized by the pseudo-inverse.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])  # gradients (1, 0) and (0, 2)
        >>> equal_projections(gramian)
        tensor([1.5000, 0.7500])
        >>> equal_projections(gramian, length="imtl_g")
        tensor([0.6667, 0.3333])
    """
    if length not in _LENGTHS:
        raise BalanceValueError(
            f"Parameter `length` should be one of {', '.join(map(repr, _LENGTHS))}. "
            f"Found {length!r}."
        )
    check_gramian(gramian)
    targets = read_preference(preference, gramian)
    result = result_dtype(gramian)
    to_sum = length == "imtl_g"
    if gramian.shape[0] == 2:
        both = _of_two(read_pair(gramian), targets or [1.0, 1.0], precision(gramian), to_sum)
        return torch.tensor(both, dtype=result, device=gramian.device)
    from moo_balance.functional._projections import coefficients_of_projections  # loads NumPy

    found = coefficients_of_projections(gramian, targets, precision(gramian), to_sum)
    return found.to(result).to(gramian.device)


def _of_two(pair: Pair, targets: list[float], eps: float, to_sum: bool) -> list[float]:
    """Two gradients: the eigenvectors of the cosines are their sum and their difference."""
    first, second, cosine = pair
    if first == 0.0 or second == 0.0:
        return [float(first > 0.0), float(second > 0.0)]
    half, rest = (targets[0] + targets[1]) / 2, (targets[0] - targets[1]) / 2
    along, across = 1.0 + cosine, 1.0 - cosine
    least = RANK * 2 * eps * max(along, across)
    # As of a pseudo-inverse: what lies in a direction without curvature is not reached.
    by_half, by_rest = (0.0 if c <= least else 1 / c for c in (along, across))
    reach_half, reach_rest = half if by_half else 0.0, rest if by_rest else 0.0
    if reach_half**2 + reach_rest**2 <= 2 * eps * (half**2 + rest**2):
        by_half = by_rest = 1.0
        reach_half, reach_rest = half, rest
    y_half, y_rest = by_half * reach_half, by_rest * reach_rest
    square = 2 * (y_half * reach_half + y_rest * reach_rest)
    one, other = y_half + y_rest, y_half - y_rest
    if to_sum:
        least, most = min(first, second), max(first, second)
        one, other = one * (least / first), other * (least / second)
        total = max(one + other, math.sqrt(square) * (least / most))
        return [one / total, other / total]
    size = first * (reach_half + reach_rest) + second * (reach_half - reach_rest)
    size /= square
    return [one * (size / first), other * (size / second)]
