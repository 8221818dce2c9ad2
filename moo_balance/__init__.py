"""Balance the gradients of several losses, around any ``torch.optim`` optimizer."""

from typing import TYPE_CHECKING

from moo_balance._lazy import lazily

if TYPE_CHECKING:
    from moo_balance.errors import (
        BalanceError as BalanceError,
        BalanceValueError as BalanceValueError,
        ConvergenceError as ConvergenceError,
        NonFiniteError as NonFiniteError,
    )
    from moo_balance.monitor import History as History, StepMetrics as StepMetrics
    from moo_balance.optimizer import BalancedOptimizer as BalancedOptimizer
    from moo_balance.weighting import (
        FAMO as FAMO,
        MGDA as MGDA,
        AnalyticQP as AnalyticQP,
        BalancedTrajectory as BalancedTrajectory,
        FixedWeights as FixedWeights,
        MovingAverage as MovingAverage,
        OnlineTchebycheff as OnlineTchebycheff,
        RandomWeights as RandomWeights,
        SmoothTchebycheff as SmoothTchebycheff,
        Sum as Sum,
        SumLog as SumLog,
        Tchebycheff as Tchebycheff,
    )

__version__ = "0.2.0"

_HOMES = {
    "FAMO": "weighting",
    "MGDA": "weighting",
    "AnalyticQP": "weighting",
    "StepMetrics": "monitor",
    "BalanceError": "errors",
    "BalanceValueError": "errors",
    "BalancedOptimizer": "optimizer",
    "BalancedTrajectory": "weighting",
    "ConvergenceError": "errors",
    "FixedWeights": "weighting",
    "History": "monitor",
    "NonFiniteError": "errors",
    "OnlineTchebycheff": "weighting",
    "RandomWeights": "weighting",
    "SmoothTchebycheff": "weighting",
    "MovingAverage": "weighting",
    "Sum": "weighting",
    "SumLog": "weighting",
    "Tchebycheff": "weighting",
}

__all__ = list(_HOMES)

_MODULES = (
    "engine",
    "errors",
    "functional",
    "integrations",
    "monitor",
    "optimizer",
    "weighting",
)

if not TYPE_CHECKING:  # which is to tell of names that are not there
    __getattr__, __dir__ = lazily(__name__, _HOMES, _MODULES)
