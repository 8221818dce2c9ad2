"""Losses times their coefficients: their sum has the gradient of `combined_loss`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moo_balance import (
    MGDA,
    BalancedOptimizer,
    BalanceError,
    BalanceValueError,
    GradDrop,
    MoCo,
    NashMTL,
    SeparateMoments,
    Sum,
    TrimmedMean,
    WithConstant,
)
from moo_balance.engine import Streaming
from tests.support.problems import (
    SmallModel,
    adam,
    flat_gradient,
    momentum,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over, over_kinds

pytestmark = pytest.mark.capability("weighted losses, summed by a trainer")


def is_combination(method):
    """Whether the direction is a sum of coefficients times the gradients of the batch, always."""
    rows = [method.make(NAMES).needs(step).rows for step in range(10)]
    return all(row is None or (row.combines == "gradients" and not row.steps_apart) for row in rows)


over_combinations = over(is_combination)


def step_by_sum(model, optimizer, batch):
    """What a trainer does that sums a vector of losses."""
    optimizer.zero_grad()
    weighted = optimizer.weighted_losses(model.losses(batch))
    torch.stack([*weighted.values()]).sum().backward()
    optimizer.step()
    optimizer.observe(model.losses(batch))


@over_combinations
def test_their_sum_has_the_gradient_of_the_combined_loss(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for batch in range(4):
        step_by_sum(model, optimizer, batch)
        other.zero_grad()
        other.combined_loss(twin.losses(batch)).backward()
        torch.testing.assert_close(flat_gradient(model), flat_gradient(twin), rtol=1e-9, atol=1e-12)
        other.step()
        other.observe(twin.losses(batch))


@over_kinds
def test_each_is_its_loss_times_a_constant(method):
    model, optimizer = setup(method)
    losses = model.losses()
    weighted = optimizer.weighted_losses(dict(reversed(losses.items())))
    coefficients = optimizer.metrics.coefficients
    assert list(weighted) == list(coefficients)
    for name, loss in weighted.items():
        assert loss.shape == ()
        (own,) = torch.autograd.grad(loss, model.trunk.weight, retain_graph=True)
        (plain,) = torch.autograd.grad(losses[name], model.trunk.weight, retain_graph=True)
        torch.testing.assert_close(own, coefficients[name] * plain, rtol=1e-12, atol=0)


@over_kinds
def test_nothing_changes_before_the_step(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    weighted = optimizer.weighted_losses(model.losses(2))
    assert all(param.grad is None for param in model.parameters())
    with pytest.raises(BalanceError, match="should follow a backward pass"):
        optimizer.step()
    sum(weighted.values()).backward()
    assert whole_state(model, optimizer) == before
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 3


def test_hooks_see_one_gradient_and_a_scaler_scales_it():
    model, twin = SmallModel(), SmallModel()
    optimizer, other = (BalancedOptimizer(adam(each), MGDA()) for each in (model, twin))
    calls = []
    model.trunk.weight.register_hook(lambda gradient: calls.append(gradient.clone()))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    weighted = optimizer.weighted_losses(model.losses(), grad_scaler=scaler)
    scaler.scale(sum(weighted.values())).backward()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], model.trunk.weight.grad)
    scaler.step(optimizer)
    scaler.update()
    train(twin, other, [0])
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["features", "Streaming"])
def test_features_and_other_engines_keep_the_graph_too(how):
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), nn.Linear(4, 2)
    inputs = torch.randn(8, 3)

    def run(optimizer, by_sum):
        features = torch.tanh(trunk(inputs))
        a, b = heads(features).square().mean(0)
        losses, arguments = {"a": a, "b": b}, {}
        if how == "features":
            arguments = {"features": features}
        optimizer.zero_grad()
        if by_sum:
            sum(optimizer.weighted_losses(losses, **arguments).values()).backward()
        else:
            optimizer.combined_loss(losses, **arguments).backward()
        return torch.cat([p.grad.reshape(-1) for m in (trunk, heads) for p in m.parameters()])

    engine = Streaming() if how == "Streaming" else None
    base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
    optimizer = BalancedOptimizer(base, MGDA(), engine=engine)
    torch.testing.assert_close(run(optimizer, True), run(optimizer, False))


@pytest.mark.parametrize("method", [GradDrop(), TrimmedMean(), MoCo(), SeparateMoments()], ids=repr)
def test_a_direction_that_is_no_combination_is_refused(method):
    model = SmallModel()
    optimizer = BalancedOptimizer(momentum(model), method)
    name = type(method).__name__
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceValueError, match=f"one coefficient. Found {name}.*combined_loss"):
        optimizer.weighted_losses(model.losses())
    assert whole_state(model, optimizer) == before
    optimizer.combined_loss(model.losses()).backward()  # as the message says
    optimizer.step()


def test_windows_and_closures_are_refused():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    with optimizer.accumulate(), pytest.raises(BalanceError, match="window"):
        optimizer.weighted_losses(model.losses())
    with pytest.raises(BalanceValueError, match="closure"):
        optimizer.weighted_losses(model.losses)


def test_several_ranks_are_refused(monkeypatch):
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    monkeypatch.setattr("moo_balance._balancer.is_distributed", lambda: True)
    monkeypatch.setattr("moo_balance._balancer.find_ranks", lambda *_: object())
    with pytest.raises(BalanceError, match=r"single process.*combined_loss"):
        optimizer.weighted_losses(model.losses())


def test_a_step_that_must_be_skipped_is_skipped():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), nonfinite="skip")
    before = snapshot(model.state_dict())
    losses = model.losses()
    weighted = optimizer.weighted_losses({**losses, "b": losses["b"] * math.nan})
    sum(weighted.values()).backward()
    optimizer.step()
    assert snapshot(model.state_dict()) == before
    assert optimizer.log_dict()["moo/skipped"] == 1


def test_constant_terms_are_weighted_by_their_constants():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), WithConstant(MGDA(), {"c": -0.01}))
    losses = model.losses()
    weighted = optimizer.weighted_losses(losses)
    assert torch.equal(weighted["c"], -0.01 * losses["c"])


@pytest.mark.parametrize("form", ["combined_loss", "weighted_losses"])
def test_a_coefficient_may_be_beyond_the_range_of_float16(form):
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), NashMTL())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    losses = {"a": (1e-6 * weight[0]).half(), "b": weight[1].half()}
    result = getattr(optimizer, form)(losses, grad_scaler=scaler)
    loss = result if form == "combined_loss" else sum(result.values())
    assert optimizer.metrics.coefficients["a"] > 65504
    assert loss.isfinite()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert weight.grad.isfinite().all()
