"""Balance the gradients of several losses, around any ``torch.optim`` optimizer."""

from moo_balance import weighting
from moo_balance._conflict_figures import Figures, LossFigures, PairFigures
from moo_balance._reports import ConflictReport, SuggestedWeights
from moo_balance.diagnosis import diagnose, suggest_weights
from moo_balance.errors import BalanceError, BalanceValueError, ConvergenceError, NonFiniteError
from moo_balance.gradients import balanced_backward, gramian
from moo_balance.monitor import History, StepMetrics
from moo_balance.optimizer import BalancedOptimizer
from moo_balance.weighting import *  # noqa: F403  # the methods, each exported in one place

__version__ = "0.2.0"

__all__ = [
    "BalanceError",
    "BalanceValueError",
    "BalancedOptimizer",
    "ConflictReport",
    "ConvergenceError",
    "Figures",
    "History",
    "LossFigures",
    "NonFiniteError",
    "PairFigures",
    "StepMetrics",
    "SuggestedWeights",
    "balanced_backward",
    "diagnose",
    "gramian",
    "suggest_weights",
]
__all__ += weighting.__all__
