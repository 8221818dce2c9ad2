"""The runs that a framework should reproduce to the last bit: plain loops over numbered batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from moo_balance import BalancedOptimizer
from tests.support.problems import Losses, SmallModel, adam, whole_state
from tests.support.registry import METHODS, NAMES, Method

BATCHES = range(6)

over_unobserving = pytest.mark.parametrize(
    "method", [row for row in METHODS if not (row.observes or row.independent)], ids=repr
)


class Model(SmallModel):
    """The small model as frameworks want it: the forward pass of a batch returns its losses."""

    def forward(self, batch: Any) -> Losses:
        return self.losses(int(batch))


def model_and_optimizer(
    method: Method, dtype: torch.dtype = torch.float64
) -> tuple[Model, BalancedOptimizer]:
    model = Model().to(dtype)
    return model, BalancedOptimizer(adam(model), method.make(NAMES))


def loader(batches: Sequence[int] = BATCHES) -> DataLoader[int]:
    return DataLoader(batches, batch_size=None)


def plain_run(method: Method, clip: float = float("inf")) -> Any:
    """The state that a plain loop ends in."""
    model, optimizer = model_and_optimizer(method)
    for batch in BATCHES:
        optimizer.zero_grad()
        optimizer.backward(partial(model, batch))
        if clip < float("inf"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return whole_state(model, optimizer)


def plain_mixed_run(method: Method, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> Any:
    """Likewise, in mixed precision."""
    model, optimizer = model_and_optimizer(method, torch.float32)
    for batch in BATCHES:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, cache_enabled=False):
            optimizer.backward(partial(model, batch), grad_scaler=scaler)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return whole_state(model, optimizer)


def plain_accumulated_run(method: Method, share: float = 1.0) -> Any:
    """Likewise, with two micro-batches in a step, and `share` of the losses of each."""
    model, optimizer = model_and_optimizer(method)

    def losses(batch: int) -> Losses:
        return {name: share * loss for name, loss in model(batch).items()}

    for batch in BATCHES[::2]:
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(partial(losses, batch))
        optimizer.backward(partial(losses, batch + 1))
        optimizer.step()
    return whole_state(model, optimizer)
