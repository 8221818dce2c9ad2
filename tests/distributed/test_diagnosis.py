"""The batches of all ranks count as one set of independent batches."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import (
    BalanceError,
    BalanceValueError,
    NonFiniteError,
    diagnose,
    suggest_weights,
)
from tests.support.distributed import Net, Normalized, assert_same_on_all_ranks, losses_of
from tests.support.problems import snapshot


def draw_batches(rank: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


WRAPS = {
    "DDP": DDP,
    "unused": lambda net: DDP(net, find_unused_parameters=True),
    "bare": lambda net: net,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("kind", [Net, Normalized])
def test_all_ranks_report_what_one_process_reports_of_all_batches(kind, wrap):
    model, twin = wrap(kind()), kind()
    state = snapshot(model.state_dict())
    own, everyone = draw_batches(dist.get_rank()), [*draw_batches(0), *draw_batches(1)]
    report = diagnose(lambda batch: losses_of(model, batch), model, own)
    alone = diagnose(lambda batch: losses_of(twin, batch), twin, everyone, process_group=None)
    assert report.batches == 6
    assert str(report) == str(alone)
    assert report.pairs["a", "b"].low == pytest.approx(alone.pairs["a", "b"].low)
    assert_same_on_all_ranks(json.dumps(report.to_dict()))
    weights = suggest_weights(lambda batch: losses_of(model, batch), model, own)
    single = suggest_weights(
        lambda batch: losses_of(twin, batch), twin, everyone, process_group=None
    )
    assert weights.gradient_norms == pytest.approx(single.gradient_norms)
    assert weights.losses == pytest.approx(single.losses)
    assert_same_on_all_ranks(weights.gradient_norms, weights.losses)
    assert snapshot(model.state_dict()) == state
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("kind", [Net, Normalized])
def test_a_data_parallel_model_trains_on_as_without_it(kind):
    ends = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = DDP(kind())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(4):
            if measured:
                diagnose(lambda x: losses_of(model, x), model, draw_batches(dist.get_rank()))  # noqa: B023
            optimizer.zero_grad()
            sum(losses_of(model, draw_batches(10 * step + dist.get_rank())[0]).values()).backward()
            optimizer.step()
        ends.append(snapshot(model.state_dict()))
        assert_same_on_all_ranks([param.grad for param in model.parameters()])
    assert ends[0] == ends[1]


def test_one_batch_on_each_rank_is_enough():
    model = Net()
    report = diagnose(lambda x: losses_of(model, x), model, draw_batches(dist.get_rank(), 1))
    assert report.batches == 2


def test_without_a_group_each_rank_reports_on_its_own():
    model = Net()
    report = diagnose(
        lambda x: losses_of(model, x), model, draw_batches(dist.get_rank()), process_group=None
    )
    assert report.batches == 3


def test_ranks_with_other_numbers_of_batches_are_refused():
    model = DDP(Net())
    with pytest.raises(BalanceError, match="equally many batches"):
        diagnose(lambda x: losses_of(model, x), model, draw_batches(0, 2 + dist.get_rank()))


def test_an_error_on_one_rank_is_raised_on_all():
    model, rank = DDP(Net()), dist.get_rank()

    def losses_fn(batch):
        losses = losses_of(model, batch)
        if rank == 1:
            raise KeyError("lost")
        return losses

    expected, message = (KeyError, "lost") if rank == 1 else (BalanceError, "Rank 1.*lost")
    with pytest.raises(expected, match=message):
        diagnose(losses_fn, model, draw_batches(rank))
    sum(losses_of(model, draw_batches(rank)[0]).values()).backward()


def test_ranks_with_other_losses_are_refused():
    model = Net()
    names = ("a", "b") if dist.get_rank() else ("a", "c")
    with pytest.raises(BalanceError, match="same losses, in the same order"):
        suggest_weights(lambda x: losses_of(model, x, names), model, draw_batches(0))


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_on_all():
    model, rank = Net(), dist.get_rank()

    def losses_fn(batch):
        losses = losses_of(model, batch)
        return {**losses, "b": losses["b"] * (float("inf") if rank else 1.0)}

    for measure in (diagnose, suggest_weights):
        with pytest.raises(NonFiniteError, match=r"Loss `b` should be finite. Found (nan|inf)"):
            measure(losses_fn, model, draw_batches(rank))


def test_a_static_graph_and_shards_are_refused():
    model = DDP(Net(), static_graph=True)
    with pytest.raises(BalanceError, match="static_graph"):
        diagnose(lambda x: losses_of(model, x), model, draw_batches(0))
    diagnose(lambda x: losses_of(model.module, x), model, draw_batches(0))
    sharded = Net()
    fully_shard(sharded)
    with pytest.raises(BalanceValueError, match="whole on each rank"):
        diagnose(lambda x: losses_of(sharded, x), sharded, draw_batches(0))
