"""One file per published method; each is a frozen dataclass of hyper-parameters."""

# For methods that are not in the package.
from moo_balance.weighting._adam import adam as adam, init_adam as init_adam
from moo_balance.weighting._random import step_generator as step_generator
from moo_balance.weighting.aligned_mtl import AlignedMTL
from moo_balance.weighting.balanced_rd import AnalyticQP, BalancedTrajectory
from moo_balance.weighting.base import (
    GramianWeighting,
    Needs,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
)
from moo_balance.weighting.db_mtl import DBMTL
from moo_balance.weighting.excess_mtl import ExcessMTL
from moo_balance.weighting.famo import FAMO
from moo_balance.weighting.fixed import FixedWeights, Sum, SumLog
from moo_balance.weighting.grad_drop import GradDrop
from moo_balance.weighting.gradient_norms import GradientNorms
from moo_balance.weighting.gradvac import GradVac
from moo_balance.weighting.mgda import MGDA
from moo_balance.weighting.moco import MoCo
from moo_balance.weighting.moving_average import MovingAverage
from moo_balance.weighting.online_tchebycheff import OnlineTchebycheff
from moo_balance.weighting.pcgrad import PCGrad
from moo_balance.weighting.random_weights import RandomWeights
from moo_balance.weighting.rescaled import Rescaled
from moo_balance.weighting.rows import RowStatistics, RowWeighting
from moo_balance.weighting.sequential import Sequential
from moo_balance.weighting.tchebycheff import SmoothTchebycheff, Tchebycheff
from moo_balance.weighting.trimmed_mean import TrimmedMean

__all__ = [
    "DBMTL",
    "FAMO",
    "MGDA",
    "AlignedMTL",
    "AnalyticQP",
    "BalancedTrajectory",
    "ExcessMTL",
    "FixedWeights",
    "GradDrop",
    "GradVac",
    "GradientNorms",
    "GramianWeighting",
    "MoCo",
    "MovingAverage",
    "Needs",
    "OnlineTchebycheff",
    "PCGrad",
    "RandomWeights",
    "Rescaled",
    "RowStatistics",
    "RowWeighting",
    "Sequential",
    "SmoothTchebycheff",
    "State",
    "Statistics",
    "Sum",
    "SumLog",
    "Tchebycheff",
    "TrimmedMean",
    "Weighting",
    "WeightingOutput",
]
