"""One file per published method; each is a frozen dataclass of hyper-parameters."""

# For methods that are not in the package.
from moo_balance.weighting._adam import adam as adam, init_adam as init_adam
from moo_balance.weighting._random import step_generator as step_generator
from moo_balance.weighting.balanced_rd import AnalyticQP, BalancedTrajectory
from moo_balance.weighting.base import (
    GramianWeighting,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
)
from moo_balance.weighting.cosmos import COSMOS
from moo_balance.weighting.dwa import DWA
from moo_balance.weighting.famo import FAMO
from moo_balance.weighting.fixed import FixedWeights, Sum, SumLog
from moo_balance.weighting.geometric_mean import GeometricMean
from moo_balance.weighting.imtl_l import IMTLL
from moo_balance.weighting.lagrangian import Lagrangian
from moo_balance.weighting.mgda import MGDA
from moo_balance.weighting.moving_average import MovingAverage
from moo_balance.weighting.online_tchebycheff import OnlineTchebycheff
from moo_balance.weighting.pbi import PBI
from moo_balance.weighting.random_weights import RandomWeights
from moo_balance.weighting.relobralo import ReLoBRaLo
from moo_balance.weighting.softadapt import SoftAdapt
from moo_balance.weighting.tchebycheff import SmoothTchebycheff, Tchebycheff
from moo_balance.weighting.uncertainty import UncertaintyWeighting

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "MGDA",
    "PBI",
    "AnalyticQP",
    "BalancedTrajectory",
    "FixedWeights",
    "GeometricMean",
    "GramianWeighting",
    "Lagrangian",
    "MovingAverage",
    "OnlineTchebycheff",
    "RandomWeights",
    "ReLoBRaLo",
    "SmoothTchebycheff",
    "SoftAdapt",
    "State",
    "Statistics",
    "Sum",
    "SumLog",
    "Tchebycheff",
    "UncertaintyWeighting",
    "Weighting",
    "WeightingOutput",
]
