"""SoftAdapt: losses that rise, or fall slowly, get more weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.weighting._arguments import (
    advise,
    check_common,
    check_flag,
    check_names,
    check_range,
    check_whole,
)
from moo_balance.weighting._rates import init_window_means, share, update_window_means
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class SoftAdapt(Weighting):
    r"""SoftAdapt: weights by the slope of each loss.

    With :math:`\bar L_i(t)` the mean of a loss over the t-th window of `window` steps,

    .. math::
        d = \sum_i w_i\, g_i, \qquad
        w_i = \frac{p_i\, e^{s_i / T}}{\sum_j p_j\, e^{s_j / T}}, \qquad
        s_i = \bar L_i(t-1) - \bar L_i(t-2)

    and :math:`s_i = 0` until two windows of the loss are complete. Where a loss is absent its mean
    is over the steps that had it, and a window without it does not count. The weights are known
    before the losses of a step, so gradient accumulation needs no gradient per loss. The published
    variants, which go together:

    * `normalize`: :math:`s_i / \sum_j |s_j|` in place of :math:`s_i`;
    * `loss_weighted`: :math:`w_i \propto p_i\, \bar L_i(t-1)\, e^{s_i / T}`.

    A slope is in the unit of its loss, and next to a large loss the slope of a small one vanishes,
    with `normalize` too. With relative slopes the method is :class:`ReLoBRaLo` without its memory
    (``beta=0``, ``lookback=0``), or :class:`DWA`. It differs from :class:`SumLog`, which removes
    scales: `loss_weighted` gives a large loss even more weight.

    Coefficients: sum to 1; equal in the first two windows (but see `preference`). A loss may rise.

    Args:
        window: Number of steps in a window. Default 25, as for :class:`DWA`; the paper compares
            single steps or epochs, and smooths by a difference formula of higher order. A slope
            between two steps (1) is mostly noise of the mini-batches.
        temperature: :math:`T > 0`, the paper's :math:`1 / \beta`. Default 10 (official code:
            :math:`\beta = 0.1`). A negative :math:`\beta`, which prefers the fastest loss, is left
            out.
        normalize: Divide the slopes by the sum of their magnitudes. Default False (paper).
        loss_weighted: Multiply by the mean losses. Default False (paper).
        preference: :math:`p_i > 0` by name, scaled to sum 1. With equal slopes :math:`w_i = p_i`
            (without `loss_weighted`). Default None: equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is negative although it is `loss_weighted`.

    Source: Heydari, Thompson, Mehmood, *SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
    Networks with Multi-Part Loss Functions* (2019), arXiv 1912.12355.

    Example:
        >>> import torch
        >>> from moo_balance import SoftAdapt
        >>> from moo_balance.weighting import Statistics
        >>> rule = SoftAdapt(window=1, temperature=1.0)
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> for step, losses in enumerate([[4.0, 4.0], [2.0, 3.0], [1.0, 3.0]]):
        ...     statistics = Statistics(("a", "b"), torch.tensor(losses), step=step)
        ...     _, coefficients, state = rule.weights(statistics, state)
        >>> coefficients
        tensor([0.2689, 0.7311])
    """

    uses_losses = False
    leaves_out_satisfied = True

    window: int = 25
    temperature: float = 10.0
    normalize: bool = False
    loss_weighted: bool = False
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_whole(self, "window", 1)
        check_range(self, "temperature", 0.0, open=True)
        check_flag(self, "normalize", "loss_weighted")

    bound_reason = "multiplies by its mean"

    @property
    def bound_advice(self) -> str:
        return advise(self, "`loss_weighted=False`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names) if self.loss_weighted else super().lower_bounds(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return init_window_means(len(names), device)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        state = update_window_means(statistics, self.window, state)
        newer, older = state["newer"], state["older"]
        if statistics.satisfied is not None:
            newer = newer.masked_fill(statistics.satisfied, math.nan)
        slopes = torch.where(older.isnan(), 0.0, newer - older).nan_to_num(0.0)
        if self.normalize:
            slopes = _normalize(slopes)
        logits = slopes / self.temperature
        if self.loss_weighted:
            logits = logits + _fill(newer).log()
        weights = share(logits, self.preference, statistics).to(statistics.losses)
        return WeightingOutput(weights, weights, state)


def _normalize(slopes: Tensor) -> Tensor:
    """Slopes over the sum of their magnitudes, which may overflow; zeros stay zeros."""
    largest = slopes.abs().amax()
    slopes = torch.where(largest > 0, slopes / largest, slopes)
    return slopes / slopes.abs().sum().clamp(min=1.0)


def _fill(means: Tensor) -> Tensor:
    """The means; that of all others for a loss that has none yet, 1 where no loss has one."""
    average = means.nanmean()
    return torch.where(means.isnan(), torch.where(average.isnan(), 1.0, average), means)
