"""Both solutions with one piece changed: where they go from a trained codec, and what collapses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.lic.engine import Results
from benchmarks.lic.jobs import Job, ScoreCodec, Train
from benchmarks.lic.regime import LANDING, Regime, describe, point, ratio, table
from benchmarks.lic.weightings import NotRenormalized
from moo_balance import AnalyticQP, BalancedTrajectory
from moo_balance.weighting import Weighting

GAMMAS = (0.0, 5e-4, 5e-3, 1e-2, 1.5e-2)
"""The paper's grid, without its choice of 1e-3, which is the library's default."""

VARIATIONS: Mapping[str, Weighting] = {
    "Solution 1": BalancedTrajectory(),
    **{f"Solution 1, γ = {gamma:g}": BalancedTrajectory(decay=gamma) for gamma in GAMMAS},
    "Solution 1, shift 0": BalancedTrajectory(shift=0.0),
    "Solution 1, without c": NotRenormalized(),
    "Solution 2": AnalyticQP(),
    "Solution 2, simplex": AnalyticQP(projection="simplex"),
    "Solution 2, exact": AnalyticQP(projection="exact"),
    "Solution 2, shift 0": AnalyticQP(shift=0.0),
    "Solution 2, without c": AnalyticQP(renormalize=False),
}

LOST = 6.0
"""dB below the start from which on a codec counts as collapsed."""


@dataclass(frozen=True)
class Ablations:
    """See the module.

    Args:
        regime: The ladder; all runs start from the codec of the nearest λ.
        lmbda: λ of all runs.
        seeds: How many, of crops and noise.
        steps: Of every run.
    """

    regime: Regime
    lmbda: float = 0.0067
    seeds: int = 2
    steps: int = 400

    @property
    def start(self) -> ScoreCodec:
        return ScoreCodec(self.regime.nearest(self.lmbda))

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield [self.start, *(job for name in VARIATIONS for job in self.runs(name))]

    def runs(self, name: str) -> list[Train]:
        """The jobs of a variation, by seed."""
        how = (self.lmbda, VARIATIONS[name], self.steps, 5e-4)
        start = self.start.codec
        return [Train(self.regime.run(*how, start=start, seed=seed)) for seed in range(self.seeds)]

    def summarize(self, results: Results) -> dict[str, Any]:
        start = point(results[self.start])
        rows = [("the codec at the start", *describe([start]), "", "", "")]
        for name in VARIATIONS:
            runs = [results[job] for job in self.runs(name)]
            if broken := [run["error"] for run in runs if "error" in run]:
                rows.append((name, "", "", "", "", broken[0]))
                continue
            points = [point(run) for run in runs]
            weight = fmean(run["weights"][0] for run in runs)
            effective = math.exp(fmean(math.log(max(ratio(run), 1e-9)) for run in runs))
            lost = start.psnr - fmean(p.psnr for p in points)
            text = explain(name, weight, lost, start.log_rate - fmean(p.log_rate for p in points))
            numbers = (f"{weight:.2f}", f"{self.lmbda * effective:.2g}")
            rows.append((name, *describe(points), *numbers, text))
        return {
            "title": "Ablations",
            "about": (
                f"{self.steps} steps at λ {self.lmbda:g} and a learning rate of 5e-4 from the "
                f"nearest codec of the ladder, means over {self.seeds} seeds. The weight of the "
                "rate and λ′ are means over the second half."
            ),
            "measure": "",
            "comparisons": [],
            "tables": [table("One piece changed", ("", *LANDING, "w_R", "λ′", ""), rows)],
        }


def explain(name: str, weight: float, lost: float, nats: float) -> str:
    """A sentence on a run that collapsed; nothing on another one.

    Args:
        name: The variation.
        weight: Of the rate.
        lost: PSNR lost since the start, in dB.
        nats: By which the logarithm of the rate fell.
    """
    if lost < LOST:
        return ""
    fell = f"Collapsed: {lost:.0f} dB lost, and the rate is {math.exp(-nats):.2g} of what it was."
    if "shift 0" in name:
        return f"{fell} The logarithm of the rate has no lower bound and goes on being reduced."
    if weight > 0.95:
        return f"{fell} The rate has nearly all of the weight, so nothing holds the distortion."
    return fell
