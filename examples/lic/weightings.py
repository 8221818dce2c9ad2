"""The ways of weighting rate against distortion, by the names of the command line."""

from __future__ import annotations

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedTrajectory,
    FixedWeights,
    MovingAverage,
    OnlineTchebycheff,
    RandomWeights,
    SmoothTchebycheff,
    Sum,
    SumLog,
    Tchebycheff,
)
from moo_balance.weighting import Weighting


def fixed(rate: float) -> FixedWeights:
    """Fixed weights that sum to 1: `rate`, in (0, 1), for the rate, the rest for the distortion."""
    return FixedWeights({"rate": rate, "distortion": 1.0 - rate})


EQUAL = fixed(0.5)
"""R + λD as weights that sum to 1, like the coefficients of the two solutions."""

SOLUTIONS: dict[str, Weighting] = {
    "Solution 1": BalancedTrajectory(),
    "Solution 2": AnalyticQP(),
}
"""The two methods of Balanced R-D (arXiv 2502.20161), with the paper's shift of 1."""

WEIGHTINGS: dict[str, Weighting] = {
    "standard": Sum(),
    "fixed": EQUAL,
    "solution1": BalancedTrajectory(),
    "solution1-lagged": BalancedTrajectory(lagged=True),
    "solution2": AnalyticQP(),
    "solution2-smoothed": MovingAverage(AnalyticQP()),
    "sum-log": SumLog(shift=1.0),
    "random": RandomWeights(),
    "mgda": MGDA(),
    "mgda-l2": MGDA(normalize="l2"),
    "mgda-loss+": MGDA(normalize="loss+"),
    "tchebycheff": Tchebycheff(),
    "smooth-tchebycheff": SmoothTchebycheff(),
    "online-tchebycheff": OnlineTchebycheff(),
    # As published, without a shift in the logarithm: λ drops out of their directions, and nothing
    # keeps log R from falling for ever.
    "famo": FAMO(),
    "log-mgda": MGDA(normalize="log"),
}
"""Of the two losses, or of the losses of several λ (then not those named after one of the two)."""
