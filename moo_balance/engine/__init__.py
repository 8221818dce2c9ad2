"""How per-loss gradients are taken from autograd."""

from moo_balance.engine.base import Engine, Linearization, Problem
from moo_balance.engine.per_loss import PerLoss

__all__ = ["Engine", "Linearization", "PerLoss", "Problem"]
