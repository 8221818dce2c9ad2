"""Windows of micro-batches on several ranks: one step as one process takes on all of it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import BalancedOptimizer, BalanceError, NonFiniteError
from tests.support.distributed import (
    Net,
    adam,
    assert_same_on_all_ranks,
    losses_of,
    parameters,
    share,
    train,
)
from tests.support.problems import snapshot
from tests.support.registry import NAMES, over_kinds, over_some

MICRO, STEPS = 2, 3


def micro_step(model, optimizer, step, without_sync=nullcontext):
    """The rank's share of a batch, in halves; each loss is a mean, so each counts for half."""
    *first, last = share(step).chunk(MICRO)

    def half(batch):
        return lambda: {name: loss / MICRO for name, loss in losses_of(model, batch).items()}

    optimizer.zero_grad()
    for batch in first:
        with without_sync(), optimizer.accumulate():
            optimizer.backward(half(batch))
    optimizer.backward(half(last))
    optimizer.step()


def check(model, method, without_sync=nullcontext):
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    for step in range(STEPS):
        micro_step(model, optimizer, step, without_sync)
    twin = Net()
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    train(twin, alone, range(STEPS), alone=True)
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict()["balance"])
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-12, atol=1e-12)


@pytest.mark.capability("gradient accumulation under DDP")
@over_kinds
def test_windows_in_data_parallel(method):
    check(DDP(Net()), method)


@pytest.mark.capability("gradient accumulation under DDP")
@over_kinds
def test_windows_without_synchronization_until_they_close(method):
    """``no_sync`` saves the all-reduces of all micro-batches except the last."""
    model = DDP(Net())
    check(model, method, model.no_sync)


@over_some("Sum", "MGDA-none", "SumLog", "MGDA-every")
def test_windows_in_a_static_graph(method):
    """Refused where gradients of a window are taken in another way than in a step without one."""
    model = DDP(Net(), static_graph=True)
    if method.id != "SumLog":
        check(model, method)
    else:
        optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
        with pytest.raises(BalanceError, match="`static_graph=True` together with `accumulate`"):
            micro_step(model, optimizer, 0)


@pytest.mark.capability("gradient accumulation under FSDP2")
@over_kinds
def test_windows_in_shards(method):
    model = Net()
    fully_shard(model)
    check(model, method)


@over_some("SumLog", "MGDA-none")
def test_a_window_that_one_rank_closes_early_is_refused(method):
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, share(0)))
    window = nullcontext() if dist.get_rank() else optimizer.accumulate()
    with window, pytest.raises(BalanceError, match="same point of the same run"):
        optimizer.backward(losses_of(model, share(1)))


@over_some("SumLog", "MGDA-none")
def test_a_nan_within_a_window_on_one_rank_is_refused_on_all(method):
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    micro_step(model, optimizer, 0)
    before = snapshot(optimizer.state_dict())
    bad = losses_of(model, share(1))
    bad["b"] = bad["b"] * (float("nan") if dist.get_rank() else 1.0)
    optimizer.zero_grad()
    with optimizer.accumulate(), pytest.raises(NonFiniteError, match="Loss `b`"):
        optimizer.backward(bad)
    assert snapshot(optimizer.state_dict()) == before
    micro_step(model, optimizer, 1)
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict())
