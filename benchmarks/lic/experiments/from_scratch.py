"""Trained from random weights, and ended by a common cool-down with the plain sum at equal λ.

So each run means the same by λ, and J = R + λ · 255² · MSE compares them without a curve, which so
early in a training is flat and noisy. What it is worth to adapt weights shows against runs that
have a course of weights but do not adapt it: a schedule, and the coefficients of another seed's
Solution 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import EstimateError, Question, answer
from benchmarks.lic.experiments.cautious import ADAM, CAUTIOUS
from benchmarks.lic.jobs import Job, Result, Train
from benchmarks.lic.regime import LANDING, Regime, describe, point, table
from benchmarks.lic.weightings import low_rate_first, replay, two_phases
from examples.lic.losses import SOLUTIONS
from examples.lic.training import Observer
from moo_balance import Sum
from moo_balance.weighting import Weighting

SUM, LONGER = "plain sum", "plain sum, equal time"
FIRST, SECOND = SOLUTIONS
SCHEDULE, REPLAY, PHASES = "λ/4, then λ", "another seed's Solution 1, replayed", "two phases"
CAUTIOUS_SUM, CAUTIOUS_FIRST = f"{SUM}, cautious Adam", f"{FIRST}, cautious Adam"

AT_ONCE = (SUM, FIRST, SECOND, SCHEDULE, PHASES, CAUTIOUS_SUM, CAUTIOUS_FIRST)
AFTER_THEM = (REPLAY, LONGER)

COMPARED = [
    (FIRST, SUM), (SECOND, SUM), (PHASES, SUM), (SCHEDULE, SUM),
    (FIRST, LONGER), (SECOND, LONGER), (PHASES, LONGER),
    (FIRST, REPLAY), (FIRST, SCHEDULE), (SECOND, SCHEDULE), (PHASES, SCHEDULE),
    (CAUTIOUS_SUM, SUM), (CAUTIOUS_FIRST, CAUTIOUS_SUM), (CAUTIOUS_FIRST, SUM),
]  # fmt: skip


@dataclass(frozen=True)
class FromScratch:
    """See the module.

    Args:
        regime: How runs are trained; the ladder is not used.
        lambdas: λ of all runs.
        seeds: How many, of weights, crops and noise.
        steps: Before the cool-down, a multiple of 100 or below it.
        cooling: Steps of the cool-down.
    """

    regime: Regime
    lambdas: Sequence[float] = (0.0035, 0.025)
    seeds: int = 6
    steps: int = 2000
    cooling: int = 500

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        runs = list(product(range(self.seeds), self.lambdas))
        for arms in (AT_ONCE, AFTER_THEM):
            yield [self.training(*run, arm, results) for run in runs for arm in arms]
        yield [self.ending(*run, arm, results) for run in runs for arm in (*AT_ONCE, *AFTER_THEM)]

    def training(self, seed: int, lmbda: float, arm: str, results: Results) -> Train:
        """The part before the cool-down."""
        steps = self.longer(lmbda, results) if arm == LONGER else self.steps
        weighting = self._weighting(seed, lmbda, arm, results)
        run = self.regime.run(lmbda, weighting, steps, 1e-3, seed=seed, ema=None)
        return Train(run, observers(arm), scored=False, kept=True)

    def _weighting(self, seed: int, lmbda: float, arm: str, results: Results) -> Weighting:
        if arm in (FIRST, CAUTIOUS_FIRST):
            return SOLUTIONS[FIRST]
        if arm == SECOND:
            return SOLUTIONS[SECOND]
        if arm == SCHEDULE:
            return low_rate_first(self.steps)
        if arm == PHASES:
            return two_phases(self.steps)
        if arm == REPLAY:
            other = self.training((seed + 1) % self.seeds, lmbda, FIRST, results)
            return replay(results[other]["course"], self.steps)
        return Sum()

    def longer(self, lmbda: float, results: Results) -> int:
        """Steps of the plain sum in the time of the solution whose step costs less."""
        steps = {
            arm: [results[self.training(s, lmbda, arm, results)]["step"] for s in range(self.seeds)]
            for arm in (SUM, FIRST, SECOND)
        }
        times = {arm: sorted(values)[len(values) // 2] for arm, values in steps.items()}
        return round(self.steps * max(1.0, min(times[FIRST], times[SECOND]) / times[SUM]))

    def ending(self, seed: int, lmbda: float, arm: str, results: Results) -> Train:
        """The cool-down after it, with Adam."""
        start = self.training(seed, lmbda, arm, results)
        run = self.regime.run(lmbda, Sum(), self.cooling, 5e-4, seed=seed, start=start.run)
        return Train(run, start_observers=observers(arm))

    def summarize(self, results: Results) -> dict[str, Any]:
        questions, rows = [], []
        for lmbda in self.lambdas:
            ends = {
                arm: [results[self.ending(s, lmbda, arm, results)] for s in range(self.seeds)]
                for arm in (*AT_ONCE, *AFTER_THEM)
            }
            for test, anchor in COMPARED:
                values = partial(compare_costs, ends[test], ends[anchor], lmbda)
                questions.append(Question(f"{test} against {anchor}", f"λ {lmbda:g}", values))
            for arm, runs in ends.items():
                steps = self.training(0, lmbda, arm, results).length
                rows.append((f"{lmbda:g}", arm, steps, *describe(list(map(point, runs)))))
        return {
            "title": "From scratch",
            "about": (
                f"Codecs `{self.regime.arch}`, {self.steps} steps from random weights at a "
                f"learning rate of 1e-3, then {self.cooling} steps of the plain sum at 5e-4, at "
                "the same λ and on the same crops for all. In equal time the plain sum takes as "
                "many more steps as the cheaper of the two solutions costs. J is R + λ · 255² · "
                f"MSE, the mean over the photographs, after the cool-down. {self.seeds} seeds. "
                "So early in a training distortion is most of J, and the published BD-rates, of "
                "millions of steps, say nothing about it."
            ),
            "measure": "J",
            "comparisons": answer(questions),
            "tables": [table("Where the runs land", ("λ", "", "steps", *LANDING), rows)],
        }


def observers(arm: str) -> tuple[Observer, ...]:
    """What makes Adam cautious, in the arms that have it."""
    return CAUTIOUS if arm in (CAUTIOUS_SUM, CAUTIOUS_FIRST) else ADAM


def compare_costs(tests: Sequence[Result], anchors: Sequence[Result], lmbda: float) -> list[float]:
    """How much higher J is, in per cent, for each seed."""
    pairs = zip(tests, anchors, strict=True)
    return [100 * (cost(test, lmbda) / cost(anchor, lmbda) - 1) for test, anchor in pairs]


def cost(result: Result, lmbda: float) -> float:
    """J = R + λ · 255² · MSE, the mean over the photographs.

    Raises:
        EstimateError: The run broke off.
    """
    if "error" in result:
        raise EstimateError(f"A run broke off: {result['error']}")
    scores = result["images"].values()
    return fmean(bpp + lmbda * 255**2 * math.pow(10, -psnr / 10) for bpp, psnr in scores)
