"""Trained from random weights, and ended by a common cool-down with the plain sum at equal λ.

So each run means the same by λ, and lands near the others. What it is worth to adapt weights shows
against runs that have a course of weights but do not adapt it: a schedule, and the coefficients of
another seed's Solution 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Pair, Point, Question, answer, by_seed
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import LANDING, Regime, describe, point, table
from benchmarks.lic.weightings import low_rate_first, replay, two_phases
from examples.lic.losses import SOLUTIONS
from examples.lic.training import Observer
from moo_balance import Sum
from moo_balance.weighting import Weighting

SUM, LONGER = "plain sum", "plain sum, equal time"
FIRST, SECOND = SOLUTIONS
SCHEDULE, REPLAY, PHASES = "λ/4, then λ", "another seed's Solution 1, replayed", "two phases"

ARMS = (SUM, FIRST, SECOND, SCHEDULE, PHASES, REPLAY, LONGER)

NEIGHBOURS = (0.8, 1.25)
"""Factors of λ in cool-downs of the plain sum, for the slope of the curve."""

PAPER = {(FIRST, SUM): -1.95}
"""See ``fine_tuning.py``."""

COMPARED = [
    (FIRST, SUM), (SECOND, SUM), (PHASES, SUM), (SCHEDULE, SUM),
    (FIRST, LONGER), (SECOND, LONGER), (PHASES, LONGER),
    (FIRST, REPLAY), (FIRST, SCHEDULE), (SECOND, SCHEDULE), (PHASES, SCHEDULE),
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
        for arms in ((SUM, FIRST, SECOND, SCHEDULE, PHASES), (REPLAY, LONGER)):
            yield [self.training(*run, arm, results) for run in runs for arm in arms]
        yield [self.ending(*run, arm, results) for run in runs for arm in ARMS]
        yield [job for run in runs for job in self.curve(*run, results)]

    def training(
        self, seed: int, lmbda: float, arm: str, results: Results,
        observers: tuple[Observer, ...] = (),
    ) -> Train:  # fmt: skip
        """The part before the cool-down."""
        steps = self.longer(lmbda, results) if arm == LONGER else self.steps
        weighting = self._weighting(seed, lmbda, arm, results)
        run = self.regime.run(lmbda, weighting, steps, 1e-3, seed=seed, ema=None)
        return Train(run, observers, scored=False, kept=True)

    def _weighting(self, seed: int, lmbda: float, arm: str, results: Results) -> Weighting:
        if arm in SOLUTIONS:
            return SOLUTIONS[arm]
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

    def ending(
        self,
        seed: int,
        lmbda: float,
        arm: str,
        results: Results,
        factor: float = 1.0,
        observers: tuple[Observer, ...] = (),
    ) -> Train:
        """The cool-down after it, at `factor` times λ."""
        start = self.training(seed, lmbda, arm, results, observers)
        run = self.regime.run(factor * lmbda, Sum(), self.cooling, 5e-4, seed=seed, start=start.run)
        return Train(run, start_observers=observers)

    def curve(self, seed: int, lmbda: float, results: Results) -> list[Train]:
        """Cool-downs of the plain sum, at λ and at its neighbours."""
        return [self.ending(seed, lmbda, SUM, results, f) for f in (1.0, *NEIGHBOURS)]

    def landings(self, lmbda: float, arm: str, results: Results) -> list[Point]:
        """Where the runs of an arm landed, by seed."""
        jobs = [self.ending(seed, lmbda, arm, results) for seed in range(self.seeds)]
        return [point(results[job]) for job in jobs]

    def summarize(self, results: Results) -> dict[str, Any]:
        questions, rows = [], []
        for lmbda in self.lambdas:
            curves = [
                [point(results[job]) for job in self.curve(seed, lmbda, results)]
                for seed in range(self.seeds)
            ]
            points = {arm: self.landings(lmbda, arm, results) for arm in ARMS}
            for test, anchor in COMPARED:
                sides = zip(points[test], points[anchor], curves, strict=True)
                values = partial(by_seed, [Pair(a, [b], curve) for a, b, curve in sides])
                paper = PAPER.get((test, anchor))
                questions.append(
                    Question(f"{test} against {anchor}", f"λ {lmbda:g}", values, paper)
                )
            for arm, landed in points.items():
                steps = self.training(0, lmbda, arm, results).length
                rows.append((f"{lmbda:g}", arm, steps, *describe(landed)))
        factors = " and ".join(f"{factor:g}" for factor in NEIGHBOURS)
        return {
            "title": "From scratch",
            "about": (
                f"{self.steps} steps from random weights at a learning rate of 1e-3, then "
                f"{self.cooling} steps of the plain sum at 5e-4, at the same λ and on the same "
                f"crops for all. {self.seeds} seeds. In equal time the plain sum takes as many "
                "more steps as the cheaper of the two solutions costs. The slope is that of "
                f"cool-downs of the plain sum at {factors} times λ."
            ),
            "measure": "b",
            "comparisons": answer(questions),
            "tables": [table("Where the runs land", ("λ", "", "steps", *LANDING), rows)],
        }
