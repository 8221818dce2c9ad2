"""Per-loss scalings of the gradients, applied to their Gramian without touching a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import at_least_float32, check_gramian

_NEEDS_GRAMIAN = ("l2", "loss+")
_NEEDS_LOSSES = ("loss", "loss+", "log")


def gradient_scales(losses: Tensor, gramian: Tensor | None, normalize: str | None) -> Tensor:
    r"""The divisors :math:`n_i` of the gradients :math:`g_i` under a named normalisation.

    ===========  =======================================  ==========================================
    normalize    :math:`n_i`                              what is solved on
    ===========  =======================================  ==========================================
    ``None``     :math:`1`                                the gradients themselves
    ``"l2"``     :math:`\lVert g_i \rVert`                directions
    ``"loss"``   :math:`L_i`                              relative rates of change
    ``"loss+"``  :math:`L_i \lVert g_i \rVert`            directions over losses
    ``"log"``    :math:`L_i`                              :math:`\nabla \log L_i = g_i / L_i`
    ===========  =======================================  ==========================================

    Args:
        losses: :math:`L`, shape ``[K]``; shifted beforehand where the method uses a shift.
        gramian: :math:`G_{ij} = g_i^\top g_j`, shape ``[K, K]``; may be ``None`` for the names
            without a norm.
        normalize: one of the names above.

    Returns:
        :math:`n`, shape ``[K]``, in float32 or wider; zero for a zero gradient under ``"l2"`` and
        ``"loss+"``, which :func:`scale_gramian` understands.

    Raises:
        BalanceValueError: ``normalize`` is not one of the names, or it needs a Gramian and there is
            none.

    Source:
        Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018 (the
        official code names the first four); ``"log"`` after Liu et al., "FAMO", NeurIPS 2023.

    Example:
        >>> import torch
        >>> gradient_scales(torch.tensor([0.5, 2.0]), torch.diag(torch.tensor([9.0, 4.0])), "loss+")
        tensor([1.5000, 4.0000])
    """
    losses = at_least_float32(losses)
    if normalize is None:
        return torch.ones_like(losses)
    if normalize not in _NEEDS_GRAMIAN + _NEEDS_LOSSES:
        raise BalanceValueError(
            'Parameter `normalize` should be None, "l2", "loss", "loss+" or "log". '
            f"Found {normalize!r}."
        )
    if normalize not in _NEEDS_GRAMIAN:
        return losses.clone()
    if gramian is None:
        raise BalanceValueError(
            f"Parameter `gramian` should be given with normalize={normalize!r}. Found None. "
            "Its diagonal holds the squared gradient norms."
        )
    norms = at_least_float32(gramian).diagonal().clamp(min=0.0).sqrt()
    if normalize in _NEEDS_LOSSES:
        return losses * norms
    return norms.to(torch.promote_types(norms.dtype, losses.dtype))


def scale_gramian(gramian: Tensor, scales: Tensor) -> Tensor:
    r"""The Gramian of the scaled gradients :math:`g_i / n_i`.

    .. math:: G' = D^{-1} G D^{-1}, \qquad D = \operatorname{diag}(n)

    Args:
        gramian: :math:`G`, shape ``[K, K]``.
        scales: :math:`n`, shape ``[K]``. Where it is zero, the scaled gradient counts as zero: its
            row and column vanish, and nothing is divided by zero.

    Returns:
        :math:`G'`, shape ``[K, K]``, in float32 or wider.

    Raises:
        BalanceValueError: ``gramian`` is not square, or (on the CPU) not finite.

    Example:
        >>> import torch
        >>> scale_gramian(torch.tensor([[4.0, 2.0], [2.0, 9.0]]), torch.tensor([2.0, 1.0]))
        tensor([[1., 1.],
                [1., 9.]])
    """
    check_gramian(gramian)
    scales = at_least_float32(scales)
    # Division by infinity gives zero.
    scales = scales.masked_fill(scales == 0, math.inf)
    return at_least_float32(gramian) / scales.unsqueeze(1) / scales
