"""One codec for every rate, compared with one codec for each: the increments of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks.lic.engine import Job, Result
from benchmarks.lic.jobs import Keep, Train, Untrained, means
from examples.lic.losses import level_name
from examples.lic.runs import Run
from examples.lic.training import Recipe
from moo_balance import MGDA, Sum
from moo_balance.weighting import Weighting

BEFORE = "before post-training"
SINGLE = "single-rate models"
LONG = "single-rate models, whole budget each"


@dataclass(frozen=True)
class Design:
    """What a variable-rate codec consists of, and how the losses of its levels are weighted."""

    arch: str
    weighting: Weighting = field(default_factory=Sum)
    one_level: bool = False
    """One random level in each step, and as many more steps."""


GAINS, OFFSETS, FULL = "gains", "gains+offsets", "variable-rate"

INCREMENTS = {
    "gains only": Design(GAINS),
    "+ offsets": Design(OFFSETS),
    "+ step of z": Design(FULL),
    "+ MGDA": Design(FULL, MGDA()),
}
"""Those of the paper, each with all that is above it."""

PLAIN = "+ step of z"
"""What the last increment, and the alternatives, change."""

ALTERNATIVES = {
    "MGDA, unit gradients": Design(FULL, MGDA(normalize="l2")),
    "one random level per step": Design(FULL, one_level=True),
}

STATIC = {"fixed as MGDA": "+ MGDA", "fixed as MGDA, unit": "MGDA, unit gradients"}
"""Fixed weights, and the run whose mean weights they are: the method without adaptivity."""

DESIGNS = {**INCREMENTS, **ALTERNATIVES}

COMPARED = {
    **{name: above for above, name in pairwise([SINGLE, *INCREMENTS])},
    **dict.fromkeys([*ALTERNATIVES, *STATIC], PLAIN),
}
"""What each codec is compared with, besides the single-rate models."""


@dataclass(frozen=True)
class VariableRate:
    """From one checkpoint per seed, a model for each λ, and models for all of them.

    Args:
        start: The run of the highest λ.
        lambdas: The levels, three or more.
        steps: Of post-training.
        seeds: Of weights, crops and noise.
    """

    start: Run
    lambdas: Sequence[float]
    steps: int
    seeds: Sequence[int]

    @property
    def between(self) -> tuple[float, ...]:
        """The geometric means of neighbours, at which no model is trained."""
        return tuple(math.sqrt(low * high) for low, high in pairwise(sorted(self.lambdas)))

    def jobs(self) -> Iterable[Job]:
        for seed in self.seeds:
            for jobs in self._jobs(seed).values():
                yield from jobs

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        return {
            "kind": "variable_rate",
            "lambdas": list(self.lambdas),
            "start steps": self.start.recipe.steps,
            "steps": self.steps,
            "runs": {str(seed): self._read_seed(seed, result) for seed in self.seeds},
        }

    def _read_seed(self, seed: int, result: Callable[[Job], Result]) -> dict[str, Any]:
        start = Keep(replace(self.start, seed=seed))
        runs = {
            name: _merge([result(job) for job in jobs], self.lambdas)
            for name, jobs in self._jobs(seed).items()
        }
        runs[BEFORE]["seconds"] = result(start)["seconds"]
        return runs

    def _jobs(self, seed: int) -> dict[str, list[Job]]:
        """The jobs of one seed, by name; several where each λ has a model of its own."""
        start, levels = replace(self.start, seed=seed), tuple(self.lambdas)
        jobs: dict[str, list[Job]] = {
            BEFORE: [Untrained(start, levels, self.between)],
            SINGLE: [self._train(start, Design(GAINS), (lmbda,)) for lmbda in levels],
            LONG: [self._train(start, Design(GAINS), (lmbda,), len(levels)) for lmbda in levels],
        }
        trained = {name: self._train(start, design, levels) for name, design in DESIGNS.items()}
        held = {
            name: replace(trained[PLAIN], weights_of=trained[of]) for name, of in STATIC.items()
        }
        return jobs | {name: [job] for name, job in (trained | held).items()}

    def _train(
        self, start: Run, design: Design, lambdas: tuple[float, ...], factor: int = 1
    ) -> Train:
        factor = len(lambdas) if design.one_level else factor
        run = replace(
            start, arch=f"{design.arch}:{start.arch}", lambdas=lambdas, start=start,
            weighting=design.weighting, one_level=design.one_level,
            recipe=Recipe(factor * self.steps, lr=5e-4, clip="unit"),
        )  # fmt: skip
        return Train(run, between=self.between if len(lambdas) > 1 else ())


def _merge(results: Sequence[Result], lambdas: Sequence[float]) -> dict[str, Any]:
    """What the page needs of a model, or of one model for each λ taken together."""
    merged: dict[str, Any] = {"points": [point for r in results for point in r["points"]]}
    if "seconds" in results[0]:
        merged["ms_per_step"] = fmean(r["milliseconds"] for r in results)
        merged["seconds"] = sum(r["seconds"] for r in results)
    if len(results) == 1 and "hyper_steps" in results[0]:
        (result,) = results
        keys = [f"coefficient/{level_name(lmbda)}" for lmbda in lambdas]
        series = result.get("series")
        merged["weights"] = [means(series[key], 10) for key in keys] if series else []
        merged["hyper_steps"] = result["hyper_steps"]
    return merged
