"""Learned scales of losses: what uncertainty weighting and IMTL-L share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moo_balance.weighting._adam import adam, init_adam
from moo_balance.weighting._arguments import (
    FloatOrByName,
    advise,
    check_common,
    check_names,
    check_range,
    constant_state,
    lower_limits,
    relative_preference,
    shifted_losses,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


class LearnedScaleWeighting(Weighting):
    r"""Descends on :math:`\sum_i f_i e^{t_i} D_i - r\,t_i` over :math:`t`, by Adam.

    A subclass gives the arguments, as fields, and the numbers :math:`f_i` and :math:`r`. The
    coefficients are :math:`f_i e^{t_i}`, and the gradient in :math:`t_i` is
    :math:`f_i e^{t_i} D_i - r`, which is zero where the coefficient is :math:`r / D_i`.
    """

    lr: float
    initial: float | Literal["first"]
    bounds: FloatOrByName
    preference: Mapping[str, float] | None

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "lr", 0.0, open=True)
        if self.initial != "first":
            check_range(self, "initial", text="first")
        check_range(self, "bounds", named=True)

    @property
    @abstractmethod
    def _pull(self) -> float:
        """The number r."""

    @abstractmethod
    def _factors(self, statistics: Statistics) -> Tensor:
        """The numbers f, shape [K]."""

    @abstractmethod
    def _first_scale(self) -> float:
        """The scale t that belongs to the number `initial`."""

    leaves_out_satisfied = True

    @property
    def uses_losses(self) -> bool:
        return self.initial == "first"

    bound_reason = "learns the scale of its distance to that bound, which has no end below it"

    @property
    def bound_advice(self) -> str:
        return advise(self, "lower `bounds`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_limits(self.bounds, 0.0, names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("bounds", self.bounds, names)
        check_names("preference", self.preference, names, complete=True)
        start = math.nan if self.initial == "first" else self._first_scale()
        return {
            "log_scales": constant_state(start, len(names), device),
            **init_adam(len(names), device),
        }

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        scales = state["log_scales"]
        distances = shifted_losses(self.bounds, 0.0, statistics).to(scales)
        factors = self._factors(statistics).to(scales)
        if self.initial == "first":
            stationary = math.log(self._pull) - factors.log() - distances.log()
            scales = torch.where(scales.isnan(), stationary, scales)
        raw = factors * scales.exp()
        # The square of what is cut off here would overflow in Adam.
        limit = torch.finfo(scales.dtype).max ** 0.5
        gradient = (raw * distances - self._pull).clamp(max=limit)
        # Where a loss starts its own scale this is but rounding, which Adam would blow up.
        gradient = gradient.masked_fill(state["log_scales"].isnan(), 0.0)
        following, moments = adam(scales, gradient, torch.ones_like(scales), state, self.lr)
        coefficients = raw.to(statistics.losses)
        if self.preference is not None:
            coefficients = relative_preference(self.preference, statistics) * coefficients
        return WeightingOutput(coefficients, coefficients, {"log_scales": following, **moments})
