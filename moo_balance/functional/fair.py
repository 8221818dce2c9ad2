"""Weights that are fair in the sense of alpha-fairness, Nash bargaining among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moo_balance.functional._checks import check_gramian, check_positive, precision, result_dtype
from moo_balance.functional._pair import Pair, read_pair
from moo_balance.functional._preferences import read_preference

SHORTEST = 1e-4
"""Where unit gradients have a shorter convex combination, the direction fades out."""

_EPS = torch.finfo(torch.float64).eps
_STEPS = 80


def fair_weights(gramian: Tensor, alpha: float = 1.0, preference: Tensor | None = None) -> Tensor:
    r"""Weights of the direction that divides its improvements fairly among the losses.

    With :math:`d = \sum_i w_i g_i`, and preferences :math:`p` of mean 1,

    .. math:: g_i^\top d = (G w)_i = \left( \frac{p_i}{w_i} \right)^{1/\alpha}

    which is where :math:`\sum_i p_i \frac{(g_i^\top d)^{1 - \alpha}}{1 - \alpha}` is largest (with
    a logarithm for :math:`\alpha = 1`) among directions of the length of :math:`d`. No gradient
    conflicts with :math:`d`.
    :math:`\alpha = 1` is the Nash bargaining solution, :math:`G w = p / w`: it does not depend on
    the units of the losses, and :math:`\lVert d \rVert^2 = K`. The larger :math:`\alpha`, the more
    it favours the loss that improves least.

    The weights are unique, also where gradients depend on each other linearly. Two gradients have
    one equation in one unknown; more are solved by a damped Newton method, which converges from
    anywhere, on the CPU in float64. Either takes one copy to the host.

    There is no solution where a convex combination of the gradients vanishes, at a
    Pareto-stationary point. Close to one weights grow without limit, along a direction made of what
    rounding leaves. So where the shortest convex combination of the unit gradients has a length
    :math:`\mu < 10^{-4}`, a ridge of :math:`10^{-8} - \mu^2` is added to their cosines, with which
    steps fade out there. Elsewhere the equation holds up to rounding.

    Args:
        gramian: :math:`G_{ij} = g_i^\top g_j`, shape ``[K, K]``.
        alpha: :math:`\alpha > 0`.
        preference: :math:`p`, positive, shape ``[K]``, in any unit; ``None`` for equal ones.

    Returns:
        :math:`w > 0`, shape ``[K]``, on the device of ``gramian``, in its dtype or float32 if
        wider. A zero gradient has weight 0, and is ignored.

    Raises:
        BalanceValueError: ``gramian`` is not square, not finite or (for K > 2) not positive
            semidefinite, ``alpha`` is not positive, or ``preference`` is not positive or does not
            match it.
        ConvergenceError: The equation does not hold to tolerance (for K > 2).

    Source:
        Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024 (arXiv
        2402.15638), equation 4; Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022
        (arXiv 2202.01017), Claim 3.1, with weights in the bargaining.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[4.0, -3.0], [-3.0, 9.0]])  # a cosine of -1/2
        >>> weights = fair_weights(gramian)
        >>> weights
        tensor([0.7071, 0.4714])
        >>> gramian @ weights * weights
        tensor([1.0000, 1.0000])
    """
    check_positive("alpha", alpha)
    check_gramian(gramian)
    values = read_preference(preference, gramian)
    result = result_dtype(gramian)
    if gramian.shape[0] == 2:
        both = _of_two(read_pair(gramian), 1 / alpha, values or [1.0, 1.0])
        weights = torch.tensor(both, dtype=torch.float64, device="cpu")
    else:
        from moo_balance.functional._fair import solve_fair  # loads NumPy

        weights = solve_fair(gramian, 1 / alpha, values, precision(gramian))
    # An inverse of tiny norms may leave the range of a narrow dtype.
    return weights.clamp(max=torch.finfo(result).max).to(result).to(gramian.device)


def _of_two(pair: Pair, power: float, preference: list[float]) -> list[float]:
    r"""Two gradients: the ratio of the two lengths, then their size.

    With :math:`s_i = w_i \lVert g_i \rVert`, the cosine c and :math:`\gamma = 1 / \alpha`, the
    equation is :math:`s_i^\gamma (s_i + c s_j) = q_i`, of which the ratio has no common factor.
    """
    *norms, cosine = pair
    if 0.0 in norms:
        return [_alone(norm, power) for norm in norms]
    # The ridge on the cosines, as a factor of the diagonal that is moved to the right-hand side.
    diagonal = 1 + max(SHORTEST**2 - (1 + cosine) / 2, 0.0)
    cosine /= diagonal
    logs = [math.log(norm) for norm in norms]
    fair = [
        power * math.log(p) + (power - 1) * log - math.log(diagonal)
        for p, log in zip(preference, logs, strict=True)
    ]
    large = int(fair[1] > fair[0])
    ratio = _log_ratio(cosine, power, fair[large] - fair[1 - large])
    log_length = (fair[large] - math.log(1 + cosine * math.exp(-ratio))) / (1 + power)
    sizes = [log_length, log_length]
    sizes[1 - large] -= ratio
    return [_exp(size - log) for size, log in zip(sizes, logs, strict=True)]


def _alone(norm: float, power: float) -> float:
    """The weight of a gradient that is the only one."""
    return _exp(-2 * math.log(norm) / (1 + power)) if norm else 0.0


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, 709.0))


def _log_ratio(cosine: float, power: float, difference: float) -> float:
    r"""Solve :math:`\gamma x + \log(1 + c e^{-x}) - \log(c + e^{-x}) = t` for :math:`x \ge 0`.

    The left side rises from 0 and lies above :math:`\gamma x`. Newton's method, with a bisection
    where it leaves the interval in which the solution is known to be.
    """
    low, high = 0.0, difference / power
    if cosine < 0.0:
        high = min(high, -math.log(-cosine))
    ratio = min(difference / (1 + power), high)
    for _ in range(_STEPS):
        small = math.exp(-ratio)
        rest = cosine + small
        if rest <= 0.0:
            excess, slope = math.inf, math.inf
        else:
            excess = power * ratio + math.log((1 + cosine * small) / rest) - difference
            slope = power + 1 / (1 + cosine * small) - cosine / rest
        low, high = (low, ratio) if excess > 0.0 else (ratio, high)
        step = excess / slope if math.isfinite(excess) else math.inf
        if abs(step) <= 4 * _EPS * ratio:
            break
        ratio = ratio - step if low < ratio - step < high else (low + high) / 2
    return ratio
