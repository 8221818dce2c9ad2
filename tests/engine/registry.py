"""All engines: add a row, and it has to pass every test of this folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch.autograd.graph import Node

from moo_balance.engine import Engine, Linearization, PerLoss, Problem, Streaming
from moo_balance.engine.streaming.costs import GraphCosts
from moo_balance.engine.streaming.engine import StreamingLinearization
from moo_balance.engine.streaming.partition import (
    Segment,
    build_segments,
    choose_cuts,
    partition,
)
from tests.engine.graphs import GRAPHS


@dataclass(frozen=True)
class CutAt(Engine):
    """Streaming with cuts of our own choice, in graphs so small that it would not make any."""

    choose: Callable[[GraphCosts], Sequence[int]]

    def linearize(self, problem: Problem) -> Linearization:
        return StreamingLinearization(problem, torch.float32, self.split)

    def split(
        self, problem: Problem, nodes: Collection[Node], compared: Collection[int]
    ) -> list[Segment]:
        costs = GraphCosts(problem, nodes, compared)
        cuts = self.choose(costs)
        return build_segments(costs, cuts) if cuts else partition(problem, nodes, compared, inf)


def everywhere(costs: GraphCosts) -> list[int]:
    """All cuts that are possible."""
    cuts = range(1, len(costs.order))
    return [cut for cut in cuts if costs.cut_size[cut] < inf and not costs.meets_hooks(cut)]


def in_little_memory(costs: GraphCosts) -> list[int]:
    """The cuts of a budget that no segment fits into."""
    return choose_cuts(costs, budget=0, slack=0)


ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "per_loss-float64": PerLoss(dtype=torch.float64),
    "streaming": Streaming(),
    "streaming-float64": Streaming(dtype=torch.float64),
    "streaming-everywhere": CutAt(everywhere),
    "streaming-in_little_memory": CutAt(in_little_memory),
}

over_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))

# Segments of a graph cannot be differentiated where autograd does not see all of it.
REFUSED_BY_STREAMING = {"checkpointed_reentrant"}

PAIRS = {
    f"{graph}-{name}": (engine, build)
    for name, engine in ENGINES.items()
    for graph, build in GRAPHS.items()
    if isinstance(engine, PerLoss) or graph not in REFUSED_BY_STREAMING
}

over_engines_and_graphs = pytest.mark.parametrize(
    ("engine", "build"), list(PAIRS.values()), ids=list(PAIRS)
)
