"""One file per published method; each a frozen dataclass of hyper-parameters."""

from typing import TYPE_CHECKING

from moo_balance._lazy import lazily

if TYPE_CHECKING:
    from moo_balance.weighting.balanced_rd import (
        AnalyticQP as AnalyticQP,
        BalancedTrajectory as BalancedTrajectory,
    )
    from moo_balance.weighting.base import (
        GramianWeighting as GramianWeighting,
        State as State,
        Statistics as Statistics,
        Weighting as Weighting,
        WeightingOutput as WeightingOutput,
    )
    from moo_balance.weighting.famo import FAMO as FAMO
    from moo_balance.weighting.fixed import (
        FixedWeights as FixedWeights,
        Sum as Sum,
        SumLog as SumLog,
    )
    from moo_balance.weighting.mgda import MGDA as MGDA
    from moo_balance.weighting.moving_average import MovingAverage as MovingAverage
    from moo_balance.weighting.random_weights import RandomWeights as RandomWeights
    from moo_balance.weighting.tchebycheff import (
        OnlineTchebycheff as OnlineTchebycheff,
        SmoothTchebycheff as SmoothTchebycheff,
        Tchebycheff as Tchebycheff,
    )

_HOMES = {
    "FAMO": "famo",
    "MGDA": "mgda",
    "AnalyticQP": "balanced_rd",
    "BalancedTrajectory": "balanced_rd",
    "FixedWeights": "fixed",
    "GramianWeighting": "base",
    "OnlineTchebycheff": "tchebycheff",
    "RandomWeights": "random_weights",
    "SmoothTchebycheff": "tchebycheff",
    "MovingAverage": "moving_average",
    "State": "base",
    "Statistics": "base",
    "Sum": "fixed",
    "SumLog": "fixed",
    "Tchebycheff": "tchebycheff",
    "WeightingOutput": "base",
    "Weighting": "base",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:  # which is to tell of names that are not there
    __getattr__, __dir__ = lazily(__name__, _HOMES)
