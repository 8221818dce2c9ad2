"""All engines: add a row, and it has to pass every test of the engine contract."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch.autograd.graph import Node

from moo_balance.engine import Engine, Linearization, PerLoss, Problem, Streaming
from moo_balance.engine.streaming.engine import StreamingLinearization
from moo_balance.engine.streaming.partition import (
    GraphCosts,
    Segment,
    build_segments,
    choose_cuts,
)
from tests.support.engine_graphs import GRAPHS


@dataclass(frozen=True)
class CutAt(Engine):
    """Streaming with cuts of our own choice, in graphs so small that it would not make any."""

    choose: Callable[[GraphCosts], Sequence[int]]

    def linearize(self, problem: Problem) -> Linearization:
        return StreamingLinearization(problem, torch.float32, self.split)

    def split(self, problem: Problem, nodes: Collection[Node]) -> list[Segment]:
        costs = GraphCosts(problem, nodes)
        return build_segments(costs, self.choose(costs))


def everywhere(costs: GraphCosts) -> list[int]:
    """All cuts that are possible."""
    cuts = range(1, len(costs.order))
    return [cut for cut in cuts if costs.cut_size[cut] < inf and not costs.has_hook_at(cut)]


def in_little_memory(costs: GraphCosts) -> list[int]:
    """The cuts of a budget that no segment fits into."""
    return choose_cuts(costs, budget=0)


ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "per_loss-float64": PerLoss(dtype=torch.float64),
    "streaming": Streaming(),
    "streaming-float64": Streaming(dtype=torch.float64),
    "streaming-everywhere": CutAt(everywhere),
    "streaming-in_little_memory": CutAt(in_little_memory),
}

over_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))
over_engines_and_dtypes = pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        pytest.param(x, torch.float64 if name.endswith("float64") else torch.float32, id=name)
        for name, x in ENGINES.items()
    ],
)

# Segments of a graph cannot be differentiated where autograd does not see all of it.
REFUSED_BY_STREAMING = {"checkpointed_reentrant"}

# Every graph is in float64 already, so that an engine with a Gramian in float64 does nothing else.
PAIRS = {
    f"{graph}-{name}": (engine, build)
    for name, engine in ENGINES.items()
    for graph, build in GRAPHS.items()
    if not name.endswith("float64")
    and (isinstance(engine, PerLoss) or graph not in REFUSED_BY_STREAMING)
}

over_engines_and_graphs = pytest.mark.parametrize(
    ("engine", "build"), list(PAIRS.values()), ids=list(PAIRS)
)

# Without a Gramian all engines take the same ordinary pass of the weighted sum.
CASES = {f"{name}-gramian": (*pair, True) for name, pair in PAIRS.items()} | {
    f"{name}-losses_only": (PerLoss(), build, False) for name, build in GRAPHS.items()
}

over_engines_graphs_and_gramians = pytest.mark.parametrize(
    ("engine", "build", "with_gramian"),
    list(CASES.values()),
    ids=list(CASES),
)
