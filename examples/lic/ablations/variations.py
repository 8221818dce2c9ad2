"""The methods with one piece changed, after Fig. 3 of Balanced Rate-Distortion Optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from examples.lic.study.laboratory import SUM
from moo_balance import AnalyticQP, BalancedTrajectory
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

GAMMAS = (0.0, 5e-4, 1e-3, 5e-3, 1e-2, 1.5e-2)
"""The grid of the paper; 1e-3 is its choice, and the library's default."""

CLIP = 1.0
"""The bound on the gradient where renormalisation is ablated, as in what appears to be the authors'
code. Everywhere else gradients are brought to norm 1, which undoes any common factor."""


@dataclass(frozen=True)
class NotRenormalized(Weighting):
    r"""Solution 1 without c: the coefficients are :math:`w_i / (L_i + s)` and sum to anything."""

    solution: BalancedTrajectory = field(default=BalancedTrajectory())

    @property
    def observes_step(self) -> bool:
        return self.solution.observes_step

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return self.solution.lower_bounds(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        return self.solution.init(names, device)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        weights, _, state = self.solution.weights(statistics, state)
        return WeightingOutput(weights, weights / (statistics.losses + self.solution.shift), state)

    def observe(self, statistics: Statistics, state: State) -> State:
        return self.solution.observe(statistics, state)


@dataclass(frozen=True)
class Variation:
    """A method, and the one that it is held against.

    Args:
        weighting: The method.
        lambdas: The curve's λ.
        against: Title of the variation without the change; None for one that others are held
            against.
        clip: See ``Recipe``.
        scratch: Train from random weights, longer, instead of from the checkpoint.
    """

    weighting: Weighting
    lambdas: Sequence[float]
    against: str | None = None
    clip: float | None = None
    scratch: bool = False


LAMBDAS = (0.0008, 0.0018, 0.004, 0.03)
"""Beyond 0.03 the shifted logarithms hardly see λ any more, and points would crowd."""

PRICES = (0.0001, 0.0003, 0.001, 0.003)
"""λ of plain sums, for the same rates: see the README on where balanced runs land."""

SUMS = "plain sums"
SOLUTION_1, SOLUTION_2 = "Solution 1", "Solution 2"
CLIPPED_1, CLIPPED_2 = f"{SOLUTION_1}, clipped", f"{SOLUTION_2}, clipped"
SCRATCH_1, SCRATCH_2 = f"{SOLUTION_1} from scratch", f"{SOLUTION_2} from scratch"


def _first(weighting: Weighting, against: str | None = SOLUTION_1, **options: Any) -> Variation:
    return Variation(weighting, LAMBDAS, against, **options)


def _second(weighting: Weighting, against: str | None = SOLUTION_2, **options: Any) -> Variation:
    return Variation(weighting, LAMBDAS, against, **options)


VARIATIONS: Mapping[str, Variation] = {
    SUMS: Variation(SUM, PRICES),
    # Solution 1 is the paper's for training from scratch: fine-tuning with it is one of the swaps.
    SOLUTION_1: _first(BalancedTrajectory(), SOLUTION_2),
    **{
        f"γ = {gamma:g}": _first(BalancedTrajectory(decay=gamma))
        for gamma in GAMMAS
        if gamma != BalancedTrajectory().decay
    },
    "Solution 1, shift 0": _first(BalancedTrajectory(shift=0.0)),
    CLIPPED_1: _first(BalancedTrajectory(), clip=CLIP),
    "Solution 1, clipped, without c": _first(NotRenormalized(), CLIPPED_1, clip=CLIP),
    SOLUTION_2: _second(AnalyticQP(), None),
    "Solution 2, simplex": _second(AnalyticQP(projection="simplex")),
    "Solution 2, exact": _second(AnalyticQP(projection="exact")),
    "Solution 2, shift 0": _second(AnalyticQP(shift=0.0)),
    CLIPPED_2: _second(AnalyticQP(), clip=CLIP),
    "Solution 2, clipped, without c": _second(AnalyticQP(renormalize=False), CLIPPED_2, clip=CLIP),
    SCRATCH_1: Variation(BalancedTrajectory(), (0.0018, 0.05, 1.5), None, scratch=True),
    SCRATCH_2: Variation(AnalyticQP(), (0.0018, 0.02, 0.2), SCRATCH_1, scratch=True),
}
