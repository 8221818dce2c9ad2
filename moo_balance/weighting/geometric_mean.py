"""The geometric mean of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moo_balance.functional._checks import widest
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    check_common,
    check_names,
    normalize_preference,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class GeometricMean(Weighting):
    r"""The geometric mean of the losses, "GLS" in the literature.

    .. math::
        d = \nabla \prod_i L_i^{p_i} = \sum_i \frac{p_i\, m}{L_i}\, g_i, \qquad
        m = \exp \sum_i p_i \log L_i

    computed from logarithms, as a product of losses overflows. It has the direction of
    ``SumLog(floor=0)`` and minimises the same; only the length differs, which here is in the unit
    of the losses and shrinks as they do.

    Coefficients: not normalised; scaling one loss by :math:`s` multiplies all of them by
    :math:`s^{p}`, and that of the loss itself by :math:`1/s` besides. A loss may rise.

    Args:
        preference: :math:`p_i > 0` by name, scaled to sum 1. Default None: :math:`1/K` (paper).

    Raises:
        BalanceValueError: `preference` is not positive or names no loss; from ``backward``, when a
            loss is negative.

    Source: Chennupati et al., *MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning* (CVPR Workshops 2019).

    Example:
        >>> import torch
        >>> from moo_balance import GeometricMean
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([0.5, 2.0]))
        >>> GeometricMean().weights(statistics, {}).coefficients
        tensor([1.0000, 0.2500])
    """

    leaves_out_satisfied = True

    preference: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_common(self)

    bound_reason = TAKES_LOG
    bound_advice = "Give a loss that stays positive."

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return {}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        weights = normalize_preference(self.preference, statistics)
        logs, shares = widest(statistics.losses).log(), widest(weights)
        coefficients = shares * torch.exp(shares.dot(logs) - logs)
        coefficients = coefficients.clamp(max=torch.finfo(weights.dtype).max).to(weights)
        return WeightingOutput(weights, coefficients, state)
