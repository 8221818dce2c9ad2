"""Solutions 1 and 2 against their baselines, in one regime of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.lic.engine import Job, Result
from benchmarks.lic.jobs import SUM, Train
from benchmarks.lic.tuning import Clip, Tuned
from examples.lic.losses import SOLUTIONS
from examples.lic.runs import Run
from examples.lic.training import Recipe
from moo_balance.weighting import Weighting

BALANCED = "balanced"
STATIC = "static weights"
OWN = "own mean weights"
EQUAL_STEPS = "standard, equal steps"
EQUAL_TIME = "standard, equal time"
BASELINES = (STATIC, OWN, EQUAL_STEPS, EQUAL_TIME)


@dataclass(frozen=True)
class Comparison:
    """One regime of training. Runs of a seed share their start, their crops and their noise.

    Args:
        about: What is special about the regime, one sentence for the page.
        template: A run of the plain sum: architecture, crops, steps, and the start, if any.
        tuned: Learning rate and clipping.
        lambdas: For each solution, the λ of its rate-distortion curve.
        static_lambdas: For each solution, the λ of the plain sums that it is compared with. They
            cover the rates that the solution reaches, far below those of its own λ.
        seeds: Of weights, crops and noise.
        baselines: What it is compared with, of :data:`BASELINES`.
    """

    about: str
    template: Run
    tuned: Tuned
    lambdas: Mapping[str, Sequence[float]]
    static_lambdas: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    baselines: Sequence[str] = BASELINES

    def jobs(self) -> Iterable[Job]:
        for seed in self.seeds:
            for solution in self.lambdas:
                for curve in self.curves(solution, seed).values():
                    yield from curve

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        start = self.template.start
        return {
            "kind": "solutions",
            "about": self.about,
            "steps": self.template.recipe.steps,
            "lambdas": self.lambdas,
            "static lambdas": self.static_lambdas,
            "baselines": list(self.baselines),
            "start": start and [start.lambdas[-1], start.recipe.steps],
            "seeds": {str(seed): self._read_seed(seed, result) for seed in self.seeds},
        }

    def _read_seed(self, seed: int, result: Callable[[Job], Result]) -> dict[str, Any]:
        return {
            solution: {
                name: [
                    point(result(job), with_series=self._is_drawn(seed, name, index))
                    for index, job in enumerate(jobs)
                ]
                for name, jobs in self.curves(solution, seed).items()
            }
            for solution in self.lambdas
        }

    def _is_drawn(self, seed: int, name: str, index: int) -> bool:
        """Whether the figures show the course of this run: one per solution, and its weights'."""
        is_first = seed == self.seeds[0] and index == 1
        return is_first and name in (BALANCED, OWN) and len(self.baselines) > 2

    def curves(self, solution: str, seed: int) -> dict[str, list[Train]]:
        """The jobs of one solution and seed: its own curve, and those of its baselines."""
        tuned, steps = self.tuned, self.template.recipe.steps
        weighting, static = SOLUTIONS[solution], self.static_lambdas[solution]
        balanced = [self._job(seed, weighting, lmbda) for lmbda in self.lambdas[solution]]
        longer = round(tuned.cost * steps)
        curves = {
            BALANCED: balanced,
            STATIC: [self._job(seed, SUM, lmbda) for lmbda in static],
            OWN: [replace(job, weights_of=job) for job in balanced],
            EQUAL_STEPS: [self._job(seed, SUM, lmbda, clip=tuned.clip) for lmbda in static],
            EQUAL_TIME: [self._job(seed, SUM, lmbda, longer, tuned.clip) for lmbda in static],
        }
        return {name: curves[name] for name in (BALANCED, *self.baselines)}

    def _job(
        self,
        seed: int,
        weighting: Weighting,
        lmbda: float,
        steps: int | None = None,
        clip: Clip = "unit",
    ) -> Train:
        start = self.template.start and replace(self.template.start, seed=seed)
        steps = steps or self.template.recipe.steps
        return Train(
            replace(
                self.template, weighting=weighting, lambdas=(lmbda,), seed=seed, start=start,
                recipe=Recipe(steps, self.tuned.lr, clip=clip),
            )
        )  # fmt: skip


def point(result: Result, *, with_series: bool) -> dict[str, Any]:
    """What the page needs of a run: one point of a rate-distortion curve."""
    coefficients = result["mean_coefficients"]
    effective = result["lambda"] * coefficients["distortion"] / coefficients["rate"]
    kept = {key: result[key] for key in ("lambda", "steps", "scores", "milliseconds")}
    series = {"series": result["series"]} if with_series else {}
    return {**kept, "effective_lambda": effective, **series}
