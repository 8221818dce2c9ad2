"""Tchebycheff scalarizations: minimise the worst of the weighted losses, or a smooth maximum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional import smooth_tchebycheff, smooth_tchebycheff_log, tchebycheff
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    FloatOrByName,
    advise,
    broadcastable,
    check_common,
    check_flag,
    check_names,
    check_range,
    check_whole,
    constant_state,
    normalize_preference,
    values_by_name,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class Tchebycheff(Weighting):
    r"""The weighted Tchebycheff scalarization: only the worst loss is trained.

    .. math::
        g(L) = \max_i \lambda_i (L_i - z_i) + \rho \sum_i \lambda_i (L_i - z_i)

    Every Pareto-optimal point, of a non-convex front too, minimises it for some preference
    :math:`\lambda`. Losses that tie for the maximum share it equally.

    Coefficients: :math:`\partial g / \partial L_i`, that is :math:`\lambda_j` on the worst loss
    plus :math:`\rho \lambda`. With equal preferences they sum to :math:`1/K + \rho`. Any
    loss but the worst may rise.

    Args:
        preference: :math:`\lambda_i > 0` by name, scaled to sum 1. Default None: equal.
        ideal: :math:`z_i`, a number, one per name, or ``"running"`` for the least value each loss
            has had so far. Default 0.
        augment: :math:`\rho \ge 0`. Default 0 (classic); a small value such as 0.1 (libmoon's ASF)
            rules out weakly Pareto-optimal points.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Bowman (1976); Steuer & Choo (1983) for the augmented form.

    Example:
        >>> import torch
        >>> from moo_balance import Tchebycheff
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([0.5, 2.0]))
        >>> Tchebycheff().weights(statistics, {}).coefficients
        tensor([0.0000, 0.5000])
    """

    preference: Mapping[str, float] | None = None
    ideal: FloatOrByName | Literal["running"] = 0.0
    augment: float = 0.0

    def __post_init__(self) -> None:
        check_common(self)
        if self.ideal != "running":
            check_range(self, "ideal", text="running", named=True)
        check_range(self, "augment", 0.0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("ideal", self.ideal, names)
        return (
            {"ideal": constant_state(math.inf, len(names), device)}
            if self.ideal == "running"
            else {}
        )

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        ideal: Tensor | float
        if isinstance(self.ideal, str):
            ideal = torch.minimum(state["ideal"], statistics.losses)
            state = {"ideal": ideal}
        else:
            ideal = broadcastable(self.ideal, statistics)
        preference = normalize_preference(self.preference, statistics)
        coefficients = tchebycheff(statistics.losses, preference, ideal, self.augment)
        return WeightingOutput(coefficients / coefficients.sum(), coefficients, state)


@dataclass(frozen=True)
class SmoothTchebycheff(Weighting):
    r"""Smooth Tchebycheff: a log-sum-exp in place of the maximum.

    .. math::
        g_\mu(L) = \mu \log \sum_i \exp\Big(\frac{\lambda_i}{\mu}\,
        \frac{L_i - z_i}{n_i - z_i}\Big)

    lies between the maximum and the maximum plus :math:`\mu \log K`. Small :math:`\mu` follows
    the worst loss, large :math:`\mu` the weighted sum. With `log`, the form published for
    multi-task learning,

    .. math::
        K \mu \log \sum_i \exp\Big(\frac{K \lambda_i}{\mu} \log \frac{L_i - z_i}{n_i - z_i}\Big).

    Coefficients: the partial derivatives; with neither nadir nor `log`,
    :math:`\lambda_i \operatorname{softmax}_i`, which for equal preferences sum to :math:`1/K`. A
    loss may rise.

    Args:
        mu: :math:`\mu > 0`. Default 0.1 (libmoon; the papers try 0.01 … 1, the multi-task code
            uses 1, where the log form is no longer close to a maximum).
        preference: :math:`\lambda_i > 0` by name, scaled to sum 1. Default None: equal.
        ideal: :math:`z_i`, a number or one per name. Default 0.
        nadir: :math:`n_i > z_i`, a number or one per name. Default None: no division.
        warmup_steps: For this many steps descend on :math:`\sum_i \log (L_i - z_i)`, and take the
            mean of each loss over them as its nadir. Default 0 (off). The published code counts
            epochs (4) and averages over the last of them.
        log: The logarithmic form. Default False.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, `nadir` and `warmup_steps` are both
            given; from ``backward``, when a loss is not above its ideal where a log is taken.

    Source: Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*
    (ICML 2024), arXiv 2402.19078.

    Example:
        >>> import torch
        >>> from moo_balance import SmoothTchebycheff
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([1.0, 1.2]))
        >>> SmoothTchebycheff(mu=0.1).weights(statistics, {}).weights
        tensor([0.2689, 0.7311])
    """

    mu: float = 0.1
    preference: Mapping[str, float] | None = None
    ideal: FloatOrByName = 0.0
    nadir: FloatOrByName | None = None
    warmup_steps: int = 0
    log: bool = False

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "mu", 0.0, open=True)
        check_range(self, "ideal", named=True)
        if self.nadir is not None:
            check_range(self, "nadir", named=True)
            self._check_nadir()
        check_whole(self, "warmup_steps", 0)
        check_flag(self, "log")
        if self.nadir is not None and self.warmup_steps:
            raise BalanceValueError(
                "Parameters `nadir` and `warmup_steps` of SmoothTchebycheff should not both be "
                "given: the warm-up measures the nadir. Leave one out."
            )

    bound_reason = TAKES_LOG
    leaves_out_satisfied = True

    @property
    def bound_advice(self) -> str:
        without = ["`log=False`"] * self.log + ["`warmup_steps=0`"] * bool(self.warmup_steps)
        return advise(self, f"a lower `ideal`, or {' and '.join(without)}")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        if self.log or self.warmup_steps:
            return values_by_name(self.ideal, names)
        return super().lower_bounds(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("ideal", self.ideal, names)
        check_names("nadir", self.nadir, names, complete=True)
        if not self.warmup_steps:
            return {}
        return {key: constant_state(0.0, len(names), device) for key in ("nadir", "seen")}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        if statistics.step < self.warmup_steps:
            return self._warm_up(statistics, state)
        losses, ideal = statistics.losses, broadcastable(self.ideal, statistics)
        preference = normalize_preference(self.preference, statistics)
        nadir, left_out, share = self._nadir(statistics, state), statistics.satisfied, None
        if left_out is not None:
            # Infinitely far below all others, for the softmax.
            losses = losses.masked_fill(left_out, -math.inf)
            preference = preference.masked_fill(left_out, 1.0)
            share = 1.0 - left_out.to(losses.dtype).mean()
        if self.log:
            distances = (losses - ideal).clamp(min=0.0)
            span = 1.0 if nadir is None else nadir - ideal
            scaled = preference if share is None else preference * share
            coefficients = smooth_tchebycheff_log(distances, scaled, span, self.mu)
            coefficients = coefficients if share is None else coefficients * share
        else:
            coefficients = smooth_tchebycheff(losses, preference, ideal, nadir, self.mu)
        if left_out is not None:
            coefficients = coefficients.masked_fill(left_out, 0.0)
        return WeightingOutput(coefficients / coefficients.sum(), coefficients, state)

    def _warm_up(self, statistics: Statistics, state: State) -> WeightingOutput:
        seen = state["seen"] + 1.0
        nadir = state["nadir"] + (statistics.losses - state["nadir"]) / seen
        coefficients = 1.0 / (statistics.losses - broadcastable(self.ideal, statistics))
        weights = normalize_preference(None, statistics)
        return WeightingOutput(weights, coefficients, {"nadir": nadir, "seen": seen})

    def _nadir(self, statistics: Statistics, state: State) -> Tensor | float | None:
        if self.nadir is not None:
            return broadcastable(self.nadir, statistics)
        if not self.warmup_steps:
            return None
        # A loss that was absent from the whole warm-up starts at its own value.
        return torch.where(state["seen"] > 0, state["nadir"], statistics.losses)

    def _check_nadir(self) -> None:
        ideal = self.ideal if isinstance(self.ideal, Mapping) else {}
        names = [*(self.nadir if isinstance(self.nadir, Mapping) else ()), *ideal] or [""]
        nadirs, ideals = values_by_name(self.nadir or 0.0, names), values_by_name(self.ideal, names)
        for name, nadir, low in zip(names, nadirs, ideals, strict=True):
            if nadir <= low and (not isinstance(self.nadir, Mapping) or name in self.nadir):
                where = f"`nadir[{name!r}]`" if name else "`nadir`"
                raise BalanceValueError(
                    f"Parameter {where} of SmoothTchebycheff should be above the ideal {low:g}. "
                    f"Found {nadir:g}."
                )
