"""All engines: add a row, and it has to pass every test of the engine contract."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from math import inf

import pytest
import torch
from torch.autograd.graph import Node

from moo_balance.engine import Engine, Linearization, PerLoss, Problem, Streaming
from moo_balance.engine.cuts import finest, sparing
from moo_balance.engine.portions import Choice, Portion, parted
from moo_balance.engine.streaming import Streamed
from moo_balance.engine.survey import Survey
from tests.support.engine_graphs import GRAPHS


@dataclass(frozen=True)
class Parted(Engine):
    """Streaming with cuts of our own choice, in graphs so small that it would not make any."""

    choose: Choice

    def linearize(self, problem: Problem) -> Linearization:
        return Streamed(problem, torch.float32, self.plan)

    def plan(
        self, problem: Problem, nodes: Collection[Node], columns: Collection[int]
    ) -> list[Portion]:
        return parted(Survey(problem, nodes, columns), self.choose)


def everywhere(survey: Survey) -> list[int]:
    return [cut for cut in range(1, len(survey.order)) if survey.crossing[cut] < inf]


ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "per_loss-float64": PerLoss(dtype=torch.float64),
    "streaming": Streaming(),
    "streaming-float64": Streaming(dtype=torch.float64),
    "streaming-single_nodes": Parted(everywhere),
    "streaming-single_layers": Parted(finest),
    "streaming-sparing": Parted(partial(sparing, allowed=0, slack=0)),
}

over_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))

# Portions of a graph cannot be differentiated where autograd does not see all of it.
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
