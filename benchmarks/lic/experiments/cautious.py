"""Adam and cautious Adam, each with constant weights and with Solution 1, in fine-tuning.

What appears to be the authors' code trains Solution 1 with a cautious Adam and the plain sum with
the usual one, so that its comparison cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.lic.cautious_adam import CautiousAdam
from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Pair, Point, Question, answer, by_seed
from benchmarks.lic.experiments.fine_tuning import Cell, FineTuning
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import point

ADAM: tuple[CautiousAdam, ...] = ()
CAUTIOUS = (CautiousAdam(),)
"""The observers of a run that has one or the other."""

COMPARED = {
    "Solution 1 against constant weights, both with Adam": (1, 0),
    "Solution 1 against constant weights, both with cautious Adam": (3, 2),
    "constant weights, cautious Adam against Adam": (2, 0),
    "Solution 1 with cautious Adam against constant weights with Adam": (3, 0),
}
"""Positions of the four arms: Adam with constant weights, Adam with Solution 1; and the same with
cautious Adam."""


@dataclass(frozen=True)
class Cautious:
    """See the module. Runs with Adam are those of the experiment named.

    Args:
        fine_tuning: With one λ, and Solution 1 only.
    """

    fine_tuning: FineTuning

    @property
    def cell(self) -> Cell:
        (cell,) = self.fine_tuning.cells
        return cell

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield from self.fine_tuning.jobs(results)
        yield [job for seed in range(self.fine_tuning.seeds) for job in self.tuned(seed, results)]

    def tuned(self, seed: int, results: Results) -> list[Train]:
        """The four arms, fine-tuned."""
        tuning, cell = self.fine_tuning, self.cell
        pair = [tuning.static(cell, seed, 1.0, results), tuning.balanced(cell, seed, results)]
        return [replace(job, observers=how) for how in (ADAM, CAUTIOUS) for job in pair]

    def _land(self, seed: int, results: Results) -> tuple[list[Point], list[Point]]:
        """Where the four arms landed, and the curve of constant weights."""
        curve = self.fine_tuning.points(self.cell, seed, results)[1].values()
        return [point(results[job]) for job in self.tuned(seed, results)], list(curve)

    def summarize(self, results: Results) -> dict[str, Any]:
        seeds = range(self.fine_tuning.seeds)
        sides = [self._land(seed, results) for seed in seeds]

        def compare(test: int, anchor: int) -> list[float]:
            return by_seed([Pair(arms[test], [arms[anchor]], curve) for arms, curve in sides])

        def interaction() -> list[float]:
            return [both - one for both, one in zip(compare(3, 2), compare(1, 0), strict=True)]

        values = {name: partial(compare, *arms) for name, arms in COMPARED.items()}
        values["Solution 1, how much cautious Adam changes its difference"] = interaction
        setting = f"λ {self.cell.lmbda:g}"
        questions = [Question(name, setting, value) for name, value in values.items()]
        return {
            "title": "Cautious Adam",
            "about": (
                "A cautious Adam drops the entries of its step that the gradient disagrees with, "
                "and enlarges the rest (arXiv 2411.16085). What appears to be the authors' code "
                "trains Solution 1 with it and the plain sum with Adam, which is the fourth "
                "comparison; the last is what both do together beyond what each does. Settings are "
                "those of fine-tuning. The section on runs from scratch has the same four arms."
            ),
            "measure": "b",
            "comparisons": answer(questions),
            "tables": [],
        }
