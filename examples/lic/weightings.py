"""The ways of weighting rate against distortion, by the names that the command line knows."""

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
    """Fixed weights that sum to 1: `rate` for the rate, the rest for the distortion."""
    return FixedWeights({"rate": rate, "distortion": 1.0 - rate})


WEIGHTINGS: dict[str, Weighting] = {
    "standard": Sum(),
    "fixed": fixed(0.5),
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
"""Those of the paper carry its shift of 1 in the logarithms; see the README on what it is for."""
