"""Losses that are finite and gradients that are not: no method steps on them."""

from __future__ import annotations

import math

import pytest
import torch

from moo_balance import MGDA, BalancedOptimizer, NonFiniteError
from moo_balance.engine import Streaming
from moo_balance.screening import are_finite
from moo_balance.weighting import GramianWeighting
from tests.problems import Toy, setup, train, whole_state
from tests.support.registry import over, over_methods

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


def setup_of(weighting, **options):
    model = Toy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, BalancedOptimizer(sgd, weighting, **options)


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
        optimizer.combined_loss(spoiled(model, 0, math.nan)).backward()
        optimizer.step()

    with pytest.raises(NonFiniteError, match=r"gradient of .*`b`"):
        step()
    assert whole_state(model, optimizer) == before


def added(parameter):
    (parameter.sum() * math.nan).backward()


def replaced(parameter):
    parameter.grad = parameter.grad * math.nan


def written(parameter):
    parameter.grad[0] = math.nan


def written_behind_autograd(parameter):
    parameter.grad.data[0] = math.nan


def written_as_an_array(parameter):
    parameter.grad.numpy()[0] = math.nan


@pytest.mark.parametrize(
    "spoil", [added, replaced, written, written_behind_autograd, written_as_an_array]
)
def test_they_are_found_behind_a_gramian_that_was_finite(spoil):
    model, optimizer = setup_of(MGDA())
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    spoil(model.heads[2].bias)
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_a_gradient_that_was_there_before_is_looked_at():
    model, optimizer = setup_of(MGDA())
    model.heads[2].bias.grad = torch.full_like(model.heads[2].bias, math.nan)
    optimizer.backward(model.losses())
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_what_a_hook_spoils_in_a_pass_of_its_own_is_found():
    model, optimizer = setup_of(MGDA(), engine=Streaming())
    model.heads[2].bias.register_post_accumulate_grad_hook(written)
    with pytest.raises(NonFiniteError):
        stepped(optimizer, model.losses())


class Scaled(GramianWeighting):
    """Multiplies each gradient by a power of its length."""

    def __init__(self, power):
        self.power = power

    def solve(self, statistics, gramian):
        return gramian.diagonal() ** (self.power / 2)

    def coefficients(self, statistics, weights):
        return weights


def test_a_division_by_no_gradient_at_all_is_found():
    model, optimizer = setup_of(Scaled(-1))
    losses = model.losses()
    with pytest.raises(NonFiniteError):
        stepped(optimizer, {**losses, "b": losses["b"] * 0.0})


def test_gradients_whose_sum_overflows_are_found():
    weight = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Scaled(0))
    slope = torch.tensor([4e4, 0.0, 0.0], dtype=torch.float16)
    with pytest.raises(NonFiniteError):
        stepped(optimizer, {"a": weight @ slope, "b": weight @ slope})


def test_gradients_may_be_made_in_inference_mode():
    model, optimizer = setup_of(MGDA())
    optimizer.backward(model.losses())
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.grad = 0.5 * parameter.grad
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 1


def test_they_are_found_outside_of_the_measured_parameters():
    """A Gramian over some parameters does not see the others."""
    model = Toy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = BalancedOptimizer(sgd, MGDA(), shared_params=model.trunk)
    optimizer.backward(model.losses())
    model.heads[2].bias.grad.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_large_is_not_infinite(dtype):
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
