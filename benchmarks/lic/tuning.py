"""Learning rate and clipping of the standard run, and the cost of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, median
from typing import Any, Literal

import torch

from benchmarks.lic.engine import Engine, Job, Result
from benchmarks.lic.jobs import SUM, Train
from benchmarks.lic.scores import rate_distortion_loss
from examples.lic import architectures
from examples.lic.evaluation import Score
from examples.lic.losses import SOLUTIONS, RateDistortion
from examples.lic.runs import Run
from examples.lic.streams import Crops, CropStream
from examples.lic.training import Recipe, Trainer
from moo_balance.weighting import Weighting

Clip = float | Literal["unit"]

STEPS_PER_ROUND = 5


@dataclass(frozen=True)
class Tuned:
    """What was chosen before the comparison."""

    lr: float
    """The standard run's; all other runs take the same."""
    clip: Clip
    """The standard run's; balanced runs and static weights have gradients of norm 1."""
    cost: float
    """CPU time of a step of the slower solution, in steps of the standard run."""


@dataclass(frozen=True)
class Tuning:
    """A grid, tried on a seed that is not evaluated and judged by R + λD on training photographs.

    Args:
        template: The run whose learning rate and clipping are varied.
        lrs: Learning rates.
        clips: Bounds on the gradient, or ``"unit"``.
    """

    template: Run
    lrs: Sequence[float]
    clips: Sequence[Clip]

    def jobs(self) -> Iterable[Job]:
        return self._cells().values()

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        """All cells of the grid, the best first."""
        cells = [
            {"lr": lr, "clip": clip, "loss": self._loss(result(job))}
            for (lr, clip), job in self._cells().items()
        ]
        return {"cells": sorted(cells, key=lambda cell: cell["loss"])}

    def _cells(self) -> dict[tuple[float, Clip], Train]:
        return {
            (lr, clip): Train(
                replace(self.template, recipe=replace(self.template.recipe, lr=lr, clip=clip)),
                scored_on="train",
            )
            for lr, clip in product(self.lrs, self.clips)
        }

    def _loss(self, result: Result) -> float:
        scores = (Score(*score) for score in result["scores"].values())
        return fmean(rate_distortion_loss(score, self.template.lambdas[-1]) for score in scores)


@dataclass(frozen=True)
class StepCosts:
    """CPU seconds of a step with each weighting; an experiment of one job, which is itself.

    CPU time, because other processes stretch the clock's; in turn, because they do so unevenly.

    Args:
        run: The codec, its crops and its λ.
        rounds: How often each weighting takes its turn; the median counts.
    """

    run: Run
    rounds: int

    def __str__(self) -> str:
        return f"cost of a step, {self.rounds} rounds"

    @property
    def needs(self) -> list[Job]:
        return []

    def jobs(self) -> list[Job]:
        return [self]

    def read(self, result: Callable[[Job], Result]) -> Result:
        return result(self)

    def __call__(self, engine: Engine) -> Result:
        weightings: Mapping[str, Weighting] = {"standard": SUM, **SOLUTIONS}
        seconds: dict[str, list[float]] = {name: [] for name in weightings}
        torch.manual_seed(0)
        codec = architectures.build(self.run.arch)
        objective = RateDistortion(codec, self.run.lambdas[-1])
        crops = Crops(list(engine.photographs.train.values()), crop=self.run.crop, seed=0)
        recipe = Recipe(STEPS_PER_ROUND, lr=1e-4, clip="unit")
        for _ in range(self.rounds + 1):
            for name, weighting in weightings.items():
                trainer = Trainer(objective, weighting, recipe, seed=0)
                stream = CropStream(crops, batch=self.run.batch)
                start = time.process_time()
                trainer.run(stream)
                seconds[name].append((time.process_time() - start) / STEPS_PER_ROUND)
        # The first round warms up.
        return {name: median(values[1:]) for name, values in seconds.items()}
