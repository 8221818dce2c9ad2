"""COSMOS: a weighted sum, and a reward for losses that lie along the preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moo_balance.functional._checks import precision, widest
from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    normalize_preference,
)
from moo_balance.weighting._perpendicular import normalize, perpendicular
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class COSMOS(Weighting):
    r"""COSMOS: a weighted sum of the losses minus their cosine similarity with the preference.

    .. math::
        g(L) = r \cdot L - \lambda \cos(r, L), \qquad
        d = \sum_i \Big( r_i - \lambda\, \frac{\hat r_i - \cos(r, L)\, \hat L_i}
        {\lVert L \rVert} \Big)\, g_i

    with unit vectors :math:`\hat r` and :math:`\hat L`. As published, the two terms want opposite
    things of an uneven preference: the sum lowers a loss the more, the larger its :math:`r_i`; the
    cosine is largest where losses are *proportional* to :math:`r`. With equal preferences the
    cosine wants equal losses. Losses are compared as they are, in their units, unlike in
    :class:`SumLog`, and the cosine's part grows as all losses shrink. :class:`PBI` has neither
    property.

    Coefficients: not normalised, and *negative* for a loss that is small in relation to the others,
    once :math:`\lambda / \lVert L \rVert` is large enough: such a loss is raised. A loss may rise,
    by intention.

    Args:
        penalty: :math:`\lambda \ge 0`. Default 1, within the paper's 0.01 … 8, which differ from
            data set to data set. With 0 it is a weighted sum.
        preference: :math:`r_i > 0` by name, scaled to sum 1. Default None: equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Ruchte & Grabocka, *Scalable Pareto Front Approximation for Deep Multi-Objective
    Learning* (ICDM 2021), arXiv 2103.13392. There the model is given :math:`r`, too, which is drawn
    anew for each batch.

    Example:
        >>> import torch
        >>> from moo_balance import COSMOS
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([1.0, 3.0]))
        >>> COSMOS().weights(statistics, {}).coefficients
        tensor([0.3658, 0.5447])
    """

    penalty: float = 1.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "penalty", 0.0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return {}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        preference = widest(normalize_preference(self.preference, statistics))
        wanted, _ = normalize(preference)
        losses, length = normalize(widest(statistics.losses))
        slope = perpendicular(wanted, losses, precision(statistics.losses))
        slope = torch.where(length > 0, slope / length, 0.0)
        coefficients = (preference - self.penalty * slope).to(statistics.losses)
        return WeightingOutput(coefficients, coefficients, state)
