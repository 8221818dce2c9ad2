"""Rows of the methods with targets."""

from __future__ import annotations

from moo_balance import Lagrangian
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Method,
    Names,
    by_name,
    refused,
    unfit,
)

bounds = by_name(0.7, INF, 0.5)


def targets(names: Names) -> dict[str, float]:
    """Upper bounds on all losses but "b"."""
    return {name: bound for name, bound in bounds(names).items() if bound < INF}


def schedules(names: Names) -> dict[str, dict[int, float]]:
    return {name: {0: 2 * bound, 2: bound} for name, bound in targets(names).items()}


def objective(names: Names, weight: float) -> dict[str, float]:
    """All losses but "c"; "a" has a target, too."""
    return {name: weight for name in names if name != "c"}


METHODS = [
    Method(
        "Lagrangian", lambda names: Lagrangian(targets(names), objective(names, 1.0)), kind="known"
    ),
    Method(
        "Lagrangian-raw",
        lambda names: Lagrangian(
            schedules(names),
            objective(names, 2.0),
            lr=0.3,
            damping=0.5,
            beta=0.0,
            renormalize=False,
        ),
        kind="known",
        total=None,
        alone=lambda loss: 2.0,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(Lagrangian, targets=0.2),
    *(
        refused(Lagrangian, targets={"b": target})
        for target in (
            NAN,
            "0.2",
            None,
            {},
            {5: 0.2},
            {0: INF},
            {0: 1.0, -1: 0.5},
            {0: 1.0, 1.5: 1},
        )
    ),
    refused(Lagrangian, targets={"b": 1.0}, objective={"a": 0.0}),
    refused(Lagrangian, targets={"b": 1.0}, objective=3.0),
    *(
        refused(Lagrangian, targets={"b": 1.0}, **{argument: value})
        for argument, value in (
            ("lr", 0.0),
            ("lr", INF),
            ("damping", -1.0),
            ("beta", 1.0),
            ("beta", -0.1),
        )
    ),
    unfit(Lagrangian, targets={"d": 1.0}),
    unfit(Lagrangian, targets={"b": 1.0}, objective="d"),
    unfit(Lagrangian, targets={}, objective="a"),
    unfit(Lagrangian, targets={}, objective={"b": 1.0}),
]

FACTS = {
    "Lagrangian": Facts(
        "minimizes a loss subject to upper bounds on others, in relative terms",
        "FixedWeights with the multipliers, once these have settled",
    ),
}
