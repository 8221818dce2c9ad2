"""The second evaluation on two ranks: errors on one of them, and forward passes with a graph."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import FAMO, BalancedOptimizer, BalanceError
from tests.support.distributed import (
    Net,
    Normalized,
    adam,
    assert_same_on_all_ranks,
    losses_of,
    share,
    train,
)
from tests.support.problems import snapshot

WRAPPERS = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def run(wrap, alone=False, hide=None):
    """Parameters and state of the method after four steps."""
    model = wrap(Net())
    group = {"process_group": None} if alone else {}
    optimizer = BalancedOptimizer(adam(model), FAMO(), **group)
    for step in range(4):
        batch = share(step, alone=alone)
        closure = lambda: losses_of(model, batch)  # noqa: B023, E731
        optimizer.step(closure if hide is None else hide(closure))
    parameters = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return [p.detach() for p in parameters], optimizer.state_dict()["balance"]["state"]


class Hidden:
    """A closure whose references are not found."""

    __slots__ = ("closure",)

    def __init__(self, closure):
        self.closure = closure

    def __call__(self):
        return self.closure()


@pytest.mark.parametrize("hide", [None, Hidden], ids=["found", "hidden"])
@pytest.mark.parametrize("options", WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_in_data_parallelism_is_evaluated_again_with_a_graph(options, hide):
    expected = run(lambda net: net, alone=True)
    found = run(lambda net: DDP(net, **options), hide=hide)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_sharded_model_is_evaluated_again_with_a_graph():
    def wrap(net):
        fully_shard(net.trunk)
        return fully_shard(net)

    expected = run(lambda net: net, alone=True)
    torch.testing.assert_close(run(wrap), expected, rtol=1e-12, atol=1e-12)


def test_an_error_on_one_rank_is_raised_on_all_and_blocks_none():
    model = DDP(Net())
    optimizer = BalancedOptimizer(adam(model), FAMO())
    calls = []

    def closure():
        calls.append(None)
        losses = losses_of(model, share(0))
        if len(calls) == 2 and dist.get_rank() == 1:
            raise KeyError("of rank 1")
        return losses

    expected = (KeyError, "of rank 1") if dist.get_rank() == 1 else (BalanceError, "of 2 ranks")
    with pytest.raises(expected[0], match=expected[1]) as caught:
        optimizer.step(closure)
    assert caught.value.__notes__[0].startswith("The step was taken.")
    train(model, optimizer, range(1, 3))
    assert_same_on_all_ranks(snapshot(model.state_dict()), snapshot(optimizer.state_dict()))


def test_buffers_are_broadcast_once_a_step_where_the_model_is_hidden():
    def counts(hide):
        model = DDP(Normalized())
        optimizer = BalancedOptimizer(adam(model), FAMO())
        for step in range(3):
            batch = share(step)
            closure = lambda: losses_of(model, batch)  # noqa: B023, E731
            optimizer.step(hide(closure))
        return snapshot(model.state_dict())

    assert counts(Hidden) == counts(lambda closure: closure)


def test_an_error_in_the_second_evaluation_of_a_window_ends_it_on_all_ranks():
    model = DDP(Normalized())  # broadcasts buffers in each forward pass
    optimizer = BalancedOptimizer(adam(model), FAMO())
    calls = []

    def part(number):
        calls.append(number)
        losses = losses_of(model, share(number))
        if len(calls) == 3 and dist.get_rank() == 1:  # the first of the second evaluations
            raise RuntimeError("out of memory")
        return losses

    with optimizer.accumulate():
        optimizer.backward(lambda: part(0))
    optimizer.backward(lambda: part(1))
    expected = RuntimeError if dist.get_rank() == 1 else BalanceError
    with pytest.raises(expected, match=r"out of memory|evaluate their micro-batches again"):
        optimizer.step()
    train(model, optimizer, range(2, 4))
    assert_same_on_all_ranks(snapshot(list(model.parameters())))
