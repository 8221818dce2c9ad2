"""The engine that cuts the graph: ``partition`` chooses where, ``engine`` does the rest."""

from moo_balance.engine.streaming.engine import Streaming

__all__ = ["Streaming"]
