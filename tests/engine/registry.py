"""All engines: add a row, and it has to pass every test of this folder."""

from __future__ import annotations

import pytest
import torch

from moo_balance.engine import Engine, PerLoss, Streaming
from tests.engine.graphs import GRAPHS

ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "per_loss-float64": PerLoss(dtype=torch.float64),
    "streaming": Streaming(),
    "streaming-single_layers": Streaming(memory=1e-9),
    "streaming-one_portion": Streaming(memory=1e9, dtype=torch.float64),
}

over_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))

# Portions of a graph cannot be differentiated where autograd does not see all of it.
_REFUSED = {("Streaming", "checkpointed_reentrant")}

PAIRS = {
    f"{graph}-{name}": (engine, build)
    for name, engine in ENGINES.items()
    for graph, build in GRAPHS.items()
    if (type(engine).__name__, graph) not in _REFUSED
}

over_engines_and_graphs = pytest.mark.parametrize(
    ("engine", "build"), list(PAIRS.values()), ids=list(PAIRS)
)
