"""How per-loss gradients are taken from autograd."""

from moo_balance.engine.base import (
    Engine as Engine,
    Linearization as Linearization,
    Problem as Problem,
    Window as Window,
)
from moo_balance.engine.per_loss import PerLoss as PerLoss
from moo_balance.engine.streaming import Streaming as Streaming

__all__ = ["Engine", "Linearization", "PerLoss", "Problem", "Streaming", "Window"]
