"""Adam and cautious Adam, each with constant weights and with Solution 1.

What appears to be the authors' code trains Solution 1 with a cautious Adam and the plain sum with
the usual one, so that its comparison cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from benchmarks.lic.cautious_adam import CautiousAdam
from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Pair, Point, Question, answer, by_seed
from benchmarks.lic.experiments.fine_tuning import Cell, FineTuning
from benchmarks.lic.experiments.from_scratch import FIRST, SUM, FromScratch
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import point

ADAM: tuple[CautiousAdam, ...] = ()
CAUTIOUS = (CautiousAdam(),)
"""The observers of a run that has one or the other."""

COMPARED = {
    "Solution 1 against {}, both with Adam": (1, 0),
    "Solution 1 against {}, both with cautious Adam": (3, 2),
    "{}, cautious Adam against Adam": (2, 0),
    "Solution 1 with cautious Adam against {} with Adam": (3, 0),
}
"""Positions of the four arms: Adam with constant weights or the plain sum, Adam with Solution 1;
and the same with cautious Adam."""


@dataclass(frozen=True)
class Cautious:
    """See the module. Runs with Adam are those of the two experiments named.

    Args:
        fine_tuning: With one λ, and Solution 1 only.
        from_scratch: With one λ.
    """

    fine_tuning: FineTuning
    from_scratch: FromScratch

    @property
    def cell(self) -> Cell:
        (cell,) = self.fine_tuning.cells
        return cell

    @property
    def lmbda(self) -> float:
        """That of the runs from scratch."""
        (lmbda,) = self.from_scratch.lambdas
        return lmbda

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        tuning, scratch = self.fine_tuning, self.from_scratch
        yield from tuning.jobs(results)
        yield [job for seed in range(tuning.seeds) for job in self.tuned(seed, results)]
        seeds = range(scratch.seeds)
        arms = list(product(seeds, (ADAM, CAUTIOUS), (SUM, FIRST)))
        yield [scratch.training(s, self.lmbda, arm, results, how) for s, how, arm in arms]
        yield [job for seed in seeds for job in self.ended(seed, results)]
        yield [job for seed in seeds for job in scratch.curve(seed, self.lmbda, results)]

    def tuned(self, seed: int, results: Results) -> list[Train]:
        """The four arms, fine-tuned."""
        tuning, cell = self.fine_tuning, self.cell
        pair = [tuning.static(cell, seed, 1.0, results), tuning.balanced(cell, seed, results)]
        return [replace(job, observers=how) for how in (ADAM, CAUTIOUS) for job in pair]

    def ended(self, seed: int, results: Results) -> list[Train]:
        """The four arms from scratch, with a cool-down by Adam."""
        return [
            self.from_scratch.ending(seed, self.lmbda, arm, results, observers=how)
            for how in (ADAM, CAUTIOUS)
            for arm in (SUM, FIRST)
        ]

    def summarize(self, results: Results) -> dict[str, Any]:
        tuning, scratch, questions = self.fine_tuning, self.from_scratch, []
        setting, sides = f"fine-tuned, λ {self.cell.lmbda:g}", []
        for seed in range(tuning.seeds):
            curve = tuning.points(self.cell, seed, results)[1].values()
            sides.append(([point(results[job]) for job in self.tuned(seed, results)], list(curve)))
        questions += ask(setting, "constant weights", sides)
        setting, sides = f"from scratch, λ {self.lmbda:g}", []
        for seed in range(scratch.seeds):
            curve = [point(results[job]) for job in scratch.curve(seed, self.lmbda, results)]
            sides.append(([point(results[job]) for job in self.ended(seed, results)], curve))
        questions += ask(setting, "the plain sum", sides)
        return {
            "title": "Cautious Adam",
            "about": (
                "A cautious Adam drops the entries of its step that the gradient disagrees with, "
                "and enlarges the rest (arXiv 2411.16085). What appears to be the authors' code "
                "trains Solution 1 with it and the plain sum with Adam, which is the fourth "
                "comparison of each setting; the last is what both do together beyond what each "
                "does. Settings are those of the sections named; cool-downs are with Adam."
            ),
            "measure": "b",
            "comparisons": answer(questions),
            "tables": [],
        }


def ask(
    setting: str, plain: str, sides: Sequence[tuple[list[Point], list[Point]]]
) -> Iterator[Question]:
    """The comparisons in one setting, from the four arms and the curve of each seed."""

    def values(test: int, anchor: int) -> list[float]:
        return by_seed([Pair(arms[test], [arms[anchor]], curve) for arms, curve in sides])

    def interaction() -> list[float]:
        return [both - one for both, one in zip(values(3, 2), values(1, 0), strict=True)]

    for name, (test, anchor) in COMPARED.items():
        yield Question(name.format(plain), setting, partial(values, test, anchor))
    yield Question(
        "Solution 1, how much cautious Adam changes its difference", setting, interaction
    )
