"""A closure is evaluated again after the step: the same random numbers, and nothing left behind."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from moo_balance import FAMO, BalancedOptimizer, BalancedTrajectory
from tests.support.problems import snapshot, whole_state
from tests.support.registry import KINDS, over, over_each_method

pytestmark = pytest.mark.capability("dropout and BatchNorm in methods that observe the step")

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Quantizer(nn.Module):
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
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Quantizer(), nn.Linear(6, 2)]
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


over_forms = pytest.mark.parametrize("take", [by_step, by_backward])


@over_forms
@pytest.mark.parametrize(
    "weighting",
    [FAMO(decay=0.0, logit_optimizer="sgd"), BalancedTrajectory(decay=0.0, logit_optimizer="sgd")],
)
def test_the_losses_are_the_same_after_a_step_at_rate_zero(take, weighting):
    model, optimizer = noisy(weighting, lr=0.0)
    seen = []
    evaluate = model.losses
    model.losses = lambda: seen.append(evaluate()) or seen[-1]
    take(model, optimizer)
    first, again = seen
    assert snapshot(first) == snapshot(again)
    assert all(loss.requires_grad for loss in again.values())
    assert optimizer.state_dict()["balance"]["state"]["logits"].tolist() == [0.0, 0.0]


def test_the_losses_differ_in_proportion_to_a_small_step():
    """With other random numbers the difference would not vanish with the learning rate."""

    def change(lr):
        model, optimizer = noisy(FAMO(decay=0.0, logit_optimizer="sgd"), lr=lr)
        by_step(model, optimizer)
        return optimizer.state_dict()["balance"]["state"]["logits"]

    torch.testing.assert_close(change(1e-6), change(1e-5) / 10, rtol=1e-3, atol=0)


@over_forms
@over(lambda method: method.observes or method in KINDS)
def test_a_run_with_closures_is_the_run_that_is_given_the_losses(method, take):
    """The twin observes the losses that the run saw, and never evaluates twice."""
    names = ("a", "b")
    model, optimizer = noisy(method.make(names))
    evaluate, calls = model.losses, []
    model.losses = lambda: calls[-1].append(evaluate()) or calls[-1][-1]
    for _ in range(4):
        calls.append([])
        take(model, optimizer)
    del model.losses
    end = (whole_state(model, optimizer), snapshot(torch.get_rng_state()))

    twin, other = noisy(optimizer.weighting)
    for _, *again in calls:
        other.zero_grad()
        other.backward(twin.losses())
        other.step()
        for losses in again:
            other.observe(losses)
    assert (whole_state(twin, other), snapshot(torch.get_rng_state())) == end


@over_each_method
def test_closures_are_evaluated_again_only_for_observing_methods_and_when_due(method):
    model, optimizer = noisy(method.make(("a", "b")))
    evaluate, count = model.losses, []
    model.losses = lambda: count.append(1) or evaluate()
    for _ in range(6):
        by_step(model, optimizer)
    again = 6 // optimizer.weighting.every if method.observes else 0
    assert len(count) == 6 + again


@over_forms
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


# ---------------------------------------------------------------------- what is put back


def buffers_of(model):
    return {name: (id(buffer), snapshot(buffer)) for name, buffer in model.named_buffers()}


def test_an_error_in_the_second_evaluation_leaves_random_numbers_and_buffers_as_they_were():
    model, optimizer = noisy(FAMO())
    after_the_first = []

    def closure():
        losses = model.losses()
        if after_the_first:
            raise KeyError
        after_the_first.append((buffers_of(model), snapshot(torch.get_rng_state())))
        return losses

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert [(buffers_of(model), snapshot(torch.get_rng_state()))] == after_the_first
    assert torch.is_grad_enabled()


class Counter(nn.Module):
    """Counts its calls in a buffer that it may share with others, next to buffers of odd kinds."""

    def __init__(self, count: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("count", count)
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self):
        self.count += 1
        return self.weight.square()


def test_buffers_of_any_kind_are_put_back():
    count = torch.zeros(())
    first, second = Counter(count), Counter(count)
    before = [id(buffer) for buffer in (*first.buffers(), *second.buffers())]
    params = [*first.parameters(), *second.parameters()]
    optimizer = BalancedOptimizer(torch.optim.SGD(params, lr=0.1), FAMO())
    optimizer.step(lambda: {"a": first(), "b": second()})
    assert float(count) == 2.0
    assert [id(buffer) for buffer in (*first.buffers(), *second.buffers())] == before


def test_buffers_of_modules_in_evaluation_mode_are_put_back():
    counter = Counter(torch.zeros(())).eval()
    optimizer = BalancedOptimizer(torch.optim.SGD(counter.parameters(), lr=0.1), FAMO())
    optimizer.step(lambda: {"a": counter(), "b": 2 * counter()})
    assert float(counter.count) == 2.0


# ---------------------------------------------------------------------- compilers and autocast

ROWS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

over_observing = pytest.mark.parametrize(
    "weighting", [FAMO(), BalancedTrajectory()], ids=["FAMO", "BalancedTrajectory"]
)


class NoisyFloat32(nn.Module):
    """With running statistics and with random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs):
        outputs = self.layers(inputs)
        return {"size": outputs.square().mean(), "error": 10 * (outputs - inputs).square().mean()}


def end_of_run(weighting, prepare=lambda model: model, region=contextlib.nullcontext):
    """All state after four steps of a prepared model, in a region such as autocast."""
    torch.manual_seed(0)
    model = NoisyFloat32()
    prepared = prepare(model)
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting)
    for _ in range(4):
        optimizer.zero_grad()
        with region():
            optimizer.backward(partial(prepared, ROWS))
            optimizer.step()
    return whole_state(model, optimizer)


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.capability("torch.compile")
@over_observing
@pytest.mark.parametrize(
    "compiler",
    [torch.compile, partial(torch.compile, fullgraph=True), compile_in_place],
    ids=["whole", "fullgraph", "in place"],
)
def test_a_compiled_model_is_compiled_once(compiler, weighting):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    assert end_of_run(weighting, partial(compiler, backend=backend)) == end_of_run(weighting)
    assert len(graphs) == 1


@pytest.mark.capability("mixed precision with autocast")
@over_observing
def test_weights_that_autocast_has_cached_do_not_hide_the_step(weighting):
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    uncached = partial(bfloat16, cache_enabled=False)
    assert end_of_run(weighting, region=bfloat16) == end_of_run(weighting, region=uncached)
