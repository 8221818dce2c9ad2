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
    parts: Literal["short", "full"] | None = "full"
    """Of the example's other parts; None leaves them out."""
    shape: Mapping[str, Any] = field(default_factory=dict)


EVERY_RIVAL = tuple(RIVALS)
FINETUNED = {"Solution 1": (0.0009, 0.005, 0.06, 0.7), "Solution 2": (0.0009, 0.0035, 0.025, 0.2)}
# Ladders with common rungs, since runs that two curves share are made once.
PRICES = {"Solution 1": (6e-5, 2e-4, 6e-4, 2e-3), "Solution 2": (2e-4, 6e-4, 2e-3, 6e-3)}
START = (0.013, 1500)
# From scratch λ hardly moves Solution 1, which lands at the lowest rates of all.
SCRATCH = {"Solution 1": (0.0018, 0.5), "Solution 2": (0.0018, 0.02, 0.2)}
SCRATCH_PRICES = {"Solution 1": (2e-5, 5e-5, 2e-4, 6e-4), "Solution 2": (5e-5, 2e-4, 6e-4, 2e-3)}
TINY = {"crop": 64, "widths": (8, 8)}


def full() -> Scale:
    """Sized for about an hour and a half on one busy core."""
    rivals = ("static weights", "own mean weights")
    fine_tuned = [
        Experiment("fine-tuned", 400, FINETUNED, PRICES, range(3), EVERY_RIVAL, START),
        Experiment("far from balance", 400, FINETUNED, PRICES, range(3), rivals, (0.1, 1500)),
    ]
    from_scratch = [
        Experiment("from scratch", 600, SCRATCH, SCRATCH_PRICES, range(4), EVERY_RIVAL),
        Experiment(
            "from scratch, longer", 1800, {name: lambdas[1:2] for name, lambdas in SCRATCH.items()},
            SCRATCH_PRICES, range(3), rivals,
        ),
    ]  # fmt: skip
    clips = (None, 1.0, 5.0)
    return Scale(
        {
            "fine-tuned": Family(Grid((2.5e-4, 5e-4, 1e-3, 2e-3), clips, 0.0012), fine_tuned),
            "from scratch": Family(Grid((1e-3, 2e-3), clips, 0.0006), from_scratch),
        },
        cost_rounds=40,
    )


def short() -> Scale:
    """A minute or two: everything once, too little of it to find anything out."""
    prices = dict.fromkeys(FINETUNED, (6e-5, 6e-4, 6e-3))
    fine_tuned = Experiment(
        "fine-tuned", 20, FINETUNED, prices, range(2), EVERY_RIVAL, (0.013, 100)
    )
    lambdas = {name: lambdas[1:3] for name, lambdas in FINETUNED.items()}
    from_scratch = Experiment("from scratch", 30, lambdas, prices, range(1), EVERY_RIVAL)
    return Scale(
        {
            "fine-tuned": Family(Grid((5e-4, 1e-3), (None, 1.0), 0.0012), [fine_tuned]),
            "from scratch": Family(Grid((2e-3,), (None,), 0.0006), [from_scratch]),
        },
        cost_rounds=5,
        parts="short",
    )


def tiny() -> Scale:
    """Seconds, for the test suite."""
    lambdas = dict.fromkeys(FINETUNED, (0.01, 0.1))
    experiment = Experiment(
        "fine-tuned", 2, lambdas, lambdas, range(1), EVERY_RIVAL, (0.01, 2), shape=TINY
    )
    return Scale(
        {"fine-tuned": Family(Grid((1e-3,), (None,), 0.001), [experiment])},
        cost_rounds=1,
        parts=None,
        shape=TINY,
    )
