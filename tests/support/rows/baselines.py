"""Rows of the baselines, which use no gradient and keep nothing."""

from __future__ import annotations

from moo_balance import FixedWeights, RandomWeights, Sum
from tests.support.method import NAN, Facts, Method, adversarial, count, fixed, refused, unfit

METHODS = [
    Method("Sum", lambda names: Sum(), kind="known", total=count, scaling="unchanged"),
    Method(
        "FixedWeights",
        lambda names: FixedWeights(fixed(names)),
        kind="known",
        total=lambda names, losses: sum(fixed(names).values()),
        scaling="unchanged",
    ),
    Method(
        "FixedWeights-adversarial",
        lambda names: FixedWeights(adversarial(names)),
        kind="known",
        total=lambda names, losses: sum(adversarial(names).values()),
        negative=True,
        scaling="unchanged",
    ),
    Method(
        "RandomWeights",
        lambda names: RandomWeights(seed=3),
        kind="known",
        equivariant=False,
        scaling="unchanged",
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(FixedWeights, values={"a": NAN}),
    refused(FixedWeights, values={"a": "1"}),
    unfit(FixedWeights, values={"a": 1.0}),
    unfit(FixedWeights, values={"a": 1.0, "b": 1.0, "d": 1.0}),
    refused(RandomWeights, seed=-1),
    refused(RandomWeights, seed=0.5),
]

FACTS = {
    "Sum": Facts("minimizes the plain sum", "`sum(losses).backward()`"),
    "FixedWeights": Facts(
        "minimizes a weighted sum", "`Sum` with weights of yours", total="what you give"
    ),
    "RandomWeights": Facts("nothing", "a baseline that any method should beat"),
}
