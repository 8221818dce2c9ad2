"""Hooks of parameters on several ranks: they see the balanced average, once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import MGDA, BalancedOptimizer, BalanceError, Sum
from tests.support.distributed import (
    Net,
    adam,
    assert_same_on_all_ranks,
    losses_of,
    parameters,
    share,
)
from tests.support.engines import CutAt, everywhere


def by_backward(optimizer, losses):
    optimizer.backward(losses())


def by_combined_loss(optimizer, losses):
    optimizer.combined_loss(losses()).backward()


def by_window(optimizer, losses):
    with optimizer.accumulate():
        optimizer.backward({name: loss / 2 for name, loss in losses().items()})
    optimizer.backward({name: loss / 2 for name, loss in losses().items()})


FORMS = {
    "backward": (by_backward, 1, None),
    "combined": (by_combined_loss, 1, None),
    "window": (by_window, 1, None),
    "between": (by_backward, 2, None),
    "between, combined": (by_combined_loss, 2, None),
    "streaming": (by_backward, 1, CutAt(everywhere)),
}


def train(model, form, alone=False, steps=4):
    run, every, engine = form
    group = None if alone else "auto"
    optimizer = BalancedOptimizer(
        adam(model), MGDA(every=every), engine=engine, process_group=group
    )
    for step in range(steps):
        batch = share(step, alone=alone)
        optimizer.zero_grad()
        run(optimizer, lambda: losses_of(model, batch))  # noqa: B023
        optimizer.step()
    return parameters(model)


def clamp(gradient):
    return gradient.clamp(-0.05, 0.05)


@pytest.mark.parametrize("wrap", [lambda net: net, DDP], ids=["bare", "DDP"])
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_hooks_see_the_average(form, wrap):
    """A clamp of the average is not the average of clamps."""
    net, alone, seen = Net(), Net(), []
    for model in (net, alone):
        for param in model.parameters():
            param.register_hook(clamp)
    for k, param in enumerate(net.parameters()):
        param.register_post_accumulate_grad_hook(lambda param, k=k: seen.append(k))
    found = train(wrap(net), form)
    torch.testing.assert_close(found, train(alone, form, alone=True), rtol=1e-9, atol=1e-12)
    assert sorted(seen) == sorted(4 * list(range(len(found))))


@pytest.mark.parametrize(
    "form", [FORMS[name] for name in ("backward", "combined", "window", "between")]
)
def test_hooks_of_sharded_parameters_run_once(form):
    net, seen = Net(), []
    fully_shard(net)
    for k, param in enumerate(net.parameters()):
        param.register_post_accumulate_grad_hook(lambda param, k=k: seen.append(k))
    found = train(net, form)
    torch.testing.assert_close(found, train(Net(), form, alone=True), rtol=1e-9, atol=1e-12)
    assert sorted(seen) == sorted(4 * list(range(len(found))))


@pytest.mark.parametrize("rank", [None, 1])
def test_hooks_of_nodes_are_refused_on_all_ranks(rank):
    net = Net()
    node = get_gradient_edge(net.trunk[0].weight).node
    if rank in (None, torch.distributed.get_rank()):
        node.register_hook(lambda *gradients: None)
    with pytest.raises(BalanceError, match=r"AccumulateGrad nodes|1 of 2|Rank 1 refused"):
        train(net, FORMS["backward"], steps=1)
    assert all(param.grad is None for param in net.parameters())


def test_a_hook_on_one_rank_only_does_not_separate_the_ranks():
    """A window of a method that knows its coefficients keeps no rows there."""
    model = DDP(Net())
    if dist.get_rank() == 1:
        model.module.trunk[0].weight.register_post_accumulate_grad_hook(lambda param: None)
    optimizer = BalancedOptimizer(adam(model), Sum())
    for step in range(2):
        batch = share(step)
        optimizer.zero_grad()
        by_window(optimizer, lambda: losses_of(model, batch))  # noqa: B023
        optimizer.step()
    assert_same_on_all_ranks(parameters(model))
