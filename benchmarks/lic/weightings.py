"""Weightings that only the experiments use, most of them put together from the library's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moo_balance import AnalyticQP, BalancedTrajectory, FixedWeights, Sequential, Sum
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput


def fixed_ratio(ratio: float) -> FixedWeights:
    """Constant weights of rate and distortion that sum to 1 and are in the ratio 1 : `ratio`.

    Like the coefficients of the two solutions they sum to 1, so that a bound on the gradient's
    norm treats all alike.
    """
    rate = float(f"{1 / (1 + ratio):.8g}")
    return FixedWeights({"rate": rate, "distortion": 1 - rate})


def replay(course: Sequence[Sequence[float]], steps: int) -> Sequential:
    """The coefficients of another run: `course` has those of equal parts of it, in order.

    Args:
        course: Of each part the coefficients of rate and distortion.
        steps: Of the run, a multiple of the number of parts.
    """
    part = steps // len(course)
    weightings = [FixedWeights({"rate": rate, "distortion": rest}) for rate, rest in course]
    return Sequential(weightings, [part * index for index in range(1, len(course))])


def low_rate_first(steps: int, factor: float = 0.25) -> Sequential:
    """An open-loop schedule: R + λD with `factor` times λ in the first half, then with λ."""
    first = FixedWeights({"rate": 1.0, "distortion": factor})
    return Sequential([first, Sum()], [max(1, steps // 2)])


def two_phases(steps: int) -> Sequential:
    """Solution 2 in the first half, the plain sum at the same λ in the second."""
    return Sequential([AnalyticQP(), Sum()], [max(1, steps // 2)])


@dataclass(frozen=True)
class NotRenormalized(Weighting):
    r"""Solution 1 without its factor c: the coefficients are :math:`w_i / (L_i + s)`."""

    solution: BalancedTrajectory = field(default_factory=BalancedTrajectory)

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
