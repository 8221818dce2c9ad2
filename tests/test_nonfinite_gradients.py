"""Losses that are finite and gradients that are not: no method steps on them."""

from __future__ import annotations

import math

import pytest
import torch

from moo_balance import MGDA, BalancedOptimizer, NonFiniteError, Sum
from moo_balance.screening import are_finite
from tests.problems import Toy, setup, train, whole_state
from tests.registry import over, over_methods

pytestmark = pytest.mark.capability("gradients that are not finite are refused or skipped")


class Spoiled(torch.autograd.Function):
    """Changes nothing on the way forth; on the way back comes something else."""

    @staticmethod
    def forward(ctx, value, gradient):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx, seed):
        return seed * ctx.gradient, None


over_values = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def spoiled(model, step, value):
    losses = model.losses(step)
    return {**losses, "b": Spoiled.apply(losses["b"], value)}


def setup_of(weighting):
    model = Toy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, BalancedOptimizer(sgd, weighting)


def stepped(optimizer, losses):
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()


@over_methods
@over_values
def test_they_are_refused_before_the_step(method, value):
    model, optimizer = setup(method)
    twin, other = setup(method)
    train(model, optimizer, range(1))
    before = whole_state(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"gradient of .*`b`.* should be finite"):
        stepped(optimizer, lambda: spoiled(model, 1, value))
    assert whole_state(model, optimizer) == before
    train(model, optimizer, [2])
    train(twin, other, [0, 2])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
@over_values
def test_they_are_skipped_on_request(method, value):
    model, optimizer = setup(method, nonfinite="skip")
    before = whole_state(model, optimizer)
    stepped(optimizer, lambda: spoiled(model, 0, value))
    after = whole_state(model, optimizer)
    assert after["model"] == before["model"]
    assert after["optimizer"]["state"] == before["optimizer"]["state"]
    assert after["optimizer"]["balance"] == {**before["optimizer"]["balance"], "skipped": 1}
    train(model, optimizer, range(1, 3))
    assert optimizer.log_dict()["moo/skipped"] == 1.0


@over(lambda method: not method.gramian)
def test_who_mends_a_gradient_may_step_on_it(method):
    model, optimizer = setup(method)
    optimizer.zero_grad()
    optimizer.backward(lambda: spoiled(model, 0, math.nan))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_()
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 1


@over_methods
def test_they_are_found_behind_combine(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)

    def step():
        optimizer.combine(spoiled(model, 0, math.nan)).backward()
        optimizer.step()

    with pytest.raises(NonFiniteError, match=r"gradient of .*`b`"):
        step()
    assert whole_state(model, optimizer) == before


@pytest.mark.parametrize("how", ["written", "added", "replaced"])
def test_they_are_found_behind_a_gramian_that_was_finite(how):
    """Nobody looks again at gradients whose inner products were seen, unless they are changed."""
    model, optimizer = setup_of(MGDA())
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    parameter = model.heads[2].bias
    if how == "written":
        parameter.grad[0] = math.nan
    elif how == "added":
        (parameter.sum() * math.nan).backward()
    else:
        parameter.grad = parameter.grad * math.nan
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_a_gradient_that_was_there_before_is_looked_at():
    model, optimizer = setup_of(MGDA())
    model.heads[2].bias.grad = torch.full_like(model.heads[2].bias, math.nan)
    optimizer.backward(model.losses())
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_nobody_looks_twice(monkeypatch):
    looked = []
    monkeypatch.setattr("moo_balance.balancer.are_finite", lambda g: looked.extend(g) or True)
    model, optimizer = setup_of(MGDA())
    train(model, optimizer, range(2))
    assert looked == []
    model, optimizer = setup_of(Sum())
    train(model, optimizer, range(1))
    assert len(looked) == sum(p.grad is not None for p in model.parameters())


def test_they_are_found_outside_of_the_measured_parameters():
    """A Gramian over some parameters does not see the others."""
    model = Toy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = BalancedOptimizer(sgd, MGDA(), params=model.trunk)
    optimizer.backward(model.losses())
    model.heads[2].bias.grad.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_large_is_not_infinite(dtype):
    """The quick look is at a norm, which may overflow; then there is a second look."""
    limit = torch.finfo(dtype).max
    large = torch.full((5,), limit, dtype=dtype)
    assert are_finite([large])
    assert are_finite([torch.zeros(0, dtype=dtype)])
    for bad in (math.nan, math.inf):
        large[3] = bad
        assert not are_finite([large])


def test_infinities_that_cancel_are_found():
    assert not are_finite([torch.tensor([math.inf, -math.inf])])


def test_sparse_gradients_are_looked_at_where_they_are():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([0, 0, 2])).sum().backward()
    assert are_finite([table.weight.grad])
    table.weight.grad._values()[1, 0] = math.nan
    assert not are_finite([table.weight.grad])
