"""Refinement of latents, SGA and SGA+: BD-rate of each method against no refinement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Question, answer
from benchmarks.lic.jobs import Job, Refine
from benchmarks.lic.regime import Regime, bd_rates
from benchmarks.lic.roundings import TWO_CLASS
from examples.lic.refine import within
from examples.lic.refinement import Refinement
from examples.lic.rounding import SGA_ANNEALING, SGA_PLUS_ANNEALING, Gumbel

NONE, SGA = "none", "SGA: atanh, rounding y"

PAPER = {(SGA, NONE): -15.2}
"""On Kodak in 2000 iterations, computed from published curves."""


@dataclass(frozen=True)
class LatentRefinement:
    """See the module.

    Args:
        regime: The ladder.
        steps: Iterations; the published temperatures fall in as many.
        side: Of the middle of the photographs that is refined.
    """

    regime: Regime
    steps: int = 300
    side: int = 192

    def methods(self) -> dict[str, Refinement]:
        """Ways to refine, by their names."""
        annealing = within(SGA_PLUS_ANNEALING, self.steps)
        sga = Gumbel(TWO_CLASS["atanh"], within(SGA_ANNEALING, self.steps))
        return {
            NONE: Refinement(steps=0),
            SGA: Refinement(sga, self.steps, centered=False),
            **{
                f"SGA+: {name}": Refinement(Gumbel(rounding, annealing), self.steps)
                for name, rounding in TWO_CLASS.items()
            },
        }

    def curves(self) -> dict[str, list[Refine]]:
        """The jobs of each method, one for each codec of the ladder."""
        return {
            name: [Refine(path, x, how, self.side) for x, path in self.regime.ladder.items()]
            for name, how in self.methods().items()
        }

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield [job for curve in self.curves().values() for job in curve]

    def summarize(self, results: Results) -> dict[str, Any]:
        images = {
            name: [results[job]["images"] for job in jobs] for name, jobs in self.curves().items()
        }
        best = f"SGA+: {list(TWO_CLASS)[-1]}"
        pairs = [(name, NONE) for name in images if name != NONE] + [(best, SGA)]
        questions = [
            Question(f"{test} against {anchor}", "each photograph a value",
                     partial(bd_rates, images[test], images[anchor]),
                     PAPER.get((test, anchor)))
            for test, anchor in pairs
        ]  # fmt: skip
        return {
            "title": "Refined latents",
            "about": (
                f"BD-rate over the codecs of the ladder, {self.steps} iterations for the middle "
                f"{self.side} × {self.side} pixels of each photograph at the λ of its codec; the "
                "published temperatures fall in as many. The interval is over the eight "
                "photographs: it says how images differ, and one seed is behind each value."
            ),
            "measure": "BD-rate",
            "comparisons": answer(questions),
            "tables": [],
        }
