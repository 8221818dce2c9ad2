"""Rows of the methods that change another method."""

from __future__ import annotations

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    FixedWeights,
    GradDrop,
    MoDo,
    MovingAverage,
    Rescaled,
    Sequential,
    Sum,
    SumLog,
)
from tests.support.method import (
    Facts,
    Method,
    above_minus_one,
    adversarial,
    count,
    positive,
    refused,
)

METHODS = [
    Method("MovingAverage-MGDA", lambda names: MovingAverage(MGDA()), kind="gramian"),
    Method(
        "MovingAverage-adaptive",
        lambda names: MovingAverage(MGDA(normalize="l2"), beta="adaptive"),
        kind="gramian",
        scaling="unchanged",
    ),
    Method(
        "MovingAverage-every",
        lambda names: MovingAverage(AnalyticQP(every=3), beta=0.5),
        kind="gramian-every",
        bounds=above_minus_one,
    ),
    Method(
        "MovingAverage-FAMO", lambda names: MovingAverage(FAMO()), kind="observing", bounds=positive
    ),
    Method(
        "MovingAverage-adversarial",
        lambda names: MovingAverage(FixedWeights(adversarial(names))),
        kind="known",
        total=lambda names, losses: sum(adversarial(names).values()),
        negative=True,
        scaling="unchanged",
    ),
    Method("Sequential", lambda names: Sequential([MGDA(), SumLog()], [2]), kind="gramian-every"),
    Method(
        "Sequential-FAMO",
        lambda names: Sequential([FAMO(every=2), SumLog()], [3]),
        kind="observing",
        bounds=positive,
        scaling="shares",
    ),
    Method(
        "Rescaled",
        lambda names: Rescaled(SumLog(), every=2),
        kind="gramian-every",
        scaling="direction",
        bounds=positive,
        total=None,
    ),
    Method("Rescaled-mean", lambda names: Rescaled(MGDA(), "mean"), kind="gramian", total=None),
    Method(
        "Rescaled-count",
        lambda names: Rescaled(SumLog(renormalize=False), "count"),
        scaling="direction",
        bounds=positive,
        total=count,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(MovingAverage, weighting="MGDA"),
    refused(MovingAverage, weighting=Rescaled(SumLog())),
    refused(MovingAverage, weighting=MGDA(), beta=1.0),
    refused(MovingAverage, weighting=MGDA(), beta="fast"),
    refused(Sequential, milestones=[5], weightings="MGDA"),
    refused(Sequential, milestones=[], weightings=[]),
    refused(Sequential, milestones=[5], weightings=[MGDA(), Sum]),
    refused(Sequential, weightings=[MGDA(), Sum()], milestones=[]),
    refused(Sequential, weightings=[MGDA(), Sum()], milestones=[0]),
    refused(Sequential, weightings=[MGDA(), Sum()], milestones=[2.5]),
    refused(Sequential, weightings=[MGDA(), Sum(), MGDA()], milestones=[5, 5]),
    refused(Sequential, weightings=[MGDA(), Sum()], milestones=5),
    refused(Rescaled, weighting=MGDA),
    refused(Rescaled, weighting=MGDA(), length="two"),
    refused(Rescaled, weighting=MGDA(), every=0),
    refused(Rescaled, weighting=MoDo(), length="sum"),
    refused(Rescaled, weighting=GradDrop(), length="mean"),
]

FACTS = {
    "MovingAverage": Facts(
        "what the method inside does, with weights averaged over steps",
        "CR-MOGM where coefficients sum to 1",
        total="as the method inside",
        units="as the method inside",
        rises="yes",
        cost="as the method inside",
    ),
    "Sequential": Facts(
        "one method after another",
        "phases, as of `torch.optim.lr_scheduler.SequentialLR`",
        total="as the method in use",
        units="as the method in use",
        rises="as the method in use",
        cost="as the method in use",
    ),
    "Rescaled": Facts(
        "the length of the step",
        "any method; `length` chooses",
        total="what the length needs",
        units="as the method inside",
        rises="as the method inside",
        cost="a Gramian in each 20th step, none with `length='one'` or `'count'`",
    ),
}
