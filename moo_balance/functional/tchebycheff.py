r"""Tchebycheff scalarizations, as values and as coefficients.

A scalarization turns K losses into one number; its gradient with respect to the losses is what
multiplies the gradient of each loss. Each value here is followed by its coefficients, in closed
form and without autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.functional._checks import at_least_float32, check_positive, widest


def tchebycheff_value(
    losses: Tensor, preference: Tensor, ideal: Tensor | float, augment: float = 0.0
) -> Tensor:
    r"""The (augmented) weighted Tchebycheff scalarization.

    .. math:: g(L) = \max_i \lambda_i (L_i - z_i) + \rho \sum_i \lambda_i (L_i - z_i)

    Args:
        losses: :math:`L`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, positive; on the simplex by convention.
        ideal: :math:`z`, the ideal point, shape ``[K]`` or a number: what each loss would reach
            if it were the only one.
        augment: :math:`\rho \ge 0`; 0 is the plain maximum, a small positive value excludes points
            that are only weakly Pareto optimal.

    Returns:
        The value, a 0-d tensor in float32 or wider.

    Source:
        Bowman, 1976; augmented: Steuer and Choo, "An interactive weighted Tchebycheff procedure for
        multiple objective programming", Mathematical Programming 26, 1983.

    Example:
        >>> import torch
        >>> tchebycheff_value(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 0.5]), 0.0, augment=0.1)
        tensor(1.1250)
    """
    distance = at_least_float32(preference) * (at_least_float32(losses) - ideal)
    return distance.amax() + augment * distance.sum()


def tchebycheff(
    losses: Tensor, preference: Tensor, ideal: Tensor | float, augment: float = 0.0
) -> Tensor:
    r"""Coefficients of the (augmented) weighted Tchebycheff scalarization.

    .. math:: c_i = \lambda_i \left( a_i + \rho \right), \qquad
              a_i = \frac{[i \in A]}{\lvert A \rvert}, \quad
              A = \arg\max_j \lambda_j (L_j - z_j)

    Losses that tie for the maximum share it equally.

    Args:
        losses: :math:`L`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, positive; on the simplex by convention.
        ideal: :math:`z`, shape ``[K]`` or a number.
        augment: :math:`\rho \ge 0`.

    Returns:
        :math:`c = \partial g / \partial L`, shape ``[K]``, in float32 or wider, of
        :func:`tchebycheff_value`.

    Source:
        As :func:`tchebycheff_value`. Some published code uses 1 in place of :math:`\lambda_i` for
        the active loss, which is not the gradient of the scalarization.

    Example:
        >>> import torch
        >>> tchebycheff(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 0.5]), 0.0)
        tensor([0.0000, 0.5000])
    """
    preference = at_least_float32(preference)
    distance = preference * (at_least_float32(losses) - ideal)
    active = (distance == distance.amax()).to(distance.dtype)
    return preference * (active / active.sum() + augment)


def smooth_tchebycheff_value(
    losses: Tensor,
    preference: Tensor,
    ideal: Tensor | float,
    nadir: Tensor | float | None,
    mu: float,
) -> Tensor:
    r"""The smooth Tchebycheff scalarization.

    .. math:: g_\mu(L) = \mu \log \sum_i \exp \frac{\lambda_i (L_i - z_i)}{\mu (n_i - z_i)}

    With :math:`g` the maximum it replaces, :math:`g \le g_\mu \le g + \mu \log K`.

    Args:
        losses: :math:`L`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, positive; on the simplex by convention.
        ideal: :math:`z`, the ideal point, shape ``[K]`` or a number.
        nadir: :math:`n`, the point that counts as distance 1 from the ideal, shape ``[K]`` or a
            number; ``None`` leaves the losses in their own units (divisor 1).
        mu: :math:`\mu > 0`, the smoothing, in units of :math:`\lambda_i (L_i - z_i) / (n_i - z_i)`.

    Returns:
        The value, a 0-d tensor in float32 or wider.

    Raises:
        BalanceValueError: ``mu`` is not positive and finite.

    Source:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024
        (arXiv 2402.19078).

    Example:
        >>> import torch
        >>> losses, preference = torch.tensor([0.5, 2.0]), torch.tensor([0.5, 0.5])
        >>> smooth_tchebycheff_value(losses, preference, 0.0, None, 0.1)
        tensor(1.0001)
    """
    check_positive("mu", mu)
    scale = _over_range(preference, ideal, nadir)
    return smooth_max(at_least_float32(losses) - ideal, mu, widest(scale))


def smooth_tchebycheff(
    losses: Tensor,
    preference: Tensor,
    ideal: Tensor | float,
    nadir: Tensor | float | None,
    mu: float,
) -> Tensor:
    r"""Coefficients of the smooth Tchebycheff scalarization.

    .. math:: c_i = \frac{\lambda_i}{n_i - z_i} \,
              \operatorname{softmax}_i \frac{\lambda (L - z)}{\mu (n - z)}

    Args:
        losses: :math:`L`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, positive; on the simplex by convention.
        ideal: :math:`z`, shape ``[K]`` or a number.
        nadir: :math:`n`, shape ``[K]`` or a number; ``None`` for a divisor of 1.
        mu: :math:`\mu > 0`; towards 0 the coefficients become those of :func:`tchebycheff`.

    Returns:
        :math:`c = \partial g_\mu / \partial L`, shape ``[K]``, in float32 or wider, of
        :func:`smooth_tchebycheff_value`.

    Raises:
        BalanceValueError: ``mu`` is not positive and finite.

    Source:
        As :func:`smooth_tchebycheff_value`.

    Example:
        >>> import torch
        >>> smooth_tchebycheff(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 0.5]), 0.0, None, 1.0)
        tensor([0.1604, 0.3396])
    """
    check_positive("mu", mu)
    scale = _over_range(preference, ideal, nadir)
    return scale * smooth_argmax(at_least_float32(losses) - ideal, mu, widest(scale))


def smooth_max(values: Tensor, mu: float, scale: Tensor | None = None) -> Tensor:
    """Smooth maximum of ``scale * values`` along the first dimension, in the values' dtype."""
    highest, exponents = _exponents(values, mu, scale)
    return (highest + mu * torch.logsumexp(exponents, dim=0)).to(values.dtype)


def smooth_argmax(values: Tensor, mu: float, scale: Tensor | None = None) -> Tensor:
    """Shares in :func:`smooth_max`, its gradient with respect to ``scale * values``."""
    return torch.softmax(_exponents(values, mu, scale)[1], dim=0).to(values.dtype)


def _exponents(values: Tensor, mu: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maximum of ``scale * values``, and all of them minus it, over ``mu``.

    The maximum goes before anything is multiplied up or divided by a small ``mu``, so that what
    overflows is minus infinity. In float32 ``mu`` itself might be rounded to 0.
    """
    values = widest(values)
    unit = None
    if scale is not None:
        unit = scale.abs().amax().clamp(min=1.0)
        values = scale / unit * values
    highest = values.amax(dim=0)
    below = values - highest
    if unit is not None:
        highest, below = unit * highest, unit * below
    return highest, below / max(mu, torch.finfo(values.dtype).tiny)


def _over_range(preference: Tensor, ideal: Tensor | float, nadir: Tensor | float | None) -> Tensor:
    preference = at_least_float32(preference)
    return preference if nadir is None else preference / (nadir - ideal)


def smooth_tchebycheff_log_value(
    losses: Tensor, preference: Tensor, nadir: Tensor | float | None, mu: float
) -> Tensor:
    r"""The smooth Tchebycheff scalarization of log-losses, as published for multi-task learning.

    .. math:: g_\mu(L) = K \mu \log \sum_i \exp \frac{K \lambda_i \log (L_i / n_i)}{\mu}

    The ideal point is implicit in the logarithm. With equal preferences and :math:`\mu = 1` this is
    :math:`K \log \sum_i L_i / n_i`, which is far from a maximum; a smaller :math:`\mu` is closer
    to it.

    Args:
        losses: :math:`L > 0`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, on the simplex; :math:`1/K` each is the
            published code.
        nadir: :math:`n > 0`, the unit of each loss, shape ``[K]`` or a number; ``None`` for 1.
        mu: :math:`\mu > 0`, in units of :math:`\log L`.

    Returns:
        The value, a 0-d tensor in float32 or wider.

    Raises:
        BalanceValueError: ``mu`` is not positive and finite.

    Source:
        Lin et al., ICML 2024 (arXiv 2402.19078), and its official multi-task code, whose reported
        value lacks a constant (the maximum that it subtracts) and which adds 1e-20 inside the
        logarithm; the gradient is the same.

    Example:
        >>> import torch
        >>> losses, preference = torch.tensor([0.5, 2.0, 0.1]), torch.full((3,), 1 / 3)
        >>> smooth_tchebycheff_log_value(losses, preference, torch.tensor([1.0, 4.0, 0.5]), 1.0)
        tensor(0.5470)
    """
    check_positive("mu", mu)
    count = len(losses)
    return count * smooth_max(count * preference * _log_ratio(losses, nadir), mu)


def smooth_tchebycheff_log(
    losses: Tensor, preference: Tensor, nadir: Tensor | float | None, mu: float
) -> Tensor:
    r"""Coefficients of the smooth Tchebycheff scalarization of log-losses.

    .. math:: c_i = \frac{K^2 \lambda_i}{L_i} \,
              \operatorname{softmax}_i \frac{K \lambda \log (L / n)}{\mu}

    Args:
        losses: :math:`L > 0`, shape ``[K]``.
        preference: :math:`\lambda`, shape ``[K]``, on the simplex; with :math:`1/K` each,
            :math:`K^2 \lambda_i = K`.
        nadir: :math:`n > 0`, shape ``[K]`` or a number; ``None`` for 1.
        mu: :math:`\mu > 0`; the official multi-task code uses 1.

    Returns:
        :math:`c = \partial g_\mu / \partial L`, shape ``[K]``, in float32 or wider, of
        :func:`smooth_tchebycheff_log_value`.

    Raises:
        BalanceValueError: ``mu`` is not positive and finite.

    Source:
        As :func:`smooth_tchebycheff_log_value`.

    Example:
        >>> import torch
        >>> losses, preference = torch.tensor([0.5, 2.0, 0.1]), torch.full((3,), 1 / 3)
        >>> smooth_tchebycheff_log(losses, preference, torch.tensor([1.0, 4.0, 0.5]), 1.0)
        tensor([2.5000, 0.6250, 5.0000])
    """
    check_positive("mu", mu)
    losses = at_least_float32(losses)
    scale = len(losses) * at_least_float32(preference)
    return len(losses) * scale * smooth_argmax(scale * _log_ratio(losses, nadir), mu) / losses


def _log_ratio(losses: Tensor, nadir: Tensor | float | None) -> Tensor:
    """Logarithm of losses over the nadir, a quotient that may underflow."""
    logs = at_least_float32(losses).log()
    if nadir is None:
        return logs
    return logs - (nadir.log() if isinstance(nadir, Tensor) else math.log(nadir))
