r"""Tchebycheff scalarization of a set of solutions, as a value and as coefficients."""

from __future__ import annotations

from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import at_least_float32, check_positive
from moo_balance.functional.tchebycheff import smooth_argmax, smooth_max


def set_tchebycheff_value(
    losses: Tensor, preference: Tensor, ideal: Tensor | float, mu: float
) -> Tensor:
    r"""The smooth Tchebycheff set scalarization: few solutions that serve many objectives together.

    .. math:: g_\mu(L) = \mu \log \sum_i \exp \frac{\lambda_i (m_i - z_i)}{\mu}, \qquad
              m_i = -\mu \log \sum_s \exp \frac{-L_{si}}{\mu}

    Each objective counts by (a smooth version of) its best solution, and the set by its worst
    objective.

    Args:
        losses: :math:`L`, shape ``[S, K]``: loss of solution s on objective i.
        preference: :math:`\lambda`, shape ``[K]``, positive; ones in the official code.
        ideal: :math:`z`, shape ``[K]`` or a number; 0 in the official code.
        mu: :math:`\mu > 0`, the smoothing of both the maximum and the minimum, as in the official
            code.

    Returns:
        The value, a 0-d tensor in float32 or wider.

    Raises:
        BalanceValueError: ``losses`` is not a matrix, or ``mu`` is not positive and finite.

    Source:
        Lin et al., "Few for Many: Tchebycheff Set Scalarization for Many-Objective Optimization",
        ICLR 2025 (arXiv 2405.19650).

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 1.0]])
        >>> set_tchebycheff_value(losses, torch.ones(3), 0.0, 0.01)
        tensor(0.9931)
    """
    best = _smooth_best(losses, mu)
    return smooth_max(at_least_float32(preference) * (best - ideal), mu)


def set_tchebycheff(losses: Tensor, preference: Tensor, ideal: Tensor | float, mu: float) -> Tensor:
    r"""Coefficients of the smooth Tchebycheff set scalarization.

    .. math:: c_{si} = \lambda_i \, \operatorname{softmax}_i \frac{\lambda (m - z)}{\mu} \,
              \operatorname{softmax}_s \frac{-L_{si}}{\mu}

    Args:
        losses: :math:`L`, shape ``[S, K]``.
        preference: :math:`\lambda`, shape ``[K]``, positive.
        ideal: :math:`z`, shape ``[K]`` or a number.
        mu: :math:`\mu > 0`.

    Returns:
        :math:`c = \partial g_\mu / \partial L`, shape ``[S, K]``, in float32 or wider, of
        :func:`set_tchebycheff_value`.

    Raises:
        BalanceValueError: ``losses`` is not a matrix, or ``mu`` is not positive and finite.

    Source:
        As :func:`set_tchebycheff_value`.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 1.0]])
        >>> set_tchebycheff(losses, torch.ones(3), 0.0, 0.01).round(decimals=4)
        tensor([[0.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.5000]])
    """
    preference = at_least_float32(preference)
    worst = smooth_argmax(preference * (_smooth_best(losses, mu) - ideal), mu)
    return preference * worst * smooth_argmax(-at_least_float32(losses), mu)


def _smooth_best(losses: Tensor, mu: float) -> Tensor:
    check_positive("mu", mu)
    if losses.ndim != 2:
        raise BalanceValueError(
            "Parameter `losses` should have shape [S, K], one row for each solution. "
            f"Found shape {tuple(losses.shape)}. Use `smooth_tchebycheff` for a single solution."
        )
    return -smooth_max(-at_least_float32(losses), mu)
