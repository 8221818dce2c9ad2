"""How per-loss gradients are taken from autograd."""

from typing import TYPE_CHECKING

from moo_balance._lazy import lazily

if TYPE_CHECKING:
    from moo_balance.engine.base import (
        Engine as Engine,
        Linearization as Linearization,
        Problem as Problem,
        Window as Window,
        side_by_side as side_by_side,
    )
    from moo_balance.engine.parallel import (
        DataParallel as DataParallel,
        Moment as Moment,
        in_static_graph as in_static_graph,
    )
    from moo_balance.engine.per_loss import PerLoss as PerLoss
    from moo_balance.engine.sharded import is_whole as is_whole
    from moo_balance.engine.streaming import Streaming as Streaming

_HOMES = {
    "DataParallel": "parallel",
    "Engine": "base",
    "Linearization": "base",
    "Moment": "parallel",
    "PerLoss": "per_loss",
    "Problem": "base",
    "Streaming": "streaming",
    "Window": "base",
    "in_static_graph": "parallel",
    "is_whole": "sharded",
    "side_by_side": "base",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:  # which is to tell of names that are not there
    __getattr__, __dir__ = lazily(__name__, _HOMES)
