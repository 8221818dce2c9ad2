"""Where looking would make the host wait, a faulty step is masked and reported later."""

from __future__ import annotations

import math

import pytest
import torch

from moo_balance import screening
from moo_balance.errors import NonFiniteError
from moo_balance.weighting import Statistics
from tests.problems import (
    flat_gradient,
    gradients,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over, over_methods, over_some


@pytest.fixture
def deferred(monkeypatch):
    """Treat the CPU as a device that is not to be waited for."""
    monkeypatch.setattr(screening, "on_host", lambda tensor: False)


class Spoiled(torch.autograd.Function):
    """A finite loss whose gradient is NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, seed):
        return seed * math.nan


def with_value(value):
    """Loss "b" gets this value; its gradient stays what it is."""
    return lambda losses: {**losses, "b": losses["b"] - losses["b"].detach() + value}


def with_nan_gradient(losses):
    return {**losses, "b": Spoiled.apply(losses["b"])}


def take(model, optimizer, step, edit):
    optimizer.zero_grad()
    optimizer.backward(edit(model.losses(step)))
    optimizer.step()
    if optimizer.weighting.observes_step:
        optimizer.observe(model.losses(step))


def balance_of(optimizer):
    return optimizer.state_dict()["balance"]


def without_counters(saved):
    """What was learned: not how many steps it took, nor what the next step is waiting for."""
    return snapshot({key: saved[key] for key in ("names", "state")})


# ---------------------------------------------------------------------- on the host


@over_methods
def test_skipping_counts_and_leaves_everything_else(method):
    model, optimizer = setup(method, nonfinite="skip")
    twin, other = setup(method)
    for step, value in enumerate((math.nan, math.inf, -math.inf)):
        train(model, optimizer, [step])
        train(twin, other, [step])
        before = whole_state(model, optimizer)
        optimizer.zero_grad()
        optimizer.backward(with_value(value)(model.losses(step)))
        optimizer.step()
        before["optimizer"]["balance"]["skipped"] += 1
        assert whole_state(model, optimizer) == before
    assert optimizer.log_dict()["moo/skipped"] == 3.0
    end, expected = whole_state(model, optimizer), whole_state(twin, other)
    assert end["optimizer"]["balance"].pop("skipped") == 3
    assert expected["optimizer"]["balance"].pop("skipped") == 0
    assert end == expected


@over_methods
def test_skipping_works_in_the_closure_form_and_for_combine(method):
    model, optimizer = setup(method, nonfinite="skip")
    train(model, optimizer, [0])
    before = snapshot(model.state_dict())
    losses = optimizer.step(lambda: with_value(math.nan)(model.losses(1)))
    assert math.isnan(losses["b"].item())
    optimizer.combined_loss(with_value(math.nan)(model.losses(1))).backward()
    optimizer.step()
    assert snapshot(model.state_dict()) == before
    assert balance_of(optimizer)["skipped"] == 2
    train(model, optimizer, [1])


@over(lambda method: method.gramian and method.make(NAMES).every == 1)
def test_a_step_whose_gradient_is_not_finite_is_skipped_too(method):
    model, optimizer = setup(method, nonfinite="skip")
    train(model, optimizer, [0])
    before = snapshot(model.state_dict())
    take(model, optimizer, 1, with_nan_gradient)
    assert snapshot(model.state_dict()) == before
    assert balance_of(optimizer)["skipped"] == 1


@over(lambda method: max(method.bounds(NAMES)) > -math.inf)
def test_a_loss_below_its_bound_is_never_skipped_in_silence(method):
    """It is not an accident of one batch: the method does not fit the loss."""
    model, optimizer = setup(method, nonfinite="skip")
    with pytest.raises(ValueError, match="`b` should be above"):
        optimizer.backward(with_value(-9.0)(model.losses()))


@over(lambda method: method.observes)
def test_skipping_a_look_that_is_not_finite(method):
    model, optimizer = setup(method, nonfinite="skip")
    optimizer.backward(model.losses())
    optimizer.step()
    before = balance_of(optimizer)
    optimizer.observe({**model.losses(), "b": torch.tensor(math.nan)})
    assert without_counters(balance_of(optimizer)) == without_counters(before)
    train(model, optimizer, [1])


# ---------------------------------------------------------------------- on a device


@over_methods
def test_flags_on_the_device_change_nothing_while_all_is_well(method, monkeypatch):
    twin, other = setup(method)
    train(twin, other, range(4))
    monkeypatch.setattr(screening, "on_host", lambda tensor: False)
    model, optimizer = setup(method)
    train(model, optimizer, range(4))
    assert whole_state(model, optimizer) == whole_state(twin, other)
    assert snapshot(optimizer.log_dict()) == snapshot(other.log_dict())


def faults(method):
    yield with_value(math.nan)
    yield with_value(math.inf)
    if max(method.bounds(NAMES)) > -math.inf:
        yield with_value(-9.0)


@pytest.mark.usefixtures("deferred")
@over_methods
def test_a_faulty_step_is_masked_and_named_at_the_next_look(method):
    for fault in faults(method):
        model, optimizer = setup(method, optimizer=sgd)
        train(model, optimizer, range(3))
        before, weights = balance_of(optimizer), snapshot(model.state_dict())
        optimizer.zero_grad()
        optimizer.backward(fault(model.losses(3)))
        assert not flat_gradient(model).any()
        optimizer.step()
        assert without_counters(balance_of(optimizer)) == without_counters(before)
        assert snapshot(model.state_dict()) == weights
        if method.observes:
            optimizer.observe(model.losses(3))
        with pytest.raises(NonFiniteError, match=r"`b`.*Found 1 steps since the last look"):
            optimizer.log_dict()
        assert optimizer.log_dict()["moo/skipped"] == 0.0


@pytest.mark.usefixtures("deferred")
@over(lambda method: method.gramian and method.make(NAMES).every == 1)
def test_a_faulty_gradient_is_masked_and_named_too(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = balance_of(optimizer)
    take(model, optimizer, 2, with_nan_gradient)
    assert without_counters(balance_of(optimizer)) == without_counters(before)
    assert all(c.item() == 0.0 for c in optimizer.metrics.coefficients.values())
    with pytest.raises(NonFiniteError, match="`b`"):
        optimizer.log_dict()


@pytest.mark.usefixtures("deferred")
@over_methods
def test_skipping_on_a_device_takes_no_step(method):
    model, optimizer = setup(method, nonfinite="skip")
    train(model, optimizer, range(2))
    for count, fault in enumerate(faults(method), start=1):
        before = whole_state(model, optimizer)
        optimizer.zero_grad()
        optimizer.backward(fault(model.losses(2)))
        optimizer.step()
        before["optimizer"]["balance"]["skipped"] = count
        assert whole_state(model, optimizer) == before
        assert optimizer.log_dict()["moo/skipped"] == count
    train(model, optimizer, range(2, 4))


@pytest.mark.usefixtures("deferred")
@over_methods
def test_a_loss_scaler_skips_a_faulty_step(method):
    """Coefficients of NaN reach every gradient, and that is what the scaler looks for."""
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for fault in faults(method):
        before = whole_state(model, optimizer)
        optimizer.zero_grad()
        optimizer.backward(fault(model.losses(2)), grad_scaler=scaler)
        assert all(bool(g.isnan().all()) for g in gradients(model))
        scaler.step(optimizer)
        scaler.update()
        assert whole_state(model, optimizer) == before
        with pytest.raises(NonFiniteError, match="`b`"):
            optimizer.log_dict()


@pytest.mark.usefixtures("deferred")
@over(lambda method: method.gramian and method.make(NAMES).every == 1)
def test_an_overflow_under_a_loss_scaler_is_masked_and_not_reported(method):
    """Scalers grow until that happens; it is no news."""
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(with_nan_gradient(model.losses(2)), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert whole_state(model, optimizer) == before
    assert math.isnan(optimizer.log_dict()["moo/cosine/a,b"])


@pytest.mark.usefixtures("deferred")
@over(lambda method: method.observes)
def test_a_faulty_look_is_masked_and_named(method):
    for fault in faults(method):
        model, optimizer = setup(method)
        optimizer.backward(model.losses())
        optimizer.step()
        before = balance_of(optimizer)
        optimizer.observe(fault(model.losses()))
        after = balance_of(optimizer)
        assert without_counters(after) == without_counters(before)
        assert after["awaiting"] is None
        with pytest.raises(NonFiniteError, match="`b`"):
            optimizer.log_dict()


@pytest.mark.usefixtures("deferred")
@over_some("Sum")
def test_faults_are_counted_until_somebody_looks(method):
    model, optimizer = setup(method)
    for step in range(6):
        take(model, optimizer, step, with_value(math.nan) if step % 2 else dict)
    with pytest.raises(NonFiniteError, match=r"`b`.*Found 3 steps"):
        optimizer.log_dict()
    optimizer.log_dict()


# ---------------------------------------------------------------------- the pieces


def test_figures_are_made_harmless_only_where_a_step_is_masked():
    losses = torch.tensor([math.nan, 2.0], dtype=torch.float64)
    gramian = torch.full((2, 2), math.nan, dtype=torch.float64)
    statistics = Statistics(("a", "b"), losses, gramian)
    bounds = [-math.inf, 3.0]
    masked = screening.sanitized(statistics, bounds, torch.tensor(False))
    assert masked.losses.tolist() == [1.0, 4.0]
    assert torch.equal(masked.gramian, torch.eye(2, dtype=torch.float64))
    kept = screening.sanitized(statistics, bounds, torch.tensor(True))
    assert snapshot(kept.losses) == snapshot(losses)
    assert snapshot(kept.gramian) == snapshot(gramian)


def gradients_of(*squares):
    gramian = torch.diag(torch.tensor(squares))
    return Statistics(("a", "b", "c"), torch.ones(3), gramian)


def test_finite_gradients_are_told_by_one_number():
    assert screening.faulty_gradients(gradients_of(1.0, 0.0, 4.0), scaled=False) is None
    assert screening.faulty_gradients(gradients_of(1.0, 0.0, 4.0), scaled=True) is None


def test_a_sum_of_squares_may_overflow_where_all_gradients_are_finite():
    assert screening.faulty_gradients(gradients_of(3e38, 3e38, 1.0), scaled=False) is None
    assert screening.faulty_gradients(gradients_of(3e38, 3e38, 1.0), scaled=True) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_gradient_that_is_not_finite_is_named_or_flagged(value):
    faulty = gradients_of(1.0, value, 3e38)
    with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
        screening.faulty_gradients(faulty, scaled=False)
    assert screening.faulty_gradients(faulty, scaled=True).tolist() == [False, True, False]


def test_only_the_host_is_free_to_look_at():
    assert screening.on_host(torch.zeros(1))
    assert not screening.on_host(torch.zeros(1, device="meta"))
