"""Solutions 1 and 2 fine-tuned, against their own mean weights and other constant weights.

Everything starts where the solution lands, so that the runs of a seed stay close together:

1. a pilot finds the weights that a solution settles to, hence λ′ = λ · w_D / w_R;
2. the plain sum with λ′ trains the codec of the ladder on: this is the start;
3. from there the solution; its own mean weights, constant; and these with λ′ times a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Pair, Point, Question, answer, by_seed
from benchmarks.lic.jobs import Job, Train
from benchmarks.lic.regime import LANDING, Regime, describe, point, ratio, significant, table
from benchmarks.lic.weightings import fixed_ratio
from examples.lic.losses import SOLUTIONS
from examples.lic.runs import Run
from moo_balance import Sum
from moo_balance.weighting import Weighting

PAPER = {"Solution 1": -1.95, "Solution 2": -1.64}
"""BD-rate of the mean-scale hyperprior against the plain sum on Kodak, Table 1 of 2502.20161."""

NULL = 1.05
"""The factor of λ′ of a run that is compared with factor 1, where the right answer is 0."""

EXPECTED = 0.25
"""About where λ′ / λ is, to choose the codec that a pilot starts from."""


class Cell(NamedTuple):
    """A solution at one λ."""

    solution: str
    lmbda: float

    def __str__(self) -> str:
        return f"λ {self.lmbda:g}, {self.solution}"


@dataclass(frozen=True)
class FineTuning:
    """See the module.

    Args:
        regime: The ladder, and how runs are trained.
        lambdas: λ of the solutions.
        solutions: Their names.
        seeds: How many, of crops and noise.
        starts: How many of them have starts of their own; the others share these.
        factors: Of λ′ in runs with constant weights; 1 and :data:`NULL` among them.
        pilot_steps: Of a pilot.
        start_steps: Of a start.
        steps: Of what is compared.
    """

    regime: Regime
    lambdas: Sequence[float] = (0.0035, 0.0067, 0.013)
    solutions: Sequence[str] = tuple(SOLUTIONS)
    seeds: int = 8
    starts: int = 2
    factors: Sequence[float] = (0.8, 1.0, NULL, 1.25)
    pilot_steps: int = 400
    start_steps: int = 1000
    steps: int = 400

    @property
    def cells(self) -> list[Cell]:
        return [Cell(*pair) for pair in product(self.solutions, self.lambdas)]

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield [self.pilot(cell) for cell in self.cells]
        pairs = list(product(range(self.seeds), self.cells))
        yield [self.balanced(cell, seed, results) for seed, cell in pairs]
        yield [
            self.static(cell, seed, factor, results)
            for seed, cell in pairs
            for factor in self.factors
        ]

    def pilot(self, cell: Cell) -> Train:
        start = self.regime.nearest(EXPECTED * cell.lmbda)
        run = self.regime.run(
            cell.lmbda, SOLUTIONS[cell.solution], self.pilot_steps, 5e-4, seed=0, start=start
        )
        return Train(run, scored=False)

    def landing(self, cell: Cell, results: Results) -> float:
        """λ′, where the pilot settled."""
        return significant(cell.lmbda * ratio(results[self.pilot(cell)]))

    def start(self, cell: Cell, seed: int, results: Results) -> Run:
        lmbda = self.landing(cell, results)
        return self.regime.run(
            lmbda, Sum(), self.start_steps, 5e-4, seed=seed % self.starts,
            start=self.regime.nearest(lmbda),
        )  # fmt: skip

    def balanced(self, cell: Cell, seed: int, results: Results) -> Train:
        return self._job(cell, seed, SOLUTIONS[cell.solution], results)

    def static(self, cell: Cell, seed: int, factor: float, results: Results) -> Train:
        """With the mean weights of the balanced run of this seed, or with `factor` times its λ′."""
        own = ratio(results[self.balanced(cell, seed, results)])
        return self._job(cell, seed, fixed_ratio(factor * own), results)

    def _job(self, cell: Cell, seed: int, weighting: Weighting, results: Results) -> Train:
        start = self.start(cell, seed, results)
        run = self.regime.run(cell.lmbda, weighting, self.steps, 2e-4, seed=seed, start=start)
        return Train(run)

    def points(self, cell: Cell, seed: int, results: Results) -> tuple[Point, dict[float, Point]]:
        """Where the balanced run of a seed landed, and by their factors the constant weights."""
        static = {f: point(results[self.static(cell, seed, f, results)]) for f in self.factors}
        return point(results[self.balanced(cell, seed, results)]), static

    def summarize(self, results: Results) -> dict[str, Any]:
        questions, rows = [], []
        for cell in self.cells:
            runs = [self.points(cell, seed, results) for seed in range(self.seeds)]
            questions += compare(cell, runs)
            moved = fmean(balanced.log_rate - static[1.0].log_rate for balanced, static in runs)
            numbers = (f"{self.landing(cell, results):g}", *describe([b for b, _ in runs]))
            rows.append(
                (
                    cell.solution,
                    f"{cell.lmbda:g}",
                    *numbers,
                    f"{100 * moved:+.1f} %".replace("-", "−"),
                )
            )
        head = ("", "λ", "λ′ of the pilot", *LANDING, "rate against own mean weights")
        return {
            "title": "Fine-tuned",
            "about": (
                f"{self.steps} steps at a learning rate of 2e-4 from starts that the plain sum "
                f"trained on for {self.start_steps} steps at λ′, where the solution lands. "
                f"{self.seeds} seeds of crops and noise, over {self.starts} starts. The constant "
                f"weights are the solution's own mean in its second half, and these with λ′ times "
                f"{', '.join(f'{factor:g}' for factor in self.factors)}, which make the curve."
            ),
            "measure": "b",
            "comparisons": answer(questions),
            "tables": [table("Where the runs land", head, rows)],
        }


def compare(cell: Cell, runs: Sequence[tuple[Point, dict[float, Point]]]) -> Iterator[Question]:
    """The comparisons of one solution at one λ, from the runs of each seed."""

    def ask(name: str, pairs: list[Pair], paper: float | None = None) -> Question:
        return Question(name, str(cell), partial(by_seed, pairs), paper, null=paper is None)

    sides = [(balanced, static, list(static.values())) for balanced, static in runs]
    yield ask(
        f"constant weights, λ′ × {NULL:g} against λ′",
        [Pair(static[NULL], [static[1.0]], curve) for _, static, curve in sides],
    )
    yield ask(
        "against its own mean weights, constant",
        [Pair(balanced, [static[1.0]], curve) for balanced, static, curve in sides],
        PAPER[cell.solution],
    )
    yield ask(
        "against the curve of constant weights",
        [Pair(balanced, curve, curve) for balanced, _, curve in sides],
        PAPER[cell.solution],
    )
