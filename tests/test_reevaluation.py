"""Looking at a batch again: the same random numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moo_balance import FAMO, BalancedOptimizer, BalancedTrajectory
from moo_balance.reevaluation import RandomState, Replay, same_conditions
from tests.problems import snapshot, whole_state
from tests.support.registry import over_methods

pytestmark = pytest.mark.capability("dropout and BatchNorm in methods that watch the step")

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Quantiser(nn.Module):
    """Additive uniform noise, and a running average that is assigned, not updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.register_buffer("unused", None)

    def forward(self, x):
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean()
        return x + torch.rand_like(x) - 0.5


class Noisy(nn.Module):
    """Everything that changes when a forward pass runs twice."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Quantiser(), nn.Linear(6, 2)]
        self.body = nn.Sequential(*layers).double()

    def losses(self):
        outputs = self.body(INPUTS) + 0.01 * torch.randn(16, 2, dtype=torch.float64)
        return {"a": outputs[:, 0].square().mean(), "b": (outputs[:, 1] - 1).square().mean()}


def noisy(weighting, lr=0.01):
    torch.manual_seed(0)
    model = Noisy()
    return model, BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=lr), weighting)


def by_step(model, optimizer):
    optimizer.step(model.losses)


def by_backward(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(model.losses)
    optimizer.step()


both_forms = pytest.mark.parametrize("take", [by_step, by_backward])


@both_forms
@pytest.mark.parametrize(
    "weighting",
    [FAMO(decay=0.0, logit_optimizer="sgd"), BalancedTrajectory(decay=0.0, logit_optimizer="sgd")],
)
def test_without_a_step_there_is_no_difference(take, weighting):
    """Common random numbers: at learning rate zero the losses after are those before."""
    model, optimizer = noisy(weighting, lr=0.0)
    seen = []
    inner = model.losses
    model.losses = lambda: seen.append(inner()) or seen[-1]
    take(model, optimizer)
    first, again = seen
    assert snapshot(first) == snapshot(again)
    assert all(not loss.requires_grad for loss in again.values())
    assert optimizer.state_dict()["balance"]["state"]["logits"].tolist() == [0.0, 0.0]


def test_the_difference_is_due_to_the_step_alone():
    """It vanishes with the learning rate, in proportion; other noise would not."""

    def change(lr):
        model, optimizer = noisy(FAMO(decay=0.0, logit_optimizer="sgd"), lr=lr)
        by_step(model, optimizer)
        return optimizer.state_dict()["balance"]["state"]["logits"]

    torch.testing.assert_close(change(1e-6), change(1e-5) / 10, rtol=1e-3, atol=0)


@both_forms
@over_methods
def test_a_run_goes_on_as_if_nobody_had_looked(method, take):
    """The twin is shown the losses that the run saw, and never evaluates twice."""
    names = ("a", "b")
    model, optimizer = noisy(method.make(names))
    evaluate, calls = model.losses, []
    model.losses = lambda: calls[-1].append(evaluate()) or calls[-1][-1]
    for _ in range(4):
        calls.append([])
        take(model, optimizer)
    del model.losses
    end = (whole_state(model, optimizer), snapshot(torch.get_rng_state()))

    twin, other = noisy(method.make(names))
    for _, *again in calls:
        other.zero_grad()
        other.backward(twin.losses())
        other.step()
        for losses in again:
            other.observe(losses)
    assert (whole_state(twin, other), snapshot(torch.get_rng_state())) == end


@over_methods
def test_only_those_who_watch_evaluate_again_and_only_when_due(method):
    model, optimizer = noisy(method.make(("a", "b")))
    evaluate, count = model.losses, []
    model.losses = lambda: count.append(1) or evaluate()
    for _ in range(6):
        by_step(model, optimizer)
    again = 6 // optimizer.weighting.every if method.observes else 0
    assert len(count) == 6 + again


def test_same_conditions_put_everything_back_even_after_an_error():
    model, _ = noisy(FAMO())
    before = RandomState([torch.device("cpu")])
    torch.rand(3)
    stream = snapshot(torch.get_rng_state())
    buffers = {name: (id(buffer), snapshot(buffer)) for name, buffer in model.named_buffers()}

    def fail():
        with same_conditions(before):
            model.losses()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert snapshot(torch.get_rng_state()) == stream
    after = {name: (id(buffer), snapshot(buffer)) for name, buffer in model.named_buffers()}
    assert after == buffers
    assert torch.is_grad_enabled()


def test_modules_in_evaluation_mode_are_left_alone():
    """Their buffers are not copied: a frozen codebook may be large."""
    model, _ = noisy(FAMO())
    model.eval()
    model.body[3].register_buffer("seen", torch.zeros(()))
    before = RandomState([])
    with same_conditions(before):
        model.losses()
        model.body[3].seen += 1
    assert float(model.body[3].seen) == 1.0


class Counter(nn.Module):
    """Counts its calls in a buffer that it may share with others."""

    def __init__(self, count: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("count", count)
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self):
        self.count += 1


def test_buffers_of_any_kind_are_put_back():
    count = torch.zeros(())
    first, second = Counter(count), Counter(count)
    before = [id(buffer) for buffer in (*first.buffers(), *second.buffers())]
    with same_conditions(RandomState([])):
        first()
        second()
    assert float(count) == 0.0
    assert [id(buffer) for buffer in (*first.buffers(), *second.buffers())] == before


def test_a_replay_repeats_the_random_numbers_it_began_with():
    replay = Replay(lambda: torch.rand(4), [torch.device("cpu")])
    first = torch.rand(4)
    following = torch.rand(4)
    assert torch.equal(replay.again(), first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), following)


def test_a_replay_has_no_graph():
    weight = nn.Parameter(torch.ones(()))
    assert not Replay(lambda: 2 * weight, []).again().requires_grad


@both_forms
def test_a_step_under_no_grad_trains(take):
    """Some trainers call it there."""
    model, optimizer = noisy(FAMO())
    before = snapshot(model.state_dict())
    with torch.no_grad():
        take(model, optimizer)
    assert snapshot(model.state_dict()) != before


def test_losses_of_shape_one_are_balanced_under_no_grad_too():
    model, optimizer = noisy(FAMO(lagged=True))
    losses = {name: loss.reshape(1) for name, loss in model.losses().items()}
    with torch.no_grad():
        optimizer.backward(losses)
    assert all(p.grad is not None for p in model.parameters())
