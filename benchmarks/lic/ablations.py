"""Both solutions with one piece changed, after Fig. 3 of Balanced Rate-Distortion Optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.lic.engine import Job, Result
from benchmarks.lic.jobs import SUM, Train
from benchmarks.lic.tuning import Clip
from examples.lic.runs import Run
from examples.lic.training import Recipe
from moo_balance import AnalyticQP, BalancedTrajectory
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

GAMMAS = (0.0, 5e-4, 5e-3, 1e-2, 1.5e-2)
"""The paper's grid, without its choice of 1e-3, which is the library's default."""

CLIP = 1.0
"""The bound on the gradient where renormalisation is changed, as in what appears to be the authors'
code. In all other runs gradients have norm 1, which removes any common factor."""


@dataclass(frozen=True)
class NotRenormalized(Weighting):
    r"""Solution 1 without c: the coefficients are :math:`w_i / (L_i + s)`, whatever their sum."""

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
    """A method, and the variation that it is compared with.

    Args:
        weighting: The method.
        lambdas: The λ of its curve.
        against: The name of the variation without the change, if there is one.
        clip: Bound on the gradient.
        from_scratch: Train longer, from random weights, and not from the checkpoint.
    """

    weighting: Weighting
    lambdas: Sequence[float]
    against: str | None = None
    clip: Clip = "unit"
    from_scratch: bool = False


LAMBDAS = (0.0008, 0.0018, 0.004, 0.03)
"""Above 0.03 the shifted logarithms hardly depend on λ, and points would lie close together."""

SUM_LAMBDAS = (0.0001, 0.0003, 0.001, 0.003)
"""λ of plain sums at about the same rates."""

SUMS = "plain sums"
SOLUTION_1, SOLUTION_2 = "Solution 1", "Solution 2"
CLIPPED_1, CLIPPED_2 = f"{SOLUTION_1}, clipped", f"{SOLUTION_2}, clipped"
SCRATCH_1, SCRATCH_2 = f"{SOLUTION_1} from scratch", f"{SOLUTION_2} from scratch"


def _first(weighting: Weighting, against: str | None = SOLUTION_1, **options: Any) -> Variation:
    return Variation(weighting, LAMBDAS, against, **options)


def _second(weighting: Weighting, against: str | None = SOLUTION_2, **options: Any) -> Variation:
    return Variation(weighting, LAMBDAS, against, **options)


VARIATIONS: Mapping[str, Variation] = {
    SUMS: Variation(SUM, SUM_LAMBDAS),
    # The paper trains with Solution 1 and fine-tunes with Solution 2; two variations swap them.
    SOLUTION_1: _first(BalancedTrajectory(), SOLUTION_2),
    **{f"γ = {gamma:g}": _first(BalancedTrajectory(decay=gamma)) for gamma in GAMMAS},
    "Solution 1, shift 0": _first(BalancedTrajectory(shift=0.0)),
    CLIPPED_1: _first(BalancedTrajectory(), clip=CLIP),
    "Solution 1, clipped, without c": _first(NotRenormalized(), CLIPPED_1, clip=CLIP),
    SOLUTION_2: _second(AnalyticQP(), None),
    "Solution 2, simplex": _second(AnalyticQP(projection="simplex")),
    "Solution 2, exact": _second(AnalyticQP(projection="exact")),
    "Solution 2, shift 0": _second(AnalyticQP(shift=0.0)),
    CLIPPED_2: _second(AnalyticQP(), clip=CLIP),
    "Solution 2, clipped, without c": _second(AnalyticQP(renormalize=False), CLIPPED_2, clip=CLIP),
    SCRATCH_1: Variation(BalancedTrajectory(), (0.0018, 0.05, 1.5), None, from_scratch=True),
    SCRATCH_2: Variation(AnalyticQP(), (0.0018, 0.02, 0.2), SCRATCH_1, from_scratch=True),
}


@dataclass(frozen=True)
class Ablations:
    """Every variation, for each of its λ and each seed.

    Args:
        start: The checkpoint of the plain sum that the fine-tuned runs continue.
        steps: Of a fine-tuned run.
        steps_from_scratch: Of the others.
        seeds: Of weights, crops and noise.
        points: How many λ of each curve, the first ones; None for all.
    """

    start: Run
    steps: int
    steps_from_scratch: int
    seeds: Sequence[int]
    points: int | None = None

    def jobs(self) -> Iterable[Job]:
        return [job for _, _, job in self._jobs()]

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        return {
            "kind": "ablations",
            "start": [self.start.lambdas[-1], self.start.recipe.steps],
            "steps": self.steps,
            "steps from scratch": self.steps_from_scratch,
            "seeds": list(self.seeds),
            "records": [
                {"title": title, "seed": seed, **_record(result(job))}
                for title, seed, job in self._jobs()
            ],
        }

    def _jobs(self) -> Iterator[tuple[str, int, Train]]:
        for seed in self.seeds:
            for title, variation in VARIATIONS.items():
                for lmbda in variation.lambdas[: self.points]:
                    yield title, seed, Train(self.run(variation, lmbda, seed))

    def run(self, variation: Variation, lmbda: float, seed: int) -> Run:
        """One training run of a variation."""
        start = replace(self.start, seed=seed)
        changes = {"weighting": variation.weighting, "lambdas": (lmbda,)}
        if variation.from_scratch:
            recipe = Recipe(self.steps_from_scratch, lr=1e-3, clip=variation.clip)
            return replace(start, recipe=recipe, **changes)
        recipe = Recipe(self.steps, lr=5e-4, clip=variation.clip)
        return replace(start, recipe=recipe, start=start, **changes)


def _record(result: Result) -> dict[str, Any]:
    scores, weight = result["scores"], result["mean_weights"]["rate"]
    return {"lambda": result["lambda"], "scores": scores, "weight": weight}
