"""Mixed precision in one process: scaled gradients, unscaled figures, skipped steps."""

from __future__ import annotations

import pytest
import torch

from moo_balance import BalancedOptimizer, BalanceError, Sum
from tests.problems import (
    Overflow,
    Toy,
    adam,
    flat_gradient,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over, over_methods, over_some

pytestmark = pytest.mark.capability("mixed precision with a GradScaler")

SCALES = [1.0, 1024.0, 65536.0]


def grad_scaler(scale, **arguments):
    return torch.amp.GradScaler("cpu", init_scale=scale, **arguments)


def step_scaled(model, optimizer, scaler, step, spoil=None):
    """One step of the documented loop; `spoil` does something to the losses."""
    optimizer.zero_grad()
    losses = model.losses(step)
    optimizer.backward(losses if spoil is None else spoil(losses), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    if optimizer.weighting.observes_step:
        optimizer.observe(model.losses(step))


def overflow(losses):
    """Finite losses, of which one has a gradient that is not."""
    return {**losses, "b": Overflow.apply(losses["b"])}


@over_methods
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_changes_nothing_at_all(method, scale):
    """It is a power of two: weights, parameters and balance are the same bits."""
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = grad_scaler(scale)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
        assert snapshot(optimizer.metrics.as_dict()) == snapshot(other.metrics.as_dict())
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
def test_gradients_are_written_scaled(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    plain = flat_gradient(model)
    optimizer.zero_grad()
    optimizer.backward(model.losses(), grad_scaler=grad_scaler(1024.0))
    assert torch.equal(flat_gradient(model), 1024 * plain)


@over_methods
def test_combine_is_scaled_by_whoever_calls_backward(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for scale in (1.0, 1024.0):
        scaler = grad_scaler(scale)
        optimizer.zero_grad()
        optimizer.backward(model.losses(), grad_scaler=scaler)
        other.zero_grad()
        combined = other.combined_loss(twin.losses(), grad_scaler=scaler)
        scaler.scale(combined).backward()
        torch.testing.assert_close(
            flat_gradient(twin), flat_gradient(model), rtol=1e-12, atol=1e-12
        )
        assert snapshot(other.metrics.as_dict()) == snapshot(optimizer.metrics.as_dict())


@over_methods
def test_a_step_that_the_scaler_skips_leaves_everything_as_it_was(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = grad_scaler(1024.0)
    for step in range(2):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
    before = whole_state(model, optimizer)

    optimizer.zero_grad()
    optimizer.backward(overflow(model.losses(2)), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert whole_state(model, optimizer) == before
    assert scaler.get_scale() == 512.0
    assert set(optimizer.log_dict()) >= {"moo/loss/b", "moo/skipped"}

    for step in range(2, 4):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
def test_clipping_between_unscale_and_step(method):
    model, optimizer = setup(method, optimizer=sgd)
    twin, other = setup(method, optimizer=sgd)
    scaler = grad_scaler(1024.0)

    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)

    other.backward(twin.losses())
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over(lambda method: method.observes)
def test_a_closure_given_to_backward_is_seen_again_after_a_scaled_step(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = grad_scaler(1024.0)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: model.losses(step), grad_scaler=scaler)  # noqa: B023
        scaler.step(optimizer)
        scaler.update()
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_some("Sum", "FAMO-lagged", "MGDA-none")
def test_a_disabled_scaler_is_none(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_and_foreach_steps_are_those_of_the_plain_optimizer(base, flags):
    """A fused step can unscale by itself; the wrapper must not let that happen twice, or never."""
    model, twin = Toy(), Toy()
    optimizer = BalancedOptimizer(base(model.parameters(), lr=0.01, **flags), Sum())
    plain = base(twin.parameters(), lr=0.01, **flags)
    scaler, other = grad_scaler(1024.0), grad_scaler(1024.0)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        plain.zero_grad()
        other.scale(sum(twin.losses(step).values())).backward()
        other.step(plain)
        other.update()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def total(model):
    return sum(loss.item() for loss in model.losses().values())


@over_some("Sum", "MGDA-none", "AnalyticQP", "FAMO-lagged")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_scaler_train_a_float32_model(method, dtype):
    model = Toy().float()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    scaler = grad_scaler(1024.0)
    first = total(model)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            losses = model.losses()
        optimizer.backward(losses, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert total(model) < first
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------------- calls out of turn


@over_some("Sum", "MGDA-none")
def test_scaled_gradients_are_not_stepped_on_directly(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)
    optimizer.backward(model.losses(), grad_scaler=grad_scaler(1024.0))
    with pytest.raises(BalanceError, match=r"scaler.step\(optimizer\)"):
        optimizer.step()
    assert whole_state(model, optimizer) == before


@over_some("Sum", "MGDA-none")
def test_the_scaler_is_given_the_wrapper_not_the_wrapped(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)
    scaler = grad_scaler(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer.optimizer)
    with pytest.raises(BalanceError, match="given the BalancedOptimizer"):
        scaler.step(optimizer)
    assert whole_state(model, optimizer) == before


@over_some("Sum", "MGDA-none")
def test_backward_after_unscale_is_refused(method):
    model, optimizer = setup(method)
    scaler = grad_scaler(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    grads = snapshot(flat_gradient(model))
    with pytest.raises(BalanceError, match=r"before `scaler.unscale_`"):
        optimizer.backward(model.losses(1), grad_scaler=scaler)
    assert snapshot(flat_gradient(model)) == grads
    scaler.step(optimizer)
