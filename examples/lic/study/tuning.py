"""Learning rates and clipping for each side, and what a step costs; before anything is compared."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, median
from typing import Any

import torch

from examples.lic.codec import MeanScaleHyperprior
from examples.lic.evaluation import Score
from examples.lic.images import Photographs, RandomCrops
from examples.lic.study.laboratory import SUM, Laboratory, Result, Run
from examples.lic.training import Recipe, train
from moo_balance.weighting import Weighting


@dataclass(frozen=True)
class Tuned:
    """What was found before anything is compared."""

    lr: float
    """The standard run's; the balanced ones take what suits it best."""
    clip: float | None
    """The standard run's; balanced runs and static weights keep gradients of norm 1."""
    cost: float
    """Time of a step of the slower solution, in steps of the standard run."""


@dataclass(frozen=True)
class Grid:
    """What is tried, on a seed that is not evaluated, and judged on training photographs."""

    lrs: Sequence[float]
    clips: Sequence[float | None]
    price: float
    """The λ of the standard run."""
    seed: int = 100


def tune_standard(laboratory: Laboratory, template: Run, grid: Grid) -> list[dict[str, Any]]:
    """All cells of the grid by R + λD, the best first."""
    cells = []
    for lr, clip in product(grid.lrs, grid.clips):
        run = replace(template, weighting=SUM, lmbda=grid.price, lr=lr, clip=clip)
        cells.append({"lr": lr, "clip": clip, "loss": loss(laboratory(run), grid.price)})
    return sorted(cells, key=lambda cell: cell["loss"])


def loss(result: Result, price: float) -> float:
    """R + λD as a mean over the photographs."""
    return fmean(score.bpp + price * squared_error(score) for score in result.scores.values())


def squared_error(score: Score) -> float:
    """255² times the mean squared error that a PSNR stands for."""
    return 255**2 * 10 ** (-score.psnr / 10)


def step_costs(
    photographs: Photographs,
    weightings: Mapping[str, Weighting],
    *,
    rounds: int,
    shape: Mapping[str, Any],
) -> dict[str, float]:
    """CPU seconds of a step of each weighting, measured in turn on one thread.

    CPU time, because a busy machine stretches the clock's; in turn, because it does so unevenly.
    """
    run = Run(SUM, 0.01, steps=5, lr=1e-4, **shape)
    seconds: dict[str, list[float]] = {name: [] for name in weightings}
    torch.manual_seed(0)
    model = MeanScaleHyperprior(*run.widths)
    for _ in range(rounds + 1):
        for name, weighting in weightings.items():
            crops = RandomCrops(photographs.train, crop=run.crop, batch=run.batch, seed=0)
            start = time.process_time()
            train(model, crops, weighting, Recipe(run.steps, run.lr), lmbda=run.lmbda, seed=0)
            seconds[name].append((time.process_time() - start) / run.steps)
    # The first round warms up.
    return {name: median(values[1:]) for name, values in seconds.items()}
