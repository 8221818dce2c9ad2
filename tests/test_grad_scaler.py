"""torch.amp.GradScaler in one process: scaled gradients, unscaled metrics, skipped steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.amp import GradScaler

from moo_balance import BalancedOptimizer, BalanceError, Sum
from tests.support.problems import (
    SmallModel,
    adam,
    as_vector,
    assert_same_parameters,
    change_value,
    flat_gradient,
    setup,
    sgd,
    snapshot,
    spoil_gradient,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over_each_method, over_kinds, over_some

pytestmark = pytest.mark.capability("mixed precision with a GradScaler")


def scaler_at(scale, **arguments):
    return GradScaler("cpu", init_scale=scale, **arguments)


def step_scaled(model, optimizer, scaler, step):
    """One step of the documented loop."""
    optimizer.zero_grad()
    optimizer.backward(model.losses(step), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    if optimizer.weighting.observes_step:
        optimizer.observe(model.losses(step))


def overflow(losses):
    """Finite losses, one of which has an infinite gradient."""
    return spoil_gradient(losses, float("inf"))


def check_scale(method, scale):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(scale)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
        assert snapshot(optimizer.metrics.as_dict()) == snapshot(other.metrics.as_dict())
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_each_method
def test_a_scale_changes_nothing(method):
    """It is a power of two: weights, parameters and balance are the same bits."""
    check_scale(method, 1024.0)


@over_kinds
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scale_of_one_or_of_many_changes_nothing(method, scale):
    check_scale(method, scale)


@over_kinds
def test_gradients_are_written_scaled(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    plain = flat_gradient(model)
    optimizer.zero_grad()
    optimizer.backward(model.losses(), grad_scaler=scaler_at(1024.0))
    assert torch.equal(flat_gradient(model), 1024 * plain)


@over_kinds
def test_a_combined_loss_is_left_to_the_caller_to_scale(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for scale in (1.0, 1024.0):
        scaler = scaler_at(scale)
        optimizer.zero_grad()
        optimizer.backward(model.losses(), grad_scaler=scaler)
        other.zero_grad()
        combined = other.combined_loss(twin.losses(), grad_scaler=scaler)
        scaler.scale(combined).backward()
        torch.testing.assert_close(
            flat_gradient(twin), flat_gradient(model), rtol=1e-12, atol=1e-12
        )
        assert snapshot(other.metrics.as_dict()) == snapshot(optimizer.metrics.as_dict())


@over_kinds
def test_a_step_that_the_scaler_skips_leaves_everything_as_it_was(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(1024.0)
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


@over_kinds
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_nonfinite_loss_lowers_the_scale_as_it_does_without_balancing(method, nonfinite, value):
    model, optimizer = setup(method, nonfinite=nonfinite)
    scaler = scaler_at(1024.0)
    step_scaled(model, optimizer, scaler, 0)
    for count in (1, 2):
        before = whole_state(model, optimizer)
        optimizer.zero_grad()
        optimizer.backward(change_value(model.losses(1), value), grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert whole_state(model, optimizer) == before
        assert scaler.get_scale() == 1024.0 / 2**count
    step_scaled(model, optimizer, scaler, 1)
    assert optimizer.log_dict()["moo/skipped"] == 0


@over_kinds
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_nonfinite_loss_in_a_window_is_left_to_the_scaler(method, nonfinite, spoiled):
    model, optimizer = setup(method, nonfinite=nonfinite)
    scaler = scaler_at(1024.0)
    window(model, optimizer, 0, scaler)
    before = whole_state(model, optimizer)
    first, second = ({**model.losses(k)} for k in (1, 2))
    first, second = (
        change_value(losses, math.inf) if k == spoiled else losses
        for k, losses in enumerate((first, second))
    )
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(first, grad_scaler=scaler)
    optimizer.backward(second, grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert whole_state(model, optimizer) == before
    assert scaler.get_scale() == 512.0
    window(model, optimizer, 2, scaler)


@over_kinds
def test_a_nonfinite_combined_loss_is_left_to_the_scaler(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    before = whole_state(model, optimizer)
    losses = change_value(model.losses(), math.inf)
    scaler.scale(optimizer.combined_loss(losses, grad_scaler=scaler)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert whole_state(model, optimizer) == before
    assert scaler.get_scale() == 512.0


@over_kinds
def test_clipping_between_unscale_and_step(method):
    model, optimizer = setup(method, optimizer=sgd)
    twin, other = setup(method, optimizer=sgd)
    scaler = scaler_at(1024.0)

    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)

    other.backward(twin.losses())
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_some("FAMO-adam")
def test_a_closure_given_to_backward_is_evaluated_again_after_a_scaled_step(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(1024.0)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: model.losses(step), grad_scaler=scaler)  # noqa: B023
        scaler.step(optimizer)
        scaler.update()
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_some("SumLog", "MGDA-none")
def test_a_disabled_scaler_is_none(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = GradScaler("cpu", enabled=False)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_and_foreach_steps_are_those_of_the_plain_optimizer(base, flags):
    """A fused step can unscale by itself; the wrapper must not let that happen twice, or never."""
    model, twin = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(base(model.parameters(), lr=0.01, **flags), Sum())
    plain = base(twin.parameters(), lr=0.01, **flags)
    scaler, other = scaler_at(1024.0), scaler_at(1024.0)
    for step in range(3):
        step_scaled(model, optimizer, scaler, step)
        plain.zero_grad()
        other.scale(sum(twin.losses(step).values())).backward()
        other.step(plain)
        other.update()
    assert_same_parameters(model, twin)


# ---------------------------------------------------------------------- windows


def window(model, optimizer, step, scaler=None, spoil=None):
    """Two micro-batches and a step; `spoil` is the number of one that overflows."""

    def losses(number):
        halves = {name: loss / 2 for name, loss in model.losses(2 * step + number).items()}
        return overflow(halves) if number == spoil else halves

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
@over_each_method
def test_a_scale_changes_nothing_in_a_window(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(2.0**10, growth_interval=1)
    for step in range(3):
        window(model, optimizer, step, scaler)
        window(twin, other, step)
    assert scaler.get_scale() == 2.0**13
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_kinds
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
    assert_same_parameters(model, twin, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- narrow dtypes


@pytest.mark.capability("autocast with GradScaler")
@over_each_method
def test_a_float16_network_is_balanced_like_its_float32_twin(method):
    """Gramians of float16 rows are float32: at this scale their squares are far out of range."""
    model, twin = SmallModel().float(), SmallModel().float()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method.make(NAMES))
    other = BalancedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.0), method.make(NAMES))
    scaler = scaler_at(2.0**6)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            losses = model.losses(step)
        optimizer.zero_grad()
        optimizer.backward(losses, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        other.backward(twin.losses(step))
        other.step()
        if method.observes:
            optimizer.observe(losses)
            other.observe(twin.losses(step))
        own, expected = optimizer.metrics.as_floats(), other.metrics.as_floats()
        assert own == pytest.approx(expected, rel=0.05, abs=0.02)
    assert optimizer.state_dict()["balance"]["steps"] == 3


@over_some("Sum", "MGDA-none", "AnalyticQP", "FAMO-lagged")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_scaler_train_a_float32_model(method, dtype):
    model = SmallModel().float()
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES))
    scaler = scaler_at(1024.0)
    first = as_vector(model.losses()).sum().item()
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            losses = model.losses()
        optimizer.backward(losses, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert as_vector(model.losses()).sum().item() < first
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------------- calls in the wrong order

# None of these checks depends on the method; one of each engine path.
over_two = over_some("SumLog", "AnalyticQP")


def assert_refused(model, optimizer, call, error, message):
    """The call raises and changes nothing."""
    before = whole_state(model, optimizer)
    with pytest.raises(error, match=message):
        call()
    assert whole_state(model, optimizer) == before


def assert_trains_on(method, model, optimizer):
    """The next steps are those of a run to which nothing happened."""
    twin, other = setup(method)
    train(model, optimizer, range(7, 9))
    train(twin, other, range(7, 9))
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


@over_two
def test_scaled_gradients_are_not_stepped_on_directly(method):
    model, optimizer = setup(method)
    optimizer.backward(model.losses(), grad_scaler=scaler_at(1024.0))
    assert_refused(model, optimizer, optimizer.step, BalanceError, r"scaler.step\(optimizer\)")
    assert_trains_on(method, model, optimizer)


@over_two
def test_the_scaler_is_given_the_wrapper_not_the_wrapped(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer.optimizer)
    assert_refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer),
        BalanceError,
        "given the BalancedOptimizer",
    )


@over_two
@pytest.mark.parametrize("within_a_window", [False, True])
def test_backward_after_unscale_is_refused(method, within_a_window):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    gradient = snapshot(flat_gradient(model))

    def backward():
        if within_a_window:
            with optimizer.accumulate():
                optimizer.backward(model.losses(1), grad_scaler=scaler)
        else:
            optimizer.backward(model.losses(1), grad_scaler=scaler)

    with pytest.raises(BalanceError, match=r"should come before `scaler.unscale_`"):
        backward()
    assert snapshot(flat_gradient(model)) == gradient
    scaler.step(optimizer)


@over_two
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_that_backward_was_not_given_is_refused(method, unscaled):
    """It would divide gradients by a scale they never had: a step 65536 times too small."""
    model, optimizer = setup(method)
    scaler = scaler_at(2.0**16)
    scaler.scale(torch.ones(()))  # as every scaled loss does
    optimizer.backward(model.losses())
    if unscaled:
        scaler.unscale_(optimizer)
    assert_refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer),
        BalanceError,
        r"should follow `backward\(losses, grad_scaler=scaler\)`",
    )
    assert_trains_on(method, model, optimizer)


@over_two
def test_a_scaler_may_scale_the_combined_loss_itself(method):
    """Then the scale is in the gradient, and the step is right."""
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = scaler_at(2.0**16)
    scaler.scale(optimizer.combined_loss(model.losses())).backward()
    scaler.step(optimizer)
    other.combined_loss(twin.losses()).backward()
    other.step()
    assert_same_parameters(model, twin)


@over_two
def test_a_scaled_step_before_backward_is_refused(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    scaler.scale(torch.ones(()))
    assert_refused(
        model, optimizer, lambda: scaler.step(optimizer), AssertionError, "No inf checks"
    )
    assert_trains_on(method, model, optimizer)


@over_two
def test_unscaling_twice_is_refused(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.unscale_(optimizer)
    assert_refused(
        model, optimizer, lambda: scaler.unscale_(optimizer), RuntimeError, "already been called"
    )
    scaler.step(optimizer)
    scaler.update()
    twin, other = setup(method)
    train(twin, other, [0])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_two
def test_a_forgotten_update_is_refused(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    scaler.step(optimizer)
    optimizer.zero_grad()
    optimizer.backward(model.losses(1), grad_scaler=scaler)
    assert_refused(
        model, optimizer, lambda: scaler.step(optimizer), RuntimeError, "since the last update"
    )
    scaler.update()
    scaler.step(optimizer)
    twin, other = setup(method)
    train(twin, other, range(2))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_two
def test_a_closure_given_to_a_scaled_step_is_refused(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    optimizer.backward(model.losses(), grad_scaler=scaler)
    assert_refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer, closure=model.losses),
        RuntimeError,
        "Closure use is not currently supported",
    )
    assert_refused(
        model,
        optimizer,
        lambda: scaler.step(optimizer, model.losses),
        BalanceError,
        "Give the closure to `backward`",
    )
    assert_trains_on(method, model, optimizer)


@over_two
def test_another_scaler_in_the_same_window_is_refused(method):
    """The rows of one window are added up: they have to be of one scale."""
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(model.losses(), grad_scaler=scaler_at(1024.0))
    assert_refused(
        model, optimizer, lambda: optimizer.backward(model.losses(1)), BalanceError, "one scale"
    )


@over_some("FAMO-adam")
def test_observe_after_a_combined_loss_whose_step_the_scaler_skipped_does_nothing(method):
    model, optimizer = setup(method)
    scaler = scaler_at(1024.0)
    losses = overflow(model.losses())
    scaler.scale(optimizer.combined_loss(losses, grad_scaler=scaler)).backward()
    scaler.step(optimizer)
    scaler.update()
    before = whole_state(model, optimizer)
    optimizer.observe(model.losses())
    assert whole_state(model, optimizer) == before
