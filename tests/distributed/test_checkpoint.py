"""``torch.distributed.checkpoint``: saved by two ranks, read by one, and back, to the last bit."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceValueError
from tests.support.distributed import (
    Net,
    adam,
    as_whole,
    assert_same_on_all_ranks,
    by_backward,
    train,
)
from tests.support.problems import snapshot
from tests.support.rank_plugin import begin, own_rank
from tests.support.registry import NAMES, over_kinds, over_some

pytestmark = pytest.mark.capability("distributed checkpoints, any number of ranks")

BEFORE, AFTER = range(3), range(3, 6)


def join(name, alone=False):
    """Leave this process group for another."""
    dist.destroy_process_group()
    begin(name, alone)


def sharded(method):
    model = Net()
    fully_shard(model)
    return model, BalancedOptimizer(adam(model), method.make(NAMES))


def replicated(method):
    model = DDP(Net())
    return model, BalancedOptimizer(adam(model), method.make(NAMES))


def parts(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "balance": optimizer.balance_state,
    }


def save(model, optimizer, folder):
    dcp.save(parts(model, optimizer), checkpoint_id=folder)


def load(model, optimizer, folder):
    loaded = parts(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])


def state_of(model, optimizer):
    state = parts(model, optimizer)
    return snapshot(as_whole({**state, "balance": optimizer.state_dict()["balance"]}))


def folders(tmp_path):
    """The same for both ranks."""
    shared = [tmp_path]
    dist.broadcast_object_list(shared)
    return shared[0] / "two", shared[0] / "one"


@over_some("RandomWeights", "FAMO-adam", "MGDA-every")
@pytest.mark.parametrize("make", [sharded, replicated], ids=lambda make: make.__name__)
def test_two_ranks_save_for_one_and_one_saves_for_two(method, make, tmp_path, request):
    two, one = folders(tmp_path)
    model, optimizer = make(method)
    train(model, optimizer, BEFORE)
    save(model, optimizer, two)
    saved = state_of(model, optimizer)
    assert_same_on_all_ranks(saved)
    train(model, optimizer, AFTER)
    end = state_of(model, optimizer)

    model, optimizer = make(method)
    load(model, optimizer, two)
    assert state_of(model, optimizer) == saved
    train(model, optimizer, AFTER)
    assert state_of(model, optimizer) == end

    join(request.node.nodeid + " alone", alone=True)
    model, optimizer = make(method)
    load(model, optimizer, two)
    assert state_of(model, optimizer) == saved
    save(model, optimizer, one / str(own_rank()))
    train(model, optimizer, AFTER)  # it can go on alone, too

    join(request.node.nodeid + " again")
    model, optimizer = make(method)
    load(model, optimizer, one / "0")
    assert state_of(model, optimizer) == saved
    train(model, optimizer, AFTER)
    assert state_of(model, optimizer) == end


@over_kinds
def test_the_balance_is_saved_and_loaded_by_itself(method):
    """As a state dict of its own, for shards that are saved by other means."""
    model, optimizer = replicated(method)
    train(model, optimizer, BEFORE)
    saved = optimizer.balance_state.state_dict()
    assert_same_on_all_ranks(saved)
    other = replicated(method)[1]
    other.balance_state.load_state_dict(saved)
    assert snapshot(other.state_dict()["balance"]) == snapshot(optimizer.state_dict()["balance"])


def test_a_balance_of_another_method_is_refused():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO(lagged=True))
    train(model, optimizer, BEFORE, by_backward)
    other = BalancedOptimizer(adam(model), MGDA())
    with pytest.raises(BalanceValueError, match=r"should come from MGDA\. Found FAMO"):
        other.balance_state.load_state_dict(optimizer.balance_state.state_dict())


def test_reading_into_a_fresh_optimizer_changes_no_parameter():
    """``get_optimizer_state_dict`` creates a state by a step with learning rate zero."""
    model = Net()
    fully_shard(model)
    optimizer = BalancedOptimizer(adam(model), FAMO())
    before = snapshot([p.full_tensor() for p in model.parameters()])
    get_optimizer_state_dict(model, optimizer)
    assert snapshot([p.full_tensor() for p in model.parameters()]) == before
    assert optimizer.state_dict()["balance"]["steps"] == 0
