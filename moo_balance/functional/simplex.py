"""Euclidean projection onto the simplex."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import at_least_float32


def project_simplex(vector: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    r"""Project onto the simplex, the closest point with non-negative entries of a given sum.

    .. math:: \operatorname{proj}(v) = \arg\min_{w \ge 0,\ \sum_i w_i = r} \lVert w - v \rVert_2
              = \max(v - \tau, 0)

    where :math:`\tau` is the threshold that makes the entries sum to :math:`r`. The computation
    stays on the device: no value is copied to the host.

    Args:
        vector: :math:`v`, shape ``[..., K]``; the last dimension is projected, any others are
            batched.
        radius: :math:`r \ge 0`, a number or a tensor of the batch shape ``[...]`` (1 gives
            weights).

    Returns:
        The projection, shape ``[..., K]``, in float32 or the wider dtype of ``vector``.

    Raises:
        BalanceValueError: ``vector`` has no last dimension to project, or ``radius`` is a negative
            number.

    Source:
        Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient Projections onto the l1-Ball for
        Learning in High Dimensions", ICML 2008, Figure 1.

    Example:
        >>> import torch
        >>> project_simplex(torch.tensor([0.75, 1.0, -2.0]))
        tensor([0.3750, 0.6250, 0.0000])
    """
    if vector.ndim == 0 or vector.shape[-1] == 0:
        raise BalanceValueError(
            "Parameter `vector` should have a last dimension of at least one entry. "
            f"Found shape {tuple(vector.shape)}. Pass one vector [K] or a batch [..., K]."
        )
    if not isinstance(radius, Tensor) and not 0.0 <= radius < math.inf:
        raise BalanceValueError(
            f"Parameter `radius` should be non-negative and finite. Found {radius!r}."
        )
    total = radius.unsqueeze(-1) if isinstance(radius, Tensor) else radius
    # A common shift does not move the projection; with the maximum at zero no digits are lost to a
    # large offset.
    shifted = at_least_float32(vector)
    shifted = shifted - shifted.amax(dim=-1, keepdim=True)
    descending = shifted.sort(dim=-1, descending=True).values
    excess = descending.cumsum(dim=-1) - total
    rank = torch.arange(1, vector.shape[-1] + 1, device=vector.device)
    kept = (descending * rank > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, kept - 1) / kept
    return (shifted - threshold).clamp(min=0.0)
