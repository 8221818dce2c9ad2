"""The engine that cuts the graph: see ``partition`` for where, ``sweep`` for what follows."""

from moo_balance.engine.streaming.engine import Streaming

__all__ = ["Streaming"]
