"""MovingAverage: a moving average around any weighting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.weighting._arguments import check_range, constant_state
from moo_balance.weighting._identity import method_name, with_nested
from moo_balance.weighting._wrapping import (
    WrappingWeighting,
    as_inner,
    check_weighting,
    inner_state,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput
from moo_balance.weighting.rescaled import Rescaled


@dataclass(frozen=True)
class MovingAverage(WrappingWeighting):
    r"""Momentum on the weights of any method, which mini-batches make noisy.

    With :math:`\hat c` the coefficients of the method and
    :math:`\hat\lambda = \hat c / \lVert \hat c \rVert_1` its shares,

    .. math::
        \lambda_k = \beta_k\,\lambda_{k-1} + (1 - \beta_k)\,\hat\lambda_k, \qquad
        d = \lVert \hat c_k \rVert_1 \sum_i \lambda_{k,i}\, g_i

    from :math:`\lambda_1 = \hat\lambda_1`. Averaged weights bring a stochastic method to a
    Pareto-stationary point, where the raw ones, correlated with the gradients that they were
    computed from, need not. ``"adaptive"`` averages the more, the less the weights move:

    .. math:: \beta_k = \max(0,\ 1 - k\,\lVert \hat\lambda_k - \lambda_{k-1} \rVert_1)

    It needs what the method needs. An absent loss keeps its share; the others divide the whole
    among themselves.

    Coefficients: sum to what those of the method sum to, as long as none is negative. The weights
    reported are :math:`\lambda`. A loss may rise, whatever the method: its weights are of the past.

    Args:
        weighting: The method, such as ``MGDA()``.
        beta: :math:`\beta \in [0, 1)`, or ``"adaptive"``. Default 0.9 (TorchJD's CR-MOGM).

    Raises:
        BalanceValueError: `beta` is out of range or `weighting` is no weighting.

    Source: Zhou et al., *On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond* (NeurIPS 2022), "CR-MOGM"; the adaptive rule as in the code of AdaOMD-TCH, which counts
    :math:`k` from 1. The published rule averages coefficients that sum to 1, and is this one. Where
    they do not, as those of :class:`Sum`, ``SumLog(renormalize=False)`` or a Nash bargaining, it
    would average the length of the step, too: here only the shares are averaged, and the length is
    that of the method in each step. Such a method keeps its reaction to a step in which gradients
    suddenly differ in length; the published rule, as in TorchJD, spreads it over
    :math:`1 / (1 - \beta)` steps.

    Example:
        >>> import torch
        >>> from moo_balance import MGDA, MovingAverage
        >>> from moo_balance.weighting import Statistics
        >>> weighting = MovingAverage(MGDA(), beta=0.5)
        >>> state = weighting.init(("a", "b"), torch.device("cpu"))
        >>> for norms in (1.0, 1.0), (3.0, 1.0):
        ...     gramian = torch.diag(torch.tensor(norms))
        ...     statistics = Statistics(("a", "b"), torch.ones(2), gramian)
        ...     _, coefficients, state = weighting.weights(statistics, state)
        >>> coefficients
        tensor([0.3750, 0.6250])
    """

    weighting: Weighting
    beta: float | Literal["adaptive"] = 0.9

    def __post_init__(self) -> None:
        check_weighting(self, "weighting", self.weighting)
        if any(isinstance(each, Rescaled) for each in with_nested(self.weighting)):
            raise BalanceValueError(
                "Parameter `weighting` of MovingAverage should have no Rescaled in it, as averaged "
                f"shares would meet the length of another step. Found {method_name(self.weighting)}"
                ". Write Rescaled(MovingAverage(...))."
            )
        if self.beta != "adaptive":
            check_range(self, "beta", 0.0, below=1.0, text="adaptive")

    def init(self, names: Sequence[str], device: torch.device) -> State:
        shares = constant_state(math.nan, len(names), device)
        return {"shares": shares, **as_inner(self.weighting.init(names, device))}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        _, coefficients, inner = self.weighting.weights(statistics, inner_state(state))
        before = state["shares"]
        if statistics.satisfied is not None:
            coefficients = coefficients.masked_fill(statistics.satisfied, 0.0)
            before = before.masked_fill(statistics.satisfied, 0.0)
        shares, size = _normalize(coefficients.to(before))
        before = torch.where(before.isnan(), shares, before)
        before, _ = _normalize(before)
        shares = before.lerp(shares, 1.0 - self._momentum(shares, before, statistics.step + 1))
        kept = {"shares": shares, **as_inner(inner)}
        return WeightingOutput(shares, (size * shares).to(coefficients), kept)

    def _momentum(self, shares: Tensor, before: Tensor, count: int) -> Tensor | float:
        if isinstance(self.beta, str):
            return (1.0 - count * (shares - before).abs().sum()).clamp(min=0.0)
        return self.beta


def _normalize(vector: Tensor) -> tuple[Tensor, Tensor]:
    """The vector divided by the sum of its absolute values, and that sum; zeros stay zeros."""
    size = vector.abs().sum()
    return torch.where(size > 0, vector / size, vector), size
