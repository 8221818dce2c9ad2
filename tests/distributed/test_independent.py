"""The Gramian of expected gradients where each rank has a batch of its own, or a window of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import MGDA, BalancedOptimizer, BalanceError
from moo_balance.engine import PerLoss
from tests.support.distributed import (
    Net,
    adam,
    assert_same_on_all_ranks,
    losses_of,
    parameters,
)
from tests.support.noisy import (
    NAMES,
    NoisyLosses,
    Recording,
    deviation,
    draw_gramians,
    expected_gramian,
    gramian_of_step,
)
from tests.support.registry import over_all

DRAWS, LIMIT = 150, 4.5


def own_losses(seed: int, noise: float = 1.0) -> NoisyLosses:
    return NoisyLosses(seed=100 * seed + dist.get_rank(), noise=noise)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_estimate_is_unbiased_and_the_plain_gramian_is_not(window):
    losses, plain = own_losses(1), own_losses(1)
    expected = expected_gramian(window)
    estimates = draw_gramians(losses, losses.optimizer(), DRAWS, window)
    assert deviation(estimates, expected) < LIMIT
    measured = draw_gramians(plain, plain.optimizer(PerLoss()), DRAWS, window)
    assert deviation(measured, expected) > LIMIT


@pytest.mark.parametrize("present", [lambda k: NAMES, lambda k: ("abc", "ba", "ca")[k]])
@pytest.mark.parametrize("window", [1, 3])
def test_ranks_and_micro_batches_are_batches_alike(window, present):
    """As one process with a window of all of them, in which each rank's batch counts for half."""
    losses = own_losses(2)
    found = gramian_of_step(losses.optimizer(), losses, window, present)
    assert_same_on_all_ranks(found)
    draws = [NoisyLosses(seed=200 + rank) for rank in range(2)]
    for twin in draws:
        twin.params = draws[0].params
    alone = draws[0].optimizer(process_group=None)
    batches = [twin.batch(present(k)) for k in range(window) for twin in draws]
    for batch in batches[:-1]:
        with alone.accumulate():
            alone.backward({name: loss / 2 for name, loss in batch.items()})
    alone.backward({name: loss / 2 for name, loss in batches[-1].items()})
    order = [alone.metrics.names.index(name) for name in NAMES]
    expected = alone.metrics.gramian[order][:, order]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_it_is_projected_alike_on_all_ranks():
    losses = own_losses(3, noise=20.0)
    optimizer = losses.optimizer(PerLoss(unbiased=True))
    found = gramian_of_step(optimizer, losses, 1, lambda k: NAMES)
    assert_same_on_all_ranks(found, optimizer.metrics.projected)
    assert float(optimizer.metrics.projected) > 0.0


def test_a_combined_loss_has_a_batch_on_each_rank():
    losses, twin = own_losses(4), own_losses(4)
    optimizer, other = losses.optimizer(), twin.optimizer()
    optimizer.combined_loss(losses.batch()).backward()
    other.backward(twin.batch())
    assert torch.equal(optimizer.metrics.gramian, other.metrics.gramian)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 7, dtype=torch.float64)
        self.head = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, inputs):
        outputs = self.head(torch.tanh(self.layer(inputs)))
        return {name: outputs[:, k].square().mean() for k, name in enumerate(NAMES)}


def inputs(number, rank):
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randn(4, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("engine", [None, PerLoss(unbiased=True)], ids=str)
def test_shards_are_told_apart_by_micro_batches_only(engine):
    """The gradients of a micro-batch arrive averaged over the ranks."""
    model, twin = Layers(), Layers()
    fully_shard(model)
    weighting = MGDA() if engine else Recording()
    optimizer = BalancedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), weighting, engine=engine
    )
    alone = BalancedOptimizer(
        torch.optim.SGD(twin.parameters(), 0.1), weighting, engine=engine, process_group=None
    )
    with pytest.raises(BalanceError, match="make one batch together"):
        optimizer.backward(model(inputs(0, dist.get_rank())))
    for number in range(3):
        whole = torch.cat([inputs(number, rank) for rank in range(2)])
        if number < 2:
            with optimizer.accumulate():
                optimizer.backward(model(inputs(number, dist.get_rank())))
            with alone.accumulate():
                alone.backward(twin(whole))
        else:
            optimizer.backward(model(inputs(number, dist.get_rank())))
            alone.backward(twin(whole))
    found, expected = (run.metrics.gramian for run in (optimizer, alone))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_same_on_all_ranks(found)


over_rows = over_all(lambda method: method.independent)


def halves(step, micro):
    """A batch for each micro-batch of each rank."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8 * micro, 6, generator=generator, dtype=torch.float64)
    return [part.chunk(2) for part in batch.chunk(micro)]


@over_rows
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("wrap", [DDP, lambda net: net], ids=["DDP", "bare"])
def test_methods_train_as_one_process_with_all_micro_batches(method, micro, wrap):
    model, twin = wrap(Net()), Net()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
    for step in range(4):
        parts = halves(step, micro)
        own = [part[dist.get_rank()] for part in parts]
        window(optimizer, [lambda b=b: losses_of(model, b) for b in own])
        everyone = [batch for part in parts for batch in part]
        window(alone, [lambda b=b: halved(losses_of(twin, b)) for b in everyone])
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-10, atol=1e-10)
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict()["balance"])


def halved(losses):
    return {name: loss / 2 for name, loss in losses.items()}


def window(optimizer, batches):
    optimizer.zero_grad()
    for losses in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(losses())
    optimizer.backward(batches[-1]())
    optimizer.step()
