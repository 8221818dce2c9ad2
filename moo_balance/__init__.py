"""Balance the gradients of several losses, around any ``torch.optim`` optimizer."""

from moo_balance.errors import BalanceError, BalanceValueError, ConvergenceError, NonFiniteError
from moo_balance.monitor import Balance, History
from moo_balance.optimizer import BalancedOptimizer
from moo_balance.weighting import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedTrajectory,
    FixedWeights,
    OnlineTchebycheff,
    RandomWeights,
    Smoothed,
    SmoothTchebycheff,
    Sum,
    SumLog,
    Tchebycheff,
)

__version__ = "0.1.0"

__all__ = [
    "FAMO",
    "MGDA",
    "AnalyticQP",
    "Balance",
    "BalanceError",
    "BalanceValueError",
    "BalancedOptimizer",
    "BalancedTrajectory",
    "ConvergenceError",
    "FixedWeights",
    "History",
    "NonFiniteError",
    "OnlineTchebycheff",
    "RandomWeights",
    "SmoothTchebycheff",
    "Smoothed",
    "Sum",
    "SumLog",
    "Tchebycheff",
]
