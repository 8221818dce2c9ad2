"""Rows of the methods that minimise the norm of a combination of gradients."""

from __future__ import annotations

from moo_balance import MGDA, AnalyticQP
from tests.support.method import (
    Facts,
    Kind,
    Method,
    above_minus_one,
    positive,
    preference,
    refused,
    unbounded,
    unfit,
)


def mgda(
    id: str,
    kind: Kind = "gramian",
    bounds=unbounded,
    scaling=None,
    never_rises: bool = False,
    **arguments: object,
) -> Method:
    return Method(
        f"MGDA-{id}",
        lambda names: MGDA(**arguments),
        kind=kind,
        bounds=bounds,
        never_rises=never_rises,
        scaling=scaling,
    )


METHODS = [
    Method("AnalyticQP", lambda names: AnalyticQP(), kind="gramian", bounds=above_minus_one),
    Method(
        "AnalyticQP-simplex",
        lambda names: AnalyticQP(projection="simplex"),
        kind="gramian",
        bounds=above_minus_one,
    ),
    Method(
        "AnalyticQP-exact",
        lambda names: AnalyticQP(projection="exact"),
        kind="gramian",
        bounds=above_minus_one,
        never_rises=True,
    ),
    Method(
        "AnalyticQP-no-shift",
        lambda names: AnalyticQP(shift=0.0),
        kind="gramian",
        bounds=positive,
        scaling="shares",
    ),
    Method(
        "AnalyticQP-raw",
        lambda names: AnalyticQP(projection="simplex", shift=0.0, renormalize=False),
        kind="gramian",
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "AnalyticQP-every",
        lambda names: AnalyticQP(every=3),
        kind="gramian-every",
        bounds=above_minus_one,
    ),
    Method(
        "AnalyticQP-preference",
        lambda names: AnalyticQP(preference=preference(names)),
        kind="gramian",
        bounds=above_minus_one,
    ),
    Method(
        "AnalyticQP-floor",
        lambda names: AnalyticQP(shift=0.0, floor=0.1, every=3),
        kind="gramian-every",
        bounds=positive,
        scaling="shares",
    ),
    mgda("none", never_rises=True),
    mgda("l2", normalize="l2", scaling="unchanged"),
    mgda("loss", normalize="loss", bounds=positive, scaling="unchanged"),
    mgda("loss+", normalize="loss+", bounds=positive),
    mgda("log", normalize="log", bounds=positive, scaling="shares", never_rises=True),
    Method(
        "MGDA-preference",
        lambda names: MGDA(preference=preference(names)),
        kind="gramian",
        never_rises=True,
    ),
    mgda("every", kind="gramian-every", every=3),
    mgda(
        "log-every",
        kind="gramian-every",
        normalize="log",
        every=2,
        bounds=positive,
        scaling="shares",
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(AnalyticQP, projection="cone"),
    refused(AnalyticQP, shift=-1.0),
    refused(AnalyticQP, floor=-1.0),
    refused(AnalyticQP, every=0),
    *(
        refusal
        for cls in (AnalyticQP, MGDA)
        for refusal in (
            refused(cls, preference={"a": -1.0}),
            unfit(cls, preference={"a": 1.0}),
        )
    ),
    refused(MGDA, normalize="rms"),
    refused(MGDA, every=0),
]

FACTS = {
    "AnalyticQP": Facts("relative improvement of 1 + loss, softened", "Balanced R-D, Solution 2"),
    "MGDA": Facts("improvement of the losses", "the shortest convex combination of gradients"),
}
