"""Rows of the methods that change another method."""

from __future__ import annotations

import math

from torch import Tensor

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    FixedWeights,
    GradDrop,
    MoCo,
    MoDo,
    MovingAverage,
    Rescaled,
    Sequential,
    Sum,
    SumLog,
    WithConstant,
)
from tests.support.method import (
    Facts,
    Method,
    Names,
    above_minus_one,
    adversarial,
    count,
    positive,
    refused,
    unfit,
)


def last(names: Names) -> dict[str, float]:
    """A constant for the loss "c", where it is one of them."""
    return {name: -0.5 for name in names if name == "c"}


def with_last(names: Names, losses: Tensor) -> float:
    """What the coefficients sum to, if those of the method inside sum to 1."""
    return 1.0 + sum(last(names).values())


def positive_before_last(names: Names) -> list[float]:
    return [-math.inf if name == "c" else 0.0 for name in names]


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
    Method(
        "WithConstant",
        lambda names: WithConstant(SumLog(), last(names)),
        bounds=positive_before_last,
        total=with_last,
        negative=True,
    ),
    Method(
        "WithConstant-MGDA",
        lambda names: WithConstant(MGDA(), last(names)),
        kind="gramian",
        total=with_last,
        negative=True,
    ),
    Method(
        "WithConstant-FAMO",
        lambda names: WithConstant(FAMO(), last(names)),
        kind="observing",
        bounds=positive_before_last,
        total=with_last,
        negative=True,
    ),
    Method(
        "WithConstant-averaged",
        lambda names: WithConstant(MovingAverage(AnalyticQP(every=3)), last(names)),
        kind="gramian-every",
        bounds=lambda names: [-math.inf if name == "c" else -1.0 for name in names],
        total=with_last,
        negative=True,
    ),
    Method(
        "WithConstant-phases",
        lambda names: WithConstant(Sequential([MGDA(), SumLog()], [2]), last(names)),
        kind="gramian-every",
        total=with_last,
        negative=True,
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
    refused(WithConstant, constants={"c": 1.0}, weighting=MGDA),
    refused(WithConstant, constants={"c": 1.0}, weighting=GradDrop()),
    refused(WithConstant, constants={"c": 1.0}, weighting=Sequential([Sum(), MoCo()], [5])),
    refused(WithConstant, weighting=MGDA(), constants=1.0),
    refused(WithConstant, weighting=MGDA(), constants={"c": math.nan}),
    unfit(WithConstant, weighting=MGDA(), constants={"c": 1.0}),
    unfit(WithConstant, weighting=MGDA(), constants={"a": 1.0, "b": 1.0}),
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
    "WithConstant": Facts(
        "what the method inside does, for the losses without a constant",
        "`FixedWeights` for terms that are no objectives",
        total="as the method inside, and the constants",
        units="as the method inside",
        rises="yes",
        cost="as the method inside",
    ),
}
