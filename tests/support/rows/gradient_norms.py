"""Rows of the methods that balance norms of gradients."""

from __future__ import annotations

from moo_balance import GradientNorms, GradNorm, LearningRateAnnealing
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Method,
    count,
    positive,
    preference,
    refused,
    unfit,
)

METHODS = [
    Method(
        "GradientNorms",
        lambda names: GradientNorms(),
        kind="gramian",
        total=None,
        scaling="direction",
    ),
    Method(
        "GradientNorms-reference",
        lambda names: GradientNorms("a", 0.5, max_weight=2.0, preference=preference(names)),
        kind="gramian",
        total=None,
    ),
    Method(
        "GradientNorms-jaxpi",
        lambda names: GradientNorms.jaxpi(every=3),
        kind="gramian-every",
        total=None,
        alone=lambda loss: 0.9 + 0.1 / (1 + 1e-5),
    ),
    Method("GradNorm", lambda names: GradNorm(), kind="gramian", bounds=positive, total=count),
    Method(
        "GradNorm-sgd",
        lambda names: GradNorm(0.0, 0.1, "sgd", preference(names), every=2),
        kind="gramian-every",
        total=count,
    ),
    Method(
        "LearningRateAnnealing",
        lambda names: LearningRateAnnealing("a", beta=0.5, initial=0.01, every=3),
        kind="gramian-every",
        total=None,
    ),
    Method(
        "LearningRateAnnealing-code",
        lambda names: LearningRateAnnealing(
            "a", "code", initial=0.01, preference=preference(names), every=1
        ),
        kind="gramian",
        total=None,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(GradientNorms, reference=0.0),
    refused(GradientNorms, reference=INF),
    refused(GradientNorms, reference=None),
    unfit(GradientNorms, reference="c"),
    refused(GradientNorms, beta=1.0),
    refused(GradientNorms, smooth="losses"),
    refused(GradientNorms, smooth="weights", initial=-1.0),
    refused(GradientNorms, initial=1.0),
    unfit(GradientNorms, smooth="weights", initial={"a": 1.0}),
    refused(GradientNorms, eps=-1.0),
    refused(GradientNorms, relative_eps=NAN),
    refused(GradientNorms, max_weight=0.0),
    refused(GradientNorms, preference={"a": 0.0, "b": 1.0}),
    unfit(GradientNorms, preference={"a": 1.0}),
    refused(GradientNorms, every=0),
    refused(GradNorm, alpha=-0.1),
    refused(GradNorm, lr=0.0),
    refused(GradNorm, weight_optimizer="lbfgs"),
    refused(GradNorm, preference={"a": -1.0}),
    unfit(GradNorm, preference={"a": 1.0}),
    refused(GradNorm, every=0),
    refused(LearningRateAnnealing, reference=None),
    unfit(LearningRateAnnealing, reference="c"),
    refused(LearningRateAnnealing, reference="a", form="preprint"),
    refused(LearningRateAnnealing, reference="a", beta=-0.1),
    refused(LearningRateAnnealing, reference="a", initial=0.0),
    unfit(LearningRateAnnealing, reference="a", initial={"b": 1.0}),
    refused(LearningRateAnnealing, reference="a", preference={"a": 0.0}),
    unfit(LearningRateAnnealing, reference="a", preference={"a": 1.0}),
    refused(LearningRateAnnealing, reference="a", every=0),
]

FACTS = {
    "GradientNorms": Facts(
        equalizes="the lengths of the weighted gradients",
        relation="where `GradNorm(alpha=0)` settles; for two losses the direction of `IMTLG`",
        total="nothing fixed: together as long as the plain gradients",
    ),
    "GradNorm": Facts(
        equalizes="the rates at which losses train, by the lengths of the weighted gradients",
        relation="with `alpha=0` it settles where `GradientNorms` is",
    ),
    "LearningRateAnnealing": Facts(
        equalizes="mean elements of the weighted gradients with the largest one of a reference",
        relation="`GradientNorms` with other norms: the largest element, and the mean magnitude",
        total="nothing fixed; the reference has 1",
    ),
}
