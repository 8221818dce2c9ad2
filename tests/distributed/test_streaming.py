"""Streaming on several ranks: rows are averaged segment by segment, the gradient by the wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import MGDA, BalancedOptimizer, BalanceError
from moo_balance.engine import Streaming
from tests.support.distributed import (
    Net,
    Step,
    adam,
    assert_equals_reference,
    by_backward,
    by_combined_loss,
    losses_of,
    share,
    train,
)
from tests.support.engines import CutAt, everywhere
from tests.support.registry import NAMES, over_some

over_gramians = over_some("AnalyticQP", "MGDA-none", "MGDA-every")


@pytest.mark.capability("DistributedDataParallel")
@over_gramians
@pytest.mark.parametrize("step", [by_backward, by_combined_loss], ids=lambda step: step.__name__)
@pytest.mark.parametrize("wrap", [{}, {"find_unused_parameters": True}], ids=["default", "unused"])
def test_ranks_take_the_step_of_one_process(method: Any, step: Step, wrap: dict[str, bool]) -> None:
    model = DDP(Net(), **wrap)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES), engine=CutAt(everywhere))
    train(model, optimizer, step=step)
    assert_equals_reference(model, optimizer, method, torch.float64)


def test_static_graphs_are_refused() -> None:
    """DDP records its hooks in a first backward pass, which segments are not."""
    model = DDP(Net(), static_graph=True)
    optimizer = BalancedOptimizer(adam(model), MGDA(), engine=Streaming())
    with pytest.raises(BalanceError, match="static_graph"):
        optimizer.backward(losses_of(model, share(0)))


def test_cuts_that_differ_are_refused_on_all_ranks() -> None:
    """Rows of a segment are averaged over the ranks, so that all must have the same segments."""
    model = Net()
    optimizer = BalancedOptimizer(adam(model), MGDA(), engine=CutAt(everywhere))
    losses = losses_of(model, share(0))
    if dist.get_rank() == 1:
        losses = {name: model.trunk[0].weight.square().sum() for name in losses}
    with pytest.raises(BalanceError, match="same graph"):
        optimizer.backward(losses)


def test_sharded_parameters_are_refused() -> None:
    model = Net()
    fully_shard(model)
    optimizer = BalancedOptimizer(adam(model), MGDA(), engine=Streaming())
    with pytest.raises(BalanceError, match="sharded"):
        optimizer.backward(losses_of(model, share(0)))
