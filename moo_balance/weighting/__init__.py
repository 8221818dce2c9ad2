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
from moo_balance.weighting.cagrad import CAGrad
from moo_balance.weighting.cosmos import COSMOS
from moo_balance.weighting.db_mtl import DBMTL
from moo_balance.weighting.dual_cone import DualProj, UPGrad
from moo_balance.weighting.dwa import DWA
from moo_balance.weighting.equal_projections import IMTLG, ConFIG
from moo_balance.weighting.excess_mtl import ExcessMTL
from moo_balance.weighting.fair import FairGrad, NashMTL
from moo_balance.weighting.famo import FAMO
from moo_balance.weighting.fixed import FixedWeights, Sum, SumLog
from moo_balance.weighting.geometric_mean import GeometricMean
from moo_balance.weighting.grad_drop import GradDrop
from moo_balance.weighting.grad_norm import GradNorm
from moo_balance.weighting.gradient_norms import GradientNorms
from moo_balance.weighting.gradvac import GradVac
from moo_balance.weighting.imtl_l import IMTLL
from moo_balance.weighting.lagrangian import Lagrangian
from moo_balance.weighting.learning_rate_annealing import LearningRateAnnealing
from moo_balance.weighting.mgda import MGDA
from moo_balance.weighting.moco import MoCo
from moo_balance.weighting.modo import MoDo
from moo_balance.weighting.moving_average import MovingAverage
from moo_balance.weighting.online_tchebycheff import OnlineTchebycheff
from moo_balance.weighting.pbi import PBI
from moo_balance.weighting.pcd import PCD
from moo_balance.weighting.pcgrad import PCGrad
from moo_balance.weighting.random_weights import RandomWeights
from moo_balance.weighting.relobralo import ReLoBRaLo
from moo_balance.weighting.rescaled import Rescaled
from moo_balance.weighting.rows import RowStatistics, RowWeighting
from moo_balance.weighting.sdmgrad import SDMGrad
from moo_balance.weighting.separate_moments import SeparateMoments
from moo_balance.weighting.sequential import Sequential
from moo_balance.weighting.softadapt import SoftAdapt
from moo_balance.weighting.tchebycheff import SmoothTchebycheff, Tchebycheff
from moo_balance.weighting.trimmed_mean import TrimmedMean
from moo_balance.weighting.uncertainty import UncertaintyWeighting
from moo_balance.weighting.with_constant import WithConstant

__all__ = [
    "COSMOS",
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PBI",
    "PCD",
    "AlignedMTL",
    "AnalyticQP",
    "BalancedTrajectory",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "FixedWeights",
    "GeometricMean",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientNorms",
    "GramianWeighting",
    "Lagrangian",
    "LearningRateAnnealing",
    "MoCo",
    "MoDo",
    "MovingAverage",
    "NashMTL",
    "Needs",
    "OnlineTchebycheff",
    "PCGrad",
    "RandomWeights",
    "ReLoBRaLo",
    "Rescaled",
    "RowStatistics",
    "RowWeighting",
    "SDMGrad",
    "SeparateMoments",
    "Sequential",
    "SmoothTchebycheff",
    "SoftAdapt",
    "State",
    "Statistics",
    "Sum",
    "SumLog",
    "Tchebycheff",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
    "Weighting",
    "WeightingOutput",
    "WithConstant",
]
