"""Rows of the methods for stochastic gradients."""

from __future__ import annotations

from moo_balance import MoDo, SDMGrad
from tests.support.method import Facts, Method, preference, refused, unfit

METHODS = [
    Method("MoDo", lambda names: MoDo(), kind="gramian", independent=True),
    Method(
        "MoDo-preference-every",
        lambda names: MoDo(lr=0.01, preference=preference(names), every=2),
        kind="gramian-every",
        independent=True,
    ),
    Method("SDMGrad", lambda names: SDMGrad(), kind="gramian", independent=True),
    Method(
        "SDMGrad-preference",
        lambda names: SDMGrad(pull=1.0, lr=0.1, preference=preference(names)),
        kind="gramian",
        independent=True,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(MoDo, lr=0.0),
    refused(MoDo, rho=-0.1),
    refused(MoDo, preference={"a": 0.0}),
    refused(MoDo, every=0),
    unfit(MoDo, preference={"a": 1.0}),
    refused(SDMGrad, pull=-0.1),
    refused(SDMGrad, lr=0.0),
    refused(SDMGrad, momentum=1.0),
    refused(SDMGrad, iterations=0),
    refused(SDMGrad, preference={"a": -1.0}),
    refused(SDMGrad, every=0),
    unfit(SDMGrad, preference={"c": 1.0}),
]

FACTS: dict[str, Facts] = {
    "MoDo": Facts(
        "minimizes the norm of the combined expected gradients, a step at a time",
        "MGDA's weights with noise-free gradients and a small `lr`",
        cost="one backward pass per loss, at least two batches in each step",
    ),
    "SDMGrad": Facts(
        "minimizes the norm of a combination of the expected gradients and a preferred one",
        "between MGDA and FixedWeights",
        cost="one backward pass per loss, at least two batches in each step",
    ),
}
