"""One codec for every rate against one for each, all trained for as many steps from one start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Question, answer
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import Regime, bd_rate, table
from examples.lic.losses import level_name
from moo_balance import MGDA, FixedWeights
from moo_balance.weighting import Weighting

SINGLE = "one codec for each rate"
GAINS, OFFSETS, FULL = "gains", "gains+offsets", "variable-rate"
PLAIN = "+ step of z"


class Design(NamedTuple):
    """What a codec consists of, and how the losses of its levels are weighted."""

    arch: str
    balanced: bool = False
    one_level: bool = False


DESIGNS = {
    "gains": Design(GAINS),
    "+ offsets": Design(OFFSETS),
    PLAIN: Design(FULL),
    "+ MGDA": Design(FULL, balanced=True),
    "one random level in a step": Design(FULL, one_level=True),
}

PAPER = {("+ MGDA", SINGLE): 2.1}
"""On Kodak with eight levels, computed from CompressAI's stored points."""


@dataclass(frozen=True)
class VariableRate:
    """See the module.

    Args:
        regime: The ladder; all runs start from its highest λ, and its λ are the levels.
        seeds: How many, of crops and noise.
        steps: Of every run.
    """

    regime: Regime
    seeds: int = 4
    steps: int = 400

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield [
            job for seed in range(self.seeds) for jobs in self.runs(seed).values() for job in jobs
        ]

    def runs(self, seed: int) -> dict[str, list[Train]]:
        """The jobs of a seed: a run of all levels, or one for each."""
        levels = tuple(self.regime.ladder)
        runs = {SINGLE: [self._train(seed, Design(GAINS), (lmbda,)) for lmbda in levels]}
        return runs | {name: [self._train(seed, d, levels)] for name, d in DESIGNS.items()}

    def _train(self, seed: int, design: Design, levels: tuple[float, ...]) -> Train:
        weighting: Weighting = FixedWeights({level_name(x): 1 / len(levels) for x in levels})
        run = self.regime.run(
            levels, MGDA() if design.balanced else weighting, self.steps, 5e-4,
            arch=f"{design.arch}:{self.regime.arch}", one_level=design.one_level, seed=seed,
            start=list(self.regime.ladder.values())[-1],
        )  # fmt: skip
        return Train(run)

    def summarize(self, results: Results) -> dict[str, Any]:
        curves: dict[str, list[list[Any]]] = {}
        for seed in range(self.seeds):
            for name, jobs in self.runs(seed).items():
                levels = [level for job in jobs for level in results[job]["levels"].values()]
                curves.setdefault(name, []).append(levels)
        names = [SINGLE, *DESIGNS]
        pairs = [(name, SINGLE) for name in DESIGNS]
        pairs += [(test, anchor) for anchor, test in pairwise(names[1:5])]
        pairs += [(names[5], PLAIN), ("+ MGDA", names[5])]

        def values(test: str, anchor: str) -> list[float]:
            return [bd_rate(a, b) for a, b in zip(curves[test], curves[anchor], strict=True)]

        questions = [
            Question(f"{test} against {anchor}", "BD-rate", partial(values, test, anchor),
                     PAPER.get((test, anchor)))
            for test, anchor in pairs
        ]  # fmt: skip
        cost = [
            (name, f"{sum(results[job]['seconds'] for job in jobs) / 60:.1f}")
            for name, jobs in self.runs(0).items()
        ]
        levels = ", ".join(f"{lmbda:g}" for lmbda in self.regime.ladder)
        return {
            "title": "Variable rate",
            "about": (
                f"BD-rate over λ {levels}. Every run takes {self.steps} steps from the codec of "
                f"the highest λ; {self.seeds} seeds. The losses of the levels are averaged, but "
                "for the last two. The codecs for one rate have the gain of their λ, too, so that "
                "all start alike. Each increment is compared with the one above it."
            ),
            "measure": "BD-rate",
            "comparisons": answer(questions),
            "tables": [table("CPU-minutes of a seed", ("", "minutes"), cost)],
        }
