"""Processes that have imported PyTorch, and done nothing else."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fresh_context() -> ForkServerContext:
    """A context whose processes are forks of a server that has only imported modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.speed.step_cost"])
    return context
