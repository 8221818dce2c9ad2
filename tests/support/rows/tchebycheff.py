"""Rows of the Tchebycheff scalarizations."""

from __future__ import annotations

from moo_balance import OnlineTchebycheff, SmoothTchebycheff, Tchebycheff
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Method,
    average,
    ideal,
    nadir,
    positive,
    preference,
    refused,
    unfit,
)

METHODS = [
    Method("Tchebycheff", lambda names: Tchebycheff(), total=average),
    Method(
        "Tchebycheff-augmented",
        lambda names: Tchebycheff(augment=0.1),
        total=lambda names, losses: 1 / len(names) + 0.1,
        alone=lambda loss: 1.1,
    ),
    Method("Tchebycheff-running", lambda names: Tchebycheff(ideal="running"), total=average),
    Method(
        "Tchebycheff-preference",
        lambda names: Tchebycheff(preference=preference(names), ideal=ideal(names), augment=0.1),
        total=None,
        alone=lambda loss: 1.1,
    ),
    Method("SmoothTchebycheff", lambda names: SmoothTchebycheff(), total=None),
    Method(
        "SmoothTchebycheff-preference",
        lambda names: SmoothTchebycheff(
            mu=1.0, preference=preference(names), ideal=ideal(names), nadir=nadir(names)
        ),
        total=None,
        alone=lambda loss: 1 / 2.1,
    ),
    Method(
        "SmoothTchebycheff-log",
        lambda names: SmoothTchebycheff(mu=1.0, log=True),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
    ),
    Method(
        "SmoothTchebycheff-warm-up",
        lambda names: SmoothTchebycheff(warmup_steps=2),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "SmoothTchebycheff-log-warm-up",
        lambda names: SmoothTchebycheff(log=True, warmup_steps=2),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method("OnlineTchebycheff", lambda names: OnlineTchebycheff(), kind="known", total=average),
    Method(
        "OnlineTchebycheff-projected",
        lambda names: OnlineTchebycheff(lr=1.0, update="projected"),
        kind="known",
        total=average,
    ),
    Method(
        "OnlineTchebycheff-preference",
        lambda names: OnlineTchebycheff(preference=preference(names)),
        kind="known",
        total=None,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    *(
        refusal
        for cls in (Tchebycheff, SmoothTchebycheff, OnlineTchebycheff)
        for refusal in (
            refused(cls, preference={"a": 0.0, "b": 1.0}),
            refused(cls, preference={"a": -1.0}),
            unfit(cls, preference={"a": 1.0}),
            unfit(cls, preference={"a": 1.0, "b": 1.0, "d": 1.0}),
        )
    ),
    refused(Tchebycheff, ideal="walking"),
    refused(Tchebycheff, ideal={"a": NAN}),
    refused(Tchebycheff, augment=-0.1),
    unfit(Tchebycheff, ideal={"d": 0.0}),
    refused(SmoothTchebycheff, mu=0.0),
    refused(SmoothTchebycheff, ideal=INF),
    refused(SmoothTchebycheff, nadir=NAN),
    refused(SmoothTchebycheff, ideal=1.0, nadir=0.5),
    refused(SmoothTchebycheff, ideal={"b": 2.0}, nadir=1.0),
    refused(SmoothTchebycheff, nadir={"a": 0.0}),
    refused(SmoothTchebycheff, warmup_steps=-1),
    refused(SmoothTchebycheff, warmup_steps=1.5),
    refused(SmoothTchebycheff, nadir=1.0, warmup_steps=2),
    unfit(SmoothTchebycheff, ideal={"d": 0.0}),
    unfit(SmoothTchebycheff, nadir={"a": 1.0}),
    refused(OnlineTchebycheff, lr=0.0),
    refused(OnlineTchebycheff, update="newton"),
]

FACTS = {
    "Tchebycheff": Facts(
        "minimizes the worst loss, weighted by a preference",
        "reaches any point of the front, also where it is not convex",
        total="1/K, plus `augment`",
    ),
    "SmoothTchebycheff": Facts(
        "minimizes a smooth maximum of the losses",
        "`Tchebycheff` for a small `mu`",
        total="1/K without nadir and `log`",
    ),
    "OnlineTchebycheff": Facts(
        "minimizes the worst loss over the run", "`Tchebycheff` with weights that learn"
    ),
}
