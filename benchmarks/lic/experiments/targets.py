"""A bound on the rate instead of a λ: how near a single run comes to it, and to the ladder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.interpolate import PchipInterpolator

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Estimate, Point, estimate
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import Regime, point, significant, table
from examples.lic.losses import bounded_rate
from moo_balance import Sum

GOAL = 0.02
"""The largest relative difference from the target that is aimed at."""

PRECISE = 0.005
"""A bisection is not asked to come nearer than this, even if the run did."""


@dataclass(frozen=True)
class Targets:
    """See the module.

    Args:
        regime: The ladder. Targets lie between the rates of its neighbours.
        targets: How many, from the middle of the ladder.
        seeds: How many, of crops and noise.
        steps: Of every run.
    """

    regime: Regime
    targets: int = 3
    seeds: int = 3
    steps: int = 1000

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        seeds = range(self.seeds)
        yield [self.rung(lmbda, seed) for seed in seeds for lmbda in self.regime.ladder]
        yield [self.bounded(t, seed, results) for seed in seeds for t in self.rates(results)]

    def rung(self, lmbda: float, seed: int) -> Train:
        """A codec of the ladder, trained on at its λ."""
        run = self.regime.run(
            lmbda, Sum(), self.steps, 5e-4, seed=seed, start=self.regime.ladder[lmbda]
        )
        return Train(run, on_crops=True)

    def rates(self, results: Results) -> list[float]:
        """The targets, in bits per pixel: geometric means of neighbours, to two digits."""
        rungs = [results[self.rung(lmbda, 0)]["crops"][0] for lmbda in self.regime.ladder]
        between = [math.sqrt(a * b) for a, b in zip(rungs, rungs[1:])]  # noqa: B905, RUF007
        first = max(0, (len(between) - self.targets) // 2)
        return [significant(rate, 2) for rate in between[first : first + self.targets]]

    def bounded(self, target: float, seed: int, results: Results) -> Train:
        """Distortion as small as possible at this rate, from the codec of the next higher rate.

        Bits are given up in fewer steps than put to use.
        """
        rates = {x: results[self.rung(x, 0)]["crops"][0] for x in self.regime.ladder}
        lmbda = next((x for x in self.regime.ladder if rates[x] >= target), max(rates))
        run = self.regime.run(
            lmbda,
            bounded_rate(target),
            self.steps,
            5e-4,
            seed=seed,
            start=self.regime.ladder[lmbda],
        )
        return Train(run, on_crops=True)

    def summarize(self, results: Results) -> dict[str, Any]:
        rows = []
        for target in self.rates(results):
            missed, gaps, saved = [], [], []
            for seed in range(self.seeds):
                result = results[self.bounded(target, seed, results)]
                rungs = [results[self.rung(lmbda, seed)] for lmbda in self.regime.ladder]
                off = result["crops"][0] / target - 1
                missed.append(100 * off)
                gaps.append(gap_above(point(result), [point(rung) for rung in rungs]))
                curve = [rung["crops"][0] for rung in rungs]
                near = max(abs(off), PRECISE)
                saved.append(count_bisections(list(self.regime.ladder), curve, target, near))
            largest = max(map(abs, missed))
            inside = all(map(math.isfinite, gaps))
            gap = show(estimate(gaps), "dB") if inside else "its rates end before"
            rows.append((f"{target:g}", show(estimate(missed), "%"), f"{largest:.1f} %", gap,
                         f"{fmean(saved):.1f}"))  # fmt: skip
        return {
            "title": "Targets in bits per pixel",
            "about": (
                f"One run of {self.steps} steps with `Lagrangian`, distortion as the objective "
                "and a bound on the rate, from the ladder's codec of the next higher rate. The "
                "rate is that of crops which lie evenly in the training photographs, symbols "
                "rounded; the dB are those of the eight photographs above the ladder, trained on "
                "for as many "
                f"steps and read off at the run's rate. {self.seeds} seeds; the goal is "
                f"{GOAL:.0%} and 0.1 dB. Trainings saved: how many static runs a bisection of ln λ "
                "between the ends of the ladder takes to come as near to the target."
            ),
            "measure": "",
            "comparisons": [],
            "tables": [
                table(
                    "Reached",
                    ("target / bpp", "rate − target", "largest", "above the ladder", "saved"),
                    rows,
                )
            ],
        }


def show(value: Estimate, unit: str) -> str:
    """With its interval."""
    return f"{value.mean:+.2f} ± {value.half:.2f} {unit}".replace("-", "−")


def gap_above(reached: Point, ladder: Sequence[Point]) -> float:
    """PSNR above the curve of a ladder at the same rate, in dB; NaN beyond its ends."""
    curve = sorted(ladder)
    read = PchipInterpolator(*zip(*curve, strict=True), extrapolate=False)
    return reached.psnr - float(read(reached.log_rate))


def count_bisections(
    lambdas: Sequence[float], rates: Sequence[float], target: float, near: float
) -> int:
    """How many runs a bisection of ln λ takes to a rate within `near` of the target, relatively.

    The rate of a run is read off the ladder's, whose ends are where the bisection begins.
    """
    logs = [math.log(lmbda) for lmbda in lambdas]
    read = PchipInterpolator(logs, [math.log(rate) for rate in rates])
    low, high = logs[0], logs[-1]
    for count in range(1, 50):
        middle = (low + high) / 2
        off = float(read(middle)) - math.log(target)
        if abs(math.expm1(off)) <= near:
            return count
        low, high = (low, middle) if off > 0 else (middle, high)
    return count
