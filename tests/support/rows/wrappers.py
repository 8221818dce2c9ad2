"""Rows of the methods that change another method."""

from __future__ import annotations

from moo_balance import FAMO, MGDA, AnalyticQP, FixedWeights, MovingAverage
from tests.support.method import Method, above_minus_one, adversarial, positive, refused

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
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(MovingAverage, weighting="MGDA"),
    refused(MovingAverage, weighting=MGDA(), beta=1.0),
    refused(MovingAverage, weighting=MGDA(), beta="fast"),
]
