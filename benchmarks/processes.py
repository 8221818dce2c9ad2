"""Processes that have imported PyTorch, and done nothing else."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fresh() -> ForkServerContext:
    """Where to get them: each is a fork of a server that did no more than import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_cost"])
    return context
