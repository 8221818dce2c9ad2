"""GradScaler and autocast on ranks: the scale changes nothing, all ranks skip an overflow."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import BalancedOptimizer
from tests.support.distributed import (
    STEPS,
    Net,
    adam,
    assert_equals_reference,
    assert_same_on_all_ranks,
    losses_of,
    parameters,
    share,
)
from tests.support.problems import snapshot
from tests.support.registry import NAMES, over_some

over_some_kinds = over_some("SumLog", "FAMO-adam", "AnalyticQP")


def replicated(dtype=torch.float64):
    return DDP(Net(dtype))


def sharded(dtype=torch.float64):
    model = Net(dtype)
    fully_shard(model)
    return model


over_wrappers = pytest.mark.parametrize(
    "make", [replicated, sharded], ids=lambda make: make.__name__
)


def scaled_step(optimizer, scaler, losses):
    optimizer.zero_grad()
    optimizer.backward(losses, grad_scaler=scaler)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e9)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.capability("GradScaler under DDP")
@over_some_kinds
def test_a_scale_changes_nothing_in_data_parallel(method):
    check_scale(replicated(), method)


@pytest.mark.capability("GradScaler under FSDP2")
@over_some_kinds
def test_a_scale_changes_nothing_in_shards(method):
    check_scale(sharded(), method)


def check_scale(model, method):
    """It grows on the way, as scales do."""
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
    for step in range(STEPS):
        batch = share(step)
        scaled_step(optimizer, scaler, lambda: losses_of(model, batch))  # noqa: B023
    assert scaler.get_scale() == 2.0 ** (12 + STEPS // 5)
    assert_equals_reference(model, optimizer, method, torch.float64)


@over_some("FAMO-adam", "MGDA-none")
@over_wrappers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(method, make, dtype):
    model = make(torch.float32)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    scaler = GradScaler("cpu", init_scale=2.0**4)

    def losses(batch):
        with torch.autocast("cpu", dtype=dtype):
            return losses_of(model, batch)

    first = None
    for step in range(12):
        batch = share(step % 2, torch.float32)
        scaled_step(optimizer, scaler, lambda: losses(batch))  # noqa: B023
        first = first or optimizer.metrics.as_floats()
    last = optimizer.metrics.as_floats()
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict()["balance"])
    assert any(last[key] < first[key] for key in first if key.startswith("loss/"))


@over_some_kinds
@over_wrappers
def test_an_overflow_on_one_rank_is_skipped_by_all(method, make):
    model = make()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    scaler = GradScaler("cpu", init_scale=2.0**12)

    def losses(batch, overflow):
        losses = losses_of(model, batch)
        if overflow and dist.get_rank() == 1:
            # Finite, with a gradient that is not.
            losses["b"] = losses["b"] + (losses["b"] * 0.0).sqrt()
        return losses

    for step in range(6):
        before = snapshot([parameters(model), optimizer.state_dict()["balance"]])
        scaled_step(optimizer, scaler, lambda: losses(share(step), step == 3))  # noqa: B023
        same = snapshot([parameters(model), optimizer.state_dict()["balance"]]) == before
        assert same == (step == 3)
    assert scaler.get_scale() == 2.0**11
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict()["balance"])
