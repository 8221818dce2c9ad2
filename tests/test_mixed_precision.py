"""Mixed precision where it meets the rest: windows, closures, and calls in the wrong order."""

from __future__ import annotations

import pytest
import torch
from torch.amp import GradScaler

from moo_balance import BalancedOptimizer, BalanceError
from tests.problems import Overflow, Toy, flat_gradient, setup, snapshot, train, whole_state
from tests.support.registry import NAMES, over, over_methods, over_some

over_kinds = over_some("Sum", "SumLog", "FAMO-lagged", "AnalyticQP", "MGDA-none")


def scaler_at(scale, **arguments):
    return GradScaler("cpu", init_scale=scale, **arguments)


def window(model, optimizer, step, scaler=None, spoil=None):
    """Two micro-batches and a step; `spoil` is the number of one that overflows."""

    def losses(number):
        found = {name: loss / 2 for name, loss in model.losses(2 * step + number).items()}
        return {**found, "b": Overflow.apply(found["b"])} if number == spoil else found

    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(lambda: losses(0), grad_scaler=scaler)
    optimizer.backward(lambda: losses(1), grad_scaler=scaler)
    if scaler is None:
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.capability("gradient accumulation under a GradScaler")
@over_methods
def test_a_scale_changes_nothing_in_a_window(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(2.0**10, growth_interval=1)
    for step in range(3):
        window(model, optimizer, step, scaler)
        window(twin, other, step)
    assert scaler.get_scale() == 2.0**13
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
@pytest.mark.parametrize("spoil", [0, 1])
def test_an_overflow_in_a_window_skips_the_step_and_nothing_else(method, spoil):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(2.0**10)
    window(model, optimizer, 0, scaler)
    window(twin, other, 0)
    before = whole_state(model, optimizer)
    window(model, optimizer, 1, scaler, spoil)
    assert whole_state(model, optimizer) == before
    assert scaler.get_scale() == 2.0**9
    window(model, optimizer, 2, scaler)
    window(twin, other, 2)
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
@pytest.mark.parametrize("scale", [1000.0, 3.0])
def test_a_scale_need_not_be_a_power_of_two(method, scale):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(scale)
    for step in range(3):
        window(model, optimizer, step, scaler)
        window(twin, other, step)
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.capability("autocast with GradScaler")
@over_methods
def test_a_float16_network_is_balanced_like_its_float32_twin(method):
    """Gramians of float16 rows are float32: at this scale their squares are far out of range."""
    model, twin = Toy().float(), Toy().float()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method.make(NAMES))
    other = BalancedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.0), method.make(NAMES))
    scaler = scaler_at(2.0**8)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            losses = model.losses(step)
        optimizer.backward(losses, grad_scaler=scaler)
        other.backward(twin.losses(step))
        for run in (optimizer, other):
            run._balancer.ledger.commit()
            run._balancer.ledger.awaiting = None
        own, expected = optimizer.metrics.as_floats(), other.metrics.as_floats()
        assert own == pytest.approx(expected, rel=0.05, abs=0.02)


# ---------------------------------------------------------------------- calls in the wrong order


def refused(model, optimizer, call, error, message):
    before = whole_state(model, optimizer)
    with pytest.raises(error, match=message):
        call()
    assert whole_state(model, optimizer) == before


def goes_on(model, optimizer):
    """Training is none the worse."""
    train(model, optimizer, range(7, 9))


@over_kinds
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_that_backward_was_not_given(method, unscaled):
    """It would divide gradients by a scale they never had: a step 65536 times too small."""
    model, optimizer = setup(method)
    scaler = scaler_at(2.0**16)
    scaler.scale(torch.ones(()))  # as every scaled loss does
    optimizer.backward(model.losses())
    if unscaled:
        scaler.unscale_(optimizer)
    refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer),
        BalanceError,
        r"should follow `backward\(losses, grad_scaler=scaler\)`",
    )
    goes_on(model, optimizer)


@over_kinds
def test_a_scaler_that_scales_the_combined_loss_itself(method):
    """Then the scale is in the gradient, and the step is right."""
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(2.0**16)
    scaler.scale(optimizer.combined_loss(model.losses())).backward()
    scaler.step(optimizer)
    other.combined_loss(twin.losses()).backward()
    other.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@over_kinds
def test_a_scaler_that_steps_before_backward(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    scaler.scale(torch.ones(()))
    refused(model, optimizer, lambda: scaler.step(optimizer), AssertionError, "No inf checks")
    goes_on(model, optimizer)


@over_kinds
def test_unscaling_twice(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    refused(
        model, optimizer, lambda: scaler.unscale_(optimizer), RuntimeError, "already been called"
    )
    scaler.step(optimizer)
    scaler.update()
    twin, other = setup(method)
    other.backward(twin.losses())
    other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over(lambda method: not method.observes)
def test_a_forgotten_update(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.step(optimizer)
    optimizer.zero_grad()
    optimizer.backward(model.losses(1), grad_scaler=scaler)
    refused(model, optimizer, lambda: scaler.step(optimizer), RuntimeError, "since the last update")
    scaler.update()
    scaler.step(optimizer)
    twin, other = setup(method)
    train(twin, other, range(2))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
def test_a_closure_given_to_a_scaled_step(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer, closure=model.losses),
        RuntimeError,
        "Closure use is not currently supported",
    )
    refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer, model.losses),
        BalanceError,
        "Give the closure to `backward`",
    )
    goes_on(model, optimizer)


@over_kinds
def test_backward_within_a_window_after_unscale_is_refused(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    gradient = snapshot(flat_gradient(model))
    with (
        optimizer.accumulate(),
        pytest.raises(BalanceError, match=r"should come before `scaler.unscale_`"),
    ):
        optimizer.backward(model.losses(1), grad_scaler=scaler)
    assert snapshot(flat_gradient(model)) == gradient


@over_kinds
def test_another_scaler_in_the_same_window(method):
    """The rows of one window are added up: they have to be of one scale."""
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(model.losses(), grad_scaler=scaler_at(1024.0))
    refused(
        model,
        optimizer,
        lambda: optimizer.backward(model.losses(1)),
        BalanceError,
        "one scale",
    )
