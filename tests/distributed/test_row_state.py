"""Rows that a method keeps, on two ranks: as one process keeps them, in shards, and saved."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import BalancedOptimizer
from tests.support.distributed import (
    Net,
    adam,
    as_whole,
    assert_equals_reference,
    assert_same_on_all_ranks,
    by_backward,
    by_combined_loss,
    losses_of,
    parameters,
    share,
    train,
)
from tests.support.problems import snapshot
from tests.support.registry import NAMES, over_some

over_keeping = over_some("MoCo", "SeparateMoments")
over_rows = over_some("MoCo-loss", "GradDrop-leak", "SeparateMoments-preference")


def replicated():
    return DDP(Net())


def sharded():
    model = Net()
    fully_shard(model.trunk)
    fully_shard(model)
    return model


over_models = pytest.mark.parametrize("wrap", [replicated, sharded], ids=lambda w: w.__name__)


@over_rows
@over_models
def test_ranks_keep_what_one_process_keeps(method, wrap):
    model = wrap()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, range(5), by_backward)
    train(model, optimizer, range(5, 10), by_combined_loss)
    assert_equals_reference(model, optimizer, method, torch.float64)


def whole_run(model, optimizer):
    return snapshot((parameters(model), as_whole(optimizer.state_dict()["balance"])))


@over_keeping
def test_shards_are_kept_in_shards_and_resumed(method):
    model = sharded()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, range(3), by_backward)
    rows = optimizer.state_dict()["balance"]["rows"]
    assert all(
        isinstance(value, DTensor)
        for by_loss in rows.values()
        for entries in by_loss.values()
        for key, value in entries.items()
        if key != "step"
    )
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 5), by_backward)
    twin = sharded()
    other = BalancedOptimizer(adam(twin), method.make(NAMES))
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(twin, other, range(3, 5), by_backward)
    assert whole_run(twin, other) == whole_run(model, optimizer)


@over_some("MoCo")
@over_models
def test_a_distributed_checkpoint_is_read_into_a_new_optimizer(method, wrap, tmp_path):
    folder = [tmp_path]
    dist.broadcast_object_list(folder)
    model = wrap()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, range(3), by_backward)
    dcp.save({"balance": optimizer.balance_state}, checkpoint_id=folder[0])
    other = BalancedOptimizer(adam(wrap()), method.make(NAMES), loss_names=NAMES)
    dcp.load({"balance": other.balance_state}, checkpoint_id=folder[0])
    own, read = (as_whole(each.state_dict()["balance"]) for each in (optimizer, other))
    assert snapshot(read) == snapshot(own)
    assert_same_on_all_ranks(read)


@over_some("ExcessMTL")
def test_whole_rows_are_read_into_shards_and_shards_into_whole_ones(method):
    model = sharded()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    train(model, optimizer, range(2), by_backward)
    saved = {"state": {}, "balance": optimizer.state_dict()["balance"]}
    for wrap in (replicated, sharded):
        twin = wrap()
        other = BalancedOptimizer(adam(twin), method.make(NAMES))
        groups = other.optimizer.state_dict()["param_groups"]
        other.load_state_dict({**saved, "param_groups": groups})
        saved = {**saved, "balance": other.state_dict()["balance"]}
        assert snapshot(as_whole(saved["balance"]["rows"])) == snapshot(
            as_whole(optimizer.state_dict()["balance"]["rows"])
        )


@over_keeping
@over_models
def test_windows_on_ranks(method, wrap):
    model, twin = wrap(), Net()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    for net, run, whole in ((model, optimizer, False), (twin, alone, True)):
        for step in range(0, 6, 2):
            run.zero_grad()
            with run.accumulate():
                run.backward(losses_of(net, share(step, alone=whole)))
            run.backward(losses_of(net, share(step + 1, alone=whole)))
            run.step()
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-12, atol=1e-12)
    rows = (as_whole(each.state_dict()["balance"].get("rows", {})) for each in (optimizer, alone))
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)
