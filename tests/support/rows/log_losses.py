"""Rows of the methods on log losses."""

from __future__ import annotations

from moo_balance import FAMO, BalancedTrajectory, SumLog
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Kind,
    Method,
    above_minus_one,
    low,
    low_bounds_shifted,
    positive,
    preference,
    refused,
    unfit,
)


def famo(id: str, kind: Kind = "observing", **arguments: object) -> Method:
    """FAMO without bounds: equal relative improvement, whatever the units of the losses."""
    return Method(
        f"FAMO-{id}",
        lambda names: FAMO(**arguments),
        kind=kind,
        bounds=positive,
        scaling="shares",
    )


def trajectory(id: str, kind: Kind = "observing", **arguments: object) -> Method:
    return Method(
        f"BalancedTrajectory-{id}",
        lambda names: BalancedTrajectory(**arguments),
        kind=kind,
        bounds=above_minus_one,
    )


METHODS = [
    Method("SumLog", lambda names: SumLog(), bounds=positive, scaling="shares"),
    Method(
        "SumLog-shift",
        lambda names: SumLog(shift=1.0),
        bounds=above_minus_one,
    ),
    Method(
        "SumLog-bounds",
        lambda names: SumLog(bounds=low(names), shift=0.5),
        bounds=low_bounds_shifted,
    ),
    Method(
        "SumLog-raw",
        lambda names: SumLog(renormalize=False, floor=0),
        bounds=positive,
        total=lambda names, losses: float((1 / losses).sum()),
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "SumLog-preference",
        lambda names: SumLog(preference=preference(names)),
        bounds=positive,
        scaling="shares",
    ),
    Method("SumLog-floor", lambda names: SumLog(floor=0.1), bounds=positive, scaling="shares"),
    famo("adam"),
    famo("floor", floor=0.1),
    famo("sgd", logit_optimizer="sgd", lr=2.0),
    famo("no-decay", decay=0.0),
    famo("lagged", kind="lagged", lagged=True),
    famo("lagged-sgd", kind="lagged", lagged=True, logit_optimizer="sgd"),
    famo("every", every=3),
    famo("lagged-every", kind="lagged", lagged=True, every=2),
    Method(
        "FAMO-bounds",
        lambda names: FAMO(bounds=low(names), shift=0.5),
        kind="observing",
        bounds=low_bounds_shifted,
    ),
    Method(
        "FAMO-preference",
        lambda names: FAMO(preference=preference(names)),
        kind="observing",
        bounds=positive,
        scaling="shares",
    ),
    trajectory("defaults"),
    trajectory("paper", logit_optimizer="sgd"),
    trajectory("code", decay=3e-3),
    trajectory("lagged", kind="lagged", lagged=True),
    trajectory("every", every=2),
    Method(
        "BalancedTrajectory-no-shift",
        lambda names: BalancedTrajectory(shift=0.0),
        kind="observing",
        bounds=positive,
        scaling="shares",
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(SumLog, bounds=INF),
    refused(SumLog, shift={"a": NAN}),
    refused(SumLog, floor=-0.1),
    refused(FAMO, floor=INF),
    unfit(SumLog, bounds={"d": 1.0}),
    unfit(SumLog, shift={"d": 1.0}),
    *(
        refused(cls, **{argument: value})
        for cls in (FAMO, BalancedTrajectory)
        for argument, value in (
            ("lr", 0.0),
            ("lr", INF),
            ("lr", "fast"),
            ("decay", -1e-3),
            ("decay", NAN),
            ("shift", NAN),
            ("logit_optimizer", "rmsprop"),
            ("every", 0),
            ("every", 1.5),
        )
    ),
    *(
        refusal
        for cls in (SumLog, FAMO, BalancedTrajectory)
        for refusal in (
            refused(cls, preference={"a": 0.0}),
            unfit(cls, preference={"a": 1.0}),
        )
    ),
    refused(FAMO, bounds=-INF),
    refused(FAMO, bounds={"a": None}),
    unfit(FAMO, bounds={"d": 0.0}),
    unfit(FAMO, shift={"d": 0.0}),
    refused(BalancedTrajectory, shift=-1.0),
]

FACTS = {
    "SumLog": Facts(
        "minimizes the product of the losses, each plus a floor",
        "with `floor=0` where `FAMO` ends",
    ),
    "FAMO": Facts("relative improvement of the losses", "`MGDA('log')` in small steps"),
    "BalancedTrajectory": Facts(
        "relative improvement of 1 + loss", "`FAMO(shift=1)`; Balanced R-D, Solution 1"
    ),
}
