"""Candidates for a default method, besides the published methods and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moo_balance as mb
from moo_balance import Statistics, Weighting, WeightingOutput
from moo_balance.weighting import State

Candidate = tuple[type[Weighting], dict[str, Any], str]
"""A method, its arguments, and the method whose learning rate it takes."""


@dataclass(frozen=True)
class TemperedNorms(mb.GradientNorms):
    """`GradientNorms` with each ratio raised to a power: between the plain sum and equal norms."""

    power: float = 0.5

    def _ratios(self, norms: Tensor, length: Tensor) -> Tensor:
        return super()._ratios(norms, length) ** self.power


@dataclass(frozen=True)
class NormsIfFar(mb.GradientNorms):
    """The plain sum while norms lie within a factor, else `GradientNorms`."""

    factor: float = 10.0

    def _ratios(self, norms: Tensor, length: Tensor) -> Tensor:
        ratios = super()._ratios(norms, length)
        near = ratios.amax() < self.factor * ratios.amin()
        return torch.where(near, torch.ones_like(ratios), ratios)


@dataclass(frozen=True)
class GeometricBlend(Weighting):
    """The geometric mean of the coefficients of two methods, scaled to sum 1."""

    first: Weighting
    second: Weighting
    every: int = 10

    uses_gramian = True

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return list(map(max, self.first.lower_bounds(names), self.second.lower_bounds(names)))

    def init(self, names: Sequence[str], device: torch.device) -> State:
        states = {
            "first": self.first.init(names, device),
            "second": self.second.init(names, device),
        }
        return {f"{part}/{key}": v for part, state in states.items() for key, v in state.items()}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        logs, following = [], {}
        for part, method in (("first/", self.first), ("second/", self.second)):
            own = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
            output = method.weights(statistics, own)
            following |= {f"{part}{key}": value for key, value in output.state.items()}
            logs.append(output.coefficients.clamp(min=1e-30).log())
        coefficients = torch.softmax((logs[0] + logs[1]) / 2, 0)
        return WeightingOutput(coefficients, coefficients, following)


CANDIDATES: dict[str, Candidate] = {
    "AnalyticQP(shift=0, floor=0.1)": (
        mb.AnalyticQP,
        {"shift": 0.0, "floor": 0.1},
        "AnalyticQP",
    ),
    "AnalyticQP(shift=0, floor=1)": (
        mb.AnalyticQP,
        {"shift": 0.0, "floor": 1.0},
        "AnalyticQP",
    ),
    'AnalyticQP("simplex", shift=0, floor=0.1)': (
        mb.AnalyticQP,
        {"projection": "simplex", "shift": 0.0, "floor": 0.1},
        "AnalyticQP",
    ),
    "GradientNorms(relative_eps=0.1, every=10)": (
        mb.GradientNorms,
        {"relative_eps": 0.1, "every": 10},
        "GradientNorms",
    ),
    "GradientNorms(relative_eps=0.01, every=10)": (
        mb.GradientNorms,
        {"relative_eps": 0.01, "every": 10},
        "GradientNorms",
    ),
    "GradientNorms, square root, every=10": (TemperedNorms, {"every": 10}, "GradientNorms"),
    "GradientNorms if 10 times apart, every=10": (NormsIfFar, {"every": 10}, "GradientNorms"),
    "NashMTL, averaged": (mb.MovingAverage, {"weighting": mb.NashMTL()}, "NashMTL"),
    "NashMTL × AnalyticQP, every=10": (
        GeometricBlend,
        {"first": mb.NashMTL(every=10), "second": mb.AnalyticQP(every=10)},
        "NashMTL",
    ),
    "NashMTL × Sum, every=10": (
        GeometricBlend,
        {"first": mb.NashMTL(every=10), "second": mb.Sum()},
        "NashMTL",
    ),
    "NashMTL, then Sum": (
        mb.Sequential,
        {"weightings": [mb.Rescaled(mb.NashMTL()), mb.Sum()], "milestones": [0.5]},
        "NashMTL",
    ),
    "GradientNorms × AnalyticQP, every=10": (
        GeometricBlend,
        {"first": mb.GradientNorms(every=10), "second": mb.AnalyticQP(every=10)},
        "GradientNorms",
    ),
    "AnalyticQP, then Sum": (
        mb.Sequential,
        {"weightings": [mb.Rescaled(mb.AnalyticQP()), mb.Sum()], "milestones": [0.5]},
        "AnalyticQP",
    ),
    "GradientNorms, then Sum": (
        mb.Sequential,
        {"weightings": [mb.GradientNorms(every=10), mb.Sum()], "milestones": [0.5]},
        "GradientNorms",
    ),
}
