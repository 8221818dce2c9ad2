"""Ranks with different data and a bare model: Gramians are averaged, other methods refuse."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceError
from tests.support.distributed import (
    Net,
    adam,
    assert_equals_reference,
    assert_same_on_all_ranks,
    by_backward,
    by_combined_loss,
    losses_of,
    parameters,
    share,
    train,
)
from tests.support.engines import CutAt, everywhere
from tests.support.problems import whole_state
from tests.support.registry import KINDS, NAMES, over, over_some


@pytest.mark.capability("data parallel without a wrapper")
@over_some("AnalyticQP", "MGDA-log", "MovingAverage-MGDA", "MGDA-every")
@pytest.mark.parametrize("engine", [None, CutAt(everywhere)], ids=["rows", "streaming"])
def test_gradients_are_averaged_without_a_wrapper(method, engine):
    """Also those of steps without a Gramian, and of an engine that keeps no rows."""
    for step in (by_backward, by_combined_loss):
        model = Net()
        optimizer = BalancedOptimizer(adam(model), method.make(NAMES), engine=engine)
        train(model, optimizer, step=step)
        assert_equals_reference(model, optimizer, method, torch.float64)


@pytest.mark.capability("drift over the ranks is found")
@over(lambda method: method in KINDS and not method.gramian)
def test_gradients_that_are_not_averaged_are_found_in_the_first_step(method):
    model = Net()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    with pytest.raises(BalanceError, match=r"Found a parameter on rank 1 .* DistributedDataParall"):
        train(model, optimizer, range(1))


def test_models_that_started_with_other_parameters_are_found():
    model = Net()
    with torch.no_grad():
        model.heads[0].bias += float(dist.get_rank())
    optimizer = BalancedOptimizer(adam(model), MGDA())
    with pytest.raises(BalanceError, match="Found a parameter on rank 1"):
        train(model, optimizer, range(1))


def test_parameters_whose_sum_agrees_are_found():
    """Equal sums are no equal tensors: gradients of a softmax always sum to zero."""
    model = Net()
    with torch.no_grad():
        model.trunk[0].bias[:2] += torch.tensor([1.0, -1.0]) * dist.get_rank()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA())
    with pytest.raises(BalanceError, match="Found a parameter on rank 1"):
        train(model, optimizer, range(1))


def test_a_balance_that_drifted_is_found():
    """The parameters still agree: the step that will make them differ is not taken yet."""
    model = Net()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), FAMO(lagged=True))
    train(model, optimizer, range(1), by_backward)
    saved = optimizer.state_dict()
    saved["balance"]["state"]["logits"] += float(dist.get_rank())
    optimizer.load_state_dict(saved)
    with pytest.raises(BalanceError, match="Found the balance on rank 1"):
        train(model, optimizer, [1], by_backward)


@pytest.mark.parametrize(("every", "found"), [(1, True), (4, True), (5, False), (0, False)])
def test_how_often_ranks_are_compared(every, found):
    """After each of the first three steps, and every so many."""
    model = Net()
    optimizer = BalancedOptimizer(adam(model), MGDA(), check_ranks_every=every)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model.heads[0].bias += float(dist.get_rank())
    if found:
        with pytest.raises(BalanceError, match="rank 1"):
            train(model, optimizer, [3])
    else:
        train(model, optimizer, [3])


class Branching(Net):
    """Uses its second head from a certain step on; before, that loss is the trunk's alone."""

    def losses(self, model, step, batch, reached):
        *outputs, features = model(batch)
        losses = losses_of(lambda batch: outputs, batch)
        if not reached(step):
            losses["b"] = features.square().mean()
        return losses

    def forward(self, batch):
        """All that losses need, so that a wrapper sees what is computed."""
        return [*super().forward(batch), self.trunk(batch[:, :5])]


def branching(reached, steps=6, alone=False, combined=False, wrap=lambda net: net, every=1):
    model = Branching()
    wrapped = wrap(model)
    group = None if alone else "auto"
    optimizer = BalancedOptimizer(adam(model), MGDA(every=every), process_group=group)
    for step in range(steps):
        optimizer.zero_grad()
        losses = model.losses(wrapped, step, share(step, alone=alone), reached)
        if combined:
            optimizer.combined_loss(losses).backward()
        else:
            optimizer.backward(losses)
        optimizer.step()
    return model, optimizer


def unused(model):
    return DDP(model, find_unused_parameters=True)


@pytest.mark.parametrize("wrap", [lambda net: net, unused], ids=["bare", "DDP"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_a_parameter_that_is_reached_on_one_rank_only_and_later(wrap, combined, every):
    """The branch that a rank takes may depend on its data; the average counts it as zero there."""

    def reached(step):
        return step >= 3 and dist.get_rank() == 1

    model, optimizer = branching(reached, combined=combined, wrap=wrap, every=every)
    assert_same_on_all_ranks(whole_state(model, optimizer))

    # The slow obvious twin: both halves of each batch in one process.
    twin = Branching()
    other = BalancedOptimizer(adam(twin), MGDA(every=every), process_group=None)
    for step in range(6):
        first, second = share(step, alone=True).chunk(2)
        halves = [
            twin.losses(twin, step, first, lambda step: False),
            twin.losses(twin, step, second, lambda step: step >= 3),
        ]
        other.zero_grad()
        other.backward({name: (halves[0][name] + halves[1][name]) / 2 for name in NAMES})
        other.step()
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_no_rank_reaches_any_more_gets_no_gradient():
    """No gradient is not a gradient of zero: Adam would go on by its momentum."""
    model, _ = branching(lambda step: step < 3)
    twin, _ = branching(lambda step: step < 3, alone=True)
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-12, atol=1e-12)


def test_parameters_that_are_frozen_and_released_on_the_way():
    """As many as before, but others: what was learned of the graph no longer holds."""

    def run(alone):
        model = Net()
        optimizer = BalancedOptimizer(adam(model), MGDA(), process_group=None if alone else "auto")
        for step in range(6):
            model.heads[0].requires_grad_(step % 2 == 0)
            model.heads[2].requires_grad_(step % 2 == 1)
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, share(step, alone=alone)))
            optimizer.step()
        return model

    torch.testing.assert_close(
        parameters(run(False)), parameters(run(True)), rtol=1e-12, atol=1e-12
    )


def test_parameters_of_several_dtypes():
    """Buckets are made by dtype."""

    def run(alone):
        model = Net()
        model.heads[1].float()
        narrow = model.heads[1].forward
        model.heads[1].forward = lambda features: narrow(features.float()).double()
        optimizer = BalancedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01),
            MGDA(),
            process_group=None if alone else "auto",
        )
        train(model, optimizer, range(5), by_backward, alone)
        return model

    torch.testing.assert_close(parameters(run(False)), parameters(run(True)), rtol=1e-6, atol=1e-6)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = BalancedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), MGDA())
    rows = table(torch.tensor([0, 1]))
    with pytest.raises(BalanceError, match="Sparse gradients cannot be averaged"):
        optimizer.backward({"a": rows.sum(), "b": rows.square().sum()})


def test_metrics_are_the_means_over_the_ranks():
    model = Net()
    optimizer = BalancedOptimizer(adam(model), MGDA())
    optimizer.backward(losses_of(model, share(0)))
    alone = BalancedOptimizer(adam(model), MGDA(), process_group=None)
    alone.backward(losses_of(model, share(0, alone=True)))
    assert_same_on_all_ranks(optimizer.metrics.as_floats())
    assert optimizer.log_dict() == pytest.approx(alone.log_dict(), rel=1e-6)
