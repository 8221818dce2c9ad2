"""DWA: losses that fall slowly get more weight, by means over windows of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moo_balance.weighting._arguments import check_common, check_names, check_range, check_whole
from moo_balance.weighting._rates import init_window_means, share, update_window_means
from moo_balance.weighting._shares import count_others
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class DWA(Weighting):
    r"""Dynamic Weight Average: the slower a loss falls, the more weight it gets.

    With :math:`\bar L_i(t)` the mean of a loss over the t-th window of `window` steps,

    .. math::
        d = \sum_i \lambda_i\, g_i, \qquad
        \lambda_i = K\, \frac{p_i\, e^{r_i / T}}{\sum_j p_j\, e^{r_j / T}}, \qquad
        r_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}

    and :math:`r_i = 1` until two windows of the loss are complete. A window is the clock that the
    paper takes from epochs. Where a loss is absent its mean is over the steps that had it, and a
    window without it does not count. The weights are known before the losses of a step, so
    gradient accumulation needs no gradient per loss.

    No unit matters: a rate is a quotient. Rates differ little and :math:`T` is 2, so the weights
    stay close to 1: unlike :class:`SumLog`, DWA leaves losses of different scales as they are and
    only corrects for their trend.

    Coefficients: sum to K; all are 1 in the first two windows, and where all rates are equal. A
    loss may rise.

    Args:
        window: Number of steps in a window. Default 25 (the codes of Nash-MTL and FAMO; the steps
            of an epoch give the form of the paper, LibMTL and TorchJD).
        temperature: :math:`T > 0`; the larger, the more equal the weights. Default 2 (paper, and
            all codes).
        preference: :math:`p_i > 0` by name, scaled to sum 1. With equal rates
            :math:`\lambda_i = K p_i`. Default None: equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is negative.

    Source: Liu, Johns, Davison, *End-to-End Multi-Task Learning with Attention* (CVPR 2019),
    arXiv 1803.10704, Equation 7.

    Example:
        >>> import torch
        >>> from moo_balance import DWA
        >>> from moo_balance.weighting import Statistics
        >>> rule = DWA(window=1)
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> for step, losses in enumerate([[4.0, 4.0], [1.0, 3.0], [1.0, 3.0]]):
        ...     statistics = Statistics(("a", "b"), torch.tensor(losses), step=step)
        ...     _, coefficients, state = rule.weights(statistics, state)
        >>> coefficients
        tensor([0.8756, 1.1244])
    """

    uses_losses = False
    leaves_out_satisfied = True

    window: int = 25
    temperature: float = 2.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_whole(self, "window", 1)
        check_range(self, "temperature", 0.0, open=True)

    bound_reason = "divides by its mean"
    bound_advice = "Give a loss that stays positive."

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return init_window_means(len(names), device)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        state = update_window_means(statistics, self.window, state)
        rates = torch.where(state["older"].isnan(), 1.0, state["newer"] / state["older"])
        shares = share(rates / self.temperature, self.preference, statistics)
        weights = (count_others(statistics) * shares).to(statistics.losses)
        return WeightingOutput(weights, weights, state)
