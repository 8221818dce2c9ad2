"""Weightings that use no gradient and keep nothing: the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moo_balance.weighting._arguments import (
    TAKES_LOG,
    FloatOrByName,
    advise,
    apply_floor,
    check_common,
    check_flag,
    check_mapping,
    check_names,
    check_range,
    constants_like,
    copy_mappings,
    init_floor,
    log_coefficients,
    lower_limits,
    normalize_preference,
    relative_preference,
    shifted_losses,
    values_by_name,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class Sum(Weighting):
    r"""The plain sum of the losses: what most training loops do.

    .. math:: d = \sum_i g_i

    Coefficients: K ones (they sum to K), so that ``Sum`` is ``sum(losses).backward()``. A loss may
    rise.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, Sum
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
        >>> _ = optimizer.backward({"a": w[0] ** 2, "b": w.sum()})
        >>> w.grad
        tensor([3., 1.])
    """

    uses_losses = False

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        ones = torch.ones_like(statistics.losses)
        return WeightingOutput(ones, ones, state)


@dataclass(frozen=True)
class FixedWeights(Weighting):
    r"""A weighted sum of the losses with constant weights, by name.

    .. math:: d = \sum_i w_i g_i

    Coefficients: the weights as given, not normalised. Any finite number is allowed, so that an
    adversarial term can carry a minus sign. A loss may rise.

    Args:
        values: Weight of each loss, by name; every loss needs one.

    Raises:
        BalanceValueError: A weight is not finite, or the names are not those of the losses.

    Example:
        >>> from moo_balance import FixedWeights
        >>> FixedWeights({"rate": 1.0, "distortion": 0.5})
        FixedWeights(values={'rate': 1.0, 'distortion': 0.5})
    """

    uses_losses = False

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        copy_mappings(self)
        check_mapping(self, "values")

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("values", self.values, names, complete=True)
        return {}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        values = values_by_name(self.values, statistics.names)
        weights = constants_like(values, statistics.losses).clone()
        return WeightingOutput(weights, weights, state)


@dataclass(frozen=True)
class SumLog(Weighting):
    r"""The sum of log losses, indifferent to the scale of each.

    .. math::
        d = c \sum_i \frac{p_i}{D_i}\, g_i, \qquad D_i = L_i - b_i + s_i, \qquad
        c = \Big(\sum_i \frac{p_i}{D_i}\Big)^{-1}

    With ``floor=0`` its stationary points are those that FAMO reaches whenever its logit decay is
    positive (FAMO, Section 3), so it is the baseline that any log-loss method should be compared
    with.

    Coefficients: sum to 1 with `renormalize`, as for all log methods here; without it and without a
    `floor` they are :math:`1/D_i` (:math:`K p_i / D_i` with a preference), the "scale-invariant"
    baseline as published with FAMO and Nash-MTL. A loss may rise.

    Args:
        bounds: :math:`b_i`, a number or one per name. Default 0 (FAMO's code).
        shift: :math:`s_i`, likewise. Default 0; 1 makes it :math:`\log(1 + L)`.
        renormalize: Multiply by :math:`c`. Default True, so that the log methods share one scale.
        floor: :math:`\rho \ge 0`, to add :math:`\rho \max D_i` to each :math:`D_i`, where the
            maximum is over the steps so far: no loss then counts as more than :math:`1/\rho` times
            smaller than it was. It has no unit, so that the scale of a loss still does not matter.
            Default 0.1; as published it is 0, which was worth less in our measurements. See
            :ref:`captured losses <capture>`.
        preference: :math:`p_i > 0` by name, scaled to sum 1: the exponents in the product of the
            :math:`D_i` that is minimised. Default None: equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range; from ``backward``, when a loss is
            below :math:`b_i - s_i`.

    Example:
        >>> import torch
        >>> from moo_balance import SumLog
        >>> from moo_balance.weighting import Statistics
        >>> losses = torch.tensor([0.5, 2.0])
        >>> SumLog().weights(Statistics(("a", "b"), losses), {}).coefficients
        tensor([0.8000, 0.2000])
    """

    leaves_out_satisfied = True

    bounds: FloatOrByName = 0.0
    shift: FloatOrByName = 0.0
    renormalize: bool = True
    floor: float = field(default=0.1, kw_only=True)
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "floor", 0.0)
        check_range(self, "bounds", named=True)
        check_range(self, "shift", named=True)
        check_flag(self, "renormalize")

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("bounds", self.bounds, names)
        check_names("shift", self.shift, names)
        return init_floor(self.floor, len(names), device)

    bound_reason = TAKES_LOG

    @property
    def bound_advice(self) -> str:
        return advise(self, "lower `bounds` or a larger `shift`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_limits(self.bounds, self.shift, names)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        distances = shifted_losses(self.bounds, self.shift, statistics)
        distances, state = apply_floor(self.floor, distances, state)
        weights = normalize_preference(self.preference, statistics)
        if self.renormalize:
            return WeightingOutput(weights, log_coefficients(weights, distances), state)
        if self.preference is None:
            return WeightingOutput(weights, 1.0 / distances, state)
        factors = relative_preference(self.preference, statistics)
        return WeightingOutput(weights, factors / distances, state)
