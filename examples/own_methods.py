"""Two methods that are not in the package, as the manual shows them.

The contract tests of the package run for them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.weighting import (
    GramianWeighting,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
)


@dataclass(frozen=True)
class SlowestFirst(Weighting):
    """Weights each positive loss by how little it has fallen since its first step."""

    power: float = 1.0

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        return {"first": torch.full((len(names),), torch.nan, dtype=torch.float64, device=device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        first = torch.where(state["first"].isnan(), statistics.losses, state["first"])
        weights = torch.softmax(self.power * statistics.losses / first, 0)
        return WeightingOutput(weights, weights, {"first": first})


@dataclass(frozen=True)
class EqualLengths(GramianWeighting):
    """Gives all gradients the same length, by a moving average of their norms."""

    beta: float = 0.9
    every: int = 1

    def init(self, names: Sequence[str], device: torch.device) -> State:
        ones = torch.ones(len(names), dtype=torch.float64, device=device)
        return {"weights": ones / len(names), "norms": torch.full_like(ones, torch.nan)}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        norms = gramian.diagonal().sqrt().to(torch.float64)
        before = torch.where(state["norms"].isnan(), norms, state["norms"])
        norms = before.lerp(norms, 1 - self.beta)
        # Relative to the shortest, so that no unit matters; a gradient of zero stays as it is.
        weights = torch.where(norms > 0, norms.amin() / norms, 1.0)
        return {"weights": weights / weights.sum(), "norms": norms}

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": state["weights"] / state["weights"].sum()}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]
