"""How large a study is: the full one, minutes, or seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from examples.lic.study.experiments import RIVALS, Experiment
from examples.lic.study.tuning import Grid


@dataclass(frozen=True)
class Family:
    """Experiments that share what was tuned: learning rates, clipping."""

    grid: Grid
    experiments: Sequence[Experiment]
    """The first one is what the tuning trains; its steps are also those of the grid."""


@dataclass(frozen=True)
class Scale:
    """A whole study."""

    families: Mapping[str, Family]
    cost_rounds: int
    parts: Literal["short", "full"] = "full"
    shape: Mapping[str, Any] = field(default_factory=dict)


EVERY_RIVAL = tuple(RIVALS)
FINETUNED = {
    "Solution 1": (0.0035, 0.02, 0.12, 0.7),
    "Solution 2": (0.0035, 0.013, 0.05, 0.2),
}
PRICES = (0.0002, 0.0005, 0.0012, 0.0025, 0.005)
START = (0.013, 1500)
TINY = {"crop": 64, "widths": (8, 8)}


def full() -> Scale:
    """Sized for about an hour and a half on one busy core."""
    some = {name: lambdas[:3] for name, lambdas in FINETUNED.items()}
    few = {"Solution 1": (0.02, 0.12), "Solution 2": (0.0035, 0.02)}
    rivals = ("static weights", "own mean weights")
    seeds = range(3)
    fine_tuned = [
        Experiment("fine-tuned", 400, FINETUNED, PRICES, seeds, EVERY_RIVAL, START),
        Experiment("far from balance", 400, some, PRICES, seeds, rivals, (0.1, 1500)),
        Experiment("longer", 1000, few, PRICES[:4], seeds, rivals, START),
        Experiment("larger batch", 200, few, PRICES[:4], seeds, rivals, START, batch=8),
    ]
    lambdas = {"Solution 1": (0.0018, 0.05, 1.5), "Solution 2": (0.0018, 0.02, 0.2)}
    prices = (0.00005, 0.0002, 0.0006, 0.002)
    from_scratch = [Experiment("from scratch", 600, lambdas, prices, seeds, EVERY_RIVAL)]
    clips = (None, 1.0, 5.0)
    return Scale(
        {
            "fine-tuned": Family(Grid((2.5e-4, 5e-4, 1e-3, 2e-3), clips, 0.0012, 0.02), fine_tuned),
            "from scratch": Family(Grid((1e-3, 2e-3), clips, 0.0006, 0.02), from_scratch),
        },
        cost_rounds=40,
    )


def short() -> Scale:
    """A minute or two: everything once, too little of it to find anything out."""
    lambdas = {"Solution 1": (0.005, 0.1, 0.7), "Solution 2": (0.002, 0.013, 0.1)}
    fine_tuned = Experiment(
        "fine-tuned", 40, lambdas, (0.0003, 0.0012, 0.0048), range(2), EVERY_RIVAL, (0.013, 200)
    )
    lambdas = {"Solution 1": (0.002, 0.1), "Solution 2": (0.002, 0.1)}
    from_scratch = Experiment("from scratch", 60, lambdas, (0.0001, 0.001), range(1), EVERY_RIVAL)
    return Scale(
        {
            "fine-tuned": Family(Grid((5e-4, 1e-3), (None, 1.0), 0.0012, 0.02), [fine_tuned]),
            "from scratch": Family(Grid((1e-3, 2e-3), (None,), 0.0005, 0.05), [from_scratch]),
        },
        cost_rounds=5,
        parts="short",
    )


def tiny() -> Scale:
    """Seconds, for the test suite."""
    lambdas = {"Solution 1": (0.01, 0.1), "Solution 2": (0.01, 0.1)}
    experiment = Experiment(
        "fine-tuned", 2, lambdas, (0.001, 0.01), range(1), EVERY_RIVAL, (0.01, 2), shape=TINY
    )
    return Scale(
        {"fine-tuned": Family(Grid((1e-3,), (None,), 0.001, 0.02), [experiment])},
        cost_rounds=1,
        shape=TINY,
    )
