"""How per-loss gradients are taken from autograd."""

from moo_balance.engine.base import Engine, Linearization, Problem, Window, side_by_side
from moo_balance.engine.parallel import DataParallel, Moment, in_static_graph
from moo_balance.engine.per_loss import PerLoss
from moo_balance.engine.sharded import is_whole
from moo_balance.engine.streaming import Streaming

__all__ = [
    "DataParallel",
    "Engine",
    "Linearization",
    "Moment",
    "PerLoss",
    "Problem",
    "Streaming",
    "Window",
    "in_static_graph",
    "is_whole",
    "side_by_side",
]
