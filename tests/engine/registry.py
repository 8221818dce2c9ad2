"""All engines: add a row, and it has to pass every test of this folder."""

from __future__ import annotations

import pytest
import torch

from moo_balance.engine import Engine, PerLoss

ENGINES: dict[str, Engine] = {
    "per_loss": PerLoss(),
    "per_loss-float64": PerLoss(dtype=torch.float64),
}

over_engines = pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))
