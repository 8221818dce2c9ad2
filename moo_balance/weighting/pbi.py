"""PBI: the distance to the ideal point along a direction, and a penalty for leaving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moo_balance.functional._checks import precision, widest
from moo_balance.weighting._arguments import (
    FloatOrByName,
    broadcastable,
    check_common,
    check_names,
    check_range,
    normalize_preference,
)
from moo_balance.weighting._perpendicular import normalize, perpendicular
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class PBI(Weighting):
    r"""Penalty-based boundary intersection: losses in a wanted ratio, and as small as that allows.

    With :math:`f = L - z` and the unit vector :math:`u`, :math:`u_i \propto 1 / p_i`,

    .. math::
        g(L) = d_1 + \theta\, d_2, \qquad d_1 = f \cdot u, \qquad
        d_2 = \lVert f - d_1 u \rVert, \qquad
        d = \sum_i \Big( u_i + \theta\, \frac{(f - d_1 u)_i}{d_2} \Big)\, g_i

    :math:`d_2` is zero where all :math:`p_i (L_i - z_i)` are equal, as at the solution of
    :class:`Tchebycheff` with the same preference; there its gradient counts as zero. Losses are
    compared as they are, in their units: unlike :class:`SumLog`, which knows no ratio, it needs
    losses or preferences that make them comparable.

    Coefficients: not normalised, and *negative* for a loss that is small in relation to the others,
    once :math:`\theta` is large enough: such a loss is raised. A loss may rise, by intention.

    Args:
        penalty: :math:`\theta \ge 0`. Default 5 (paper). With 0 it is a weighted sum.
        preference: :math:`p_i > 0` by name: the larger, the smaller the loss relative to the others
            at the solution. The paper and TorchJD give :math:`1 / p_i` instead, the direction
            itself. Default None: equal.
        ideal: :math:`z_i`, a number or one per name. Default 0.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Zhang & Li, *MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition*
    (IEEE Transactions on Evolutionary Computation 11, 2007).

    Example:
        >>> import torch
        >>> from moo_balance import PBI
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([1.0, 3.0]))
        >>> PBI(penalty=0.5).weights(statistics, {}).coefficients
        tensor([0.3536, 1.0607])
        >>> PBI(preference={"a": 3.0, "b": 1.0}).weights(statistics, {}).coefficients
        tensor([0.3162, 0.9487])
    """

    penalty: float = 5.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    ideal: FloatOrByName = 0.0

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "penalty", 0.0)
        check_range(self, "ideal", named=True)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("ideal", self.ideal, names)
        return {}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        preference = widest(normalize_preference(self.preference, statistics))
        direction, _ = normalize(preference.amin() / preference)
        losses, _ = normalize(widest(statistics.losses - broadcastable(self.ideal, statistics)))
        aside = perpendicular(losses, direction, precision(statistics.losses))
        unit, _ = normalize(aside)
        coefficients = (direction + self.penalty * unit).to(statistics.losses)
        return WeightingOutput(coefficients, coefficients, state)
