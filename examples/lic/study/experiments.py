"""What is compared with what: balanced runs, and the rivals each of them has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.lic.study.laboratory import SUM, Laboratory, Result, Run
from examples.lic.study.tuning import Tuned
from moo_balance import AnalyticQP, BalancedTrajectory
from moo_balance.weighting import FixedWeights, Weighting

SOLUTIONS: dict[str, Weighting] = {
    "Solution 1": BalancedTrajectory(),
    "Solution 2": AnalyticQP(),
}


@dataclass(frozen=True)
class Experiment:
    """One regime of training, in which both solutions meet their rivals."""

    name: str
    steps: int
    lambdas: Mapping[str, Sequence[float]]
    """The λ along which each solution draws its curve."""
    prices: Mapping[str, Sequence[float]]
    """The λ of plain sums held against each solution: those that cover the rates where it lands,
    which is far below its own λ."""
    seeds: Sequence[int]
    rivals: Sequence[str]
    start: tuple[float, int] | None = None
    """λ and steps of the standard run from whose weights all go on; None from scratch."""
    batch: int = 2
    shape: Mapping[str, Any] = field(default_factory=dict)
    """`crop` and `widths`, when they are not those of a :class:`Run`."""


@dataclass(frozen=True)
class Unit:
    """One seed of an experiment: all runs that share their start, their crops and their noise."""

    laboratory: Laboratory
    experiment: Experiment
    tuned: Tuned
    seed: int

    def __call__(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Carry out all runs; the curves by solution, each with its rivals'."""
        return {
            solution: {
                name: [self._report(run) for run in runs(self, solution)]
                for name, runs in {"balanced": balanced, **self._rivals()}.items()
            }
            for solution in SOLUTIONS
        }

    def run(self, weighting: Weighting, lmbda: float, **changes: Any) -> Run:
        experiment = self.experiment
        common = {"batch": experiment.batch, "seed": self.seed, **experiment.shape}
        options = {"steps": experiment.steps, "start": self._start(common), **common, **changes}
        return Run(weighting, lmbda, lr=self.tuned.lr, **options)

    def _start(self, common: Mapping[str, Any]) -> Run | None:
        if self.experiment.start is None:
            return None
        lmbda, steps = self.experiment.start
        # Always trained on small batches, so that regimes begin from the same checkpoint.
        return Run(SUM, lmbda, steps, lr=1e-3, **{**common, "batch": 2})

    def _rivals(self) -> dict[str, Callable[[Unit, str], list[Run]]]:
        return {name: RIVALS[name] for name in self.experiment.rivals}

    def _report(self, run: Run) -> dict[str, Any]:
        result = self.laboratory(run)
        return {"lambda": run.lmbda, "steps": run.steps, **as_json(result, run)}


def as_json(result: Result, run: Run) -> dict[str, Any]:
    settled = result.settled
    return {
        "scores": result.scores,
        "effective_lambda": run.lmbda * settled["distortion"] / settled["rate"],
        "milliseconds": 1e3 * result.seconds / run.steps,
        "series": result.series,
    }


def balanced(unit: Unit, solution: str) -> list[Run]:
    weighting = SOLUTIONS[solution]
    return [unit.run(weighting, lmbda) for lmbda in unit.experiment.lambdas[solution]]


def static(unit: Unit, solution: str) -> list[Run]:
    """Constant weights, swept; all else as in the balanced runs."""
    return [unit.run(SUM, price) for price in unit.experiment.prices[solution]]


def own_weights(unit: Unit, solution: str) -> list[Run]:
    """For each balanced run its own settled weights, held constant from the first step."""
    runs = balanced(unit, solution)
    weights = [FixedWeights(unit.laboratory(run).settled) for run in runs]
    return [unit.run(w, run.lmbda) for w, run in zip(weights, runs, strict=True)]


def standard(unit: Unit, solution: str) -> list[Run]:
    """The plain sum with the clipping that suits it best."""
    return [
        unit.run(SUM, price, clip=unit.tuned.clip) for price in unit.experiment.prices[solution]
    ]


def standard_in_equal_time(unit: Unit, solution: str) -> list[Run]:
    """The same, with the steps that fit into the time the slower solution takes.

    The two cost nearly the same, and one curve serves both.
    """
    steps = round(unit.experiment.steps * unit.tuned.cost)
    options = {"clip": unit.tuned.clip, "steps": steps}
    return [unit.run(SUM, price, **options) for price in unit.experiment.prices[solution]]


RIVALS: dict[str, Callable[[Unit, str], list[Run]]] = {
    "static weights": static,
    "own mean weights": own_weights,
    "standard, equal steps": standard,
    "standard, equal time": standard_in_equal_time,
}
