"""Gradient accumulation: a window of micro-batches is one batch whose losses are their sums."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from moo_balance import BalancedOptimizer, BalanceError, NonFiniteError
from moo_balance.reevaluation import summed
from tests.problems import (
    Toy,
    flat_gradient,
    gradients,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over, over_methods, over_some

MICRO = 3

# One of each kind: known beforehand, by losses, watching the step, by gradients.
over_kinds = over_some("Sum", "SumLog", "FAMO-adam", "AnalyticQP", "MGDA-every")

# Weights that are known beforehand and shared out among the losses that are there.
SHARED_OUT = ("RandomWeights", "OnlineTchebycheff")


def is_known(method):
    """Are the coefficients of a step known before its losses?"""
    weighting = method.make(NAMES)
    return not (weighting.uses_losses or weighting.uses_gramian)


def part(model, number, names=NAMES):
    """A mean over one of several micro-batches counts for its part of the whole."""
    return {name: loss / MICRO for name, loss in model.losses(number, names).items()}


def numbers(step):
    return range(MICRO * step, MICRO * (step + 1))


def by_losses(optimizer, *batches):
    """The documented loop; a method that watches the step is shown the sums by hand."""
    optimizer.zero_grad()
    for batch in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(batch())
    optimizer.backward(batches[-1]())
    optimizer.step()
    if optimizer.weighting.observes_step:
        optimizer.observe(summed(batch() for batch in batches))


def by_closures(optimizer, *batches):
    """The step evaluates all of them again."""
    optimizer.zero_grad()
    for batch in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(batch)
    optimizer.backward(batches[-1])
    optimizer.step()


def at_once(optimizer, *batches):
    """The slow obvious twin: all micro-batches in one graph."""
    optimizer.step(lambda: summed(batch() for batch in batches))


def run(method, form, steps=5, present=lambda number: NAMES, **arguments):
    """Train by windows; in micro-batch `number` only `present(number)` are there."""
    model, optimizer = setup(method, loss_names=NAMES, **arguments)
    for step in range(steps):
        batches = [
            lambda number=number: part(model, number, present(number)) for number in numbers(step)
        ]
        form(optimizer, *batches)
    return model, optimizer


def assert_same_run(found, expected):
    """Equal but for the order in which sums are made."""
    (model, optimizer), (twin, other) = found, expected
    for own, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)
    own, theirs = (run.state_dict()["balance"] for run in (optimizer, other))
    torch.testing.assert_close(own["state"], theirs["state"], rtol=1e-9, atol=1e-12, equal_nan=True)
    assert {**own, "state": None} == {**theirs, "state": None}


@pytest.mark.capability("gradient accumulation")
@over_methods
@pytest.mark.parametrize("form", [by_losses, by_closures], ids=lambda form: form.__name__)
def test_a_window_is_one_big_batch(method, form):
    assert_same_run(run(method, form), run(method, at_once))


@pytest.mark.capability("gradient accumulation")
@over_methods
def test_the_balance_speaks_of_the_whole_window(method):
    _, optimizer = run(method, by_closures, steps=3)
    _, other = run(method, at_once, steps=3)
    assert optimizer.metrics.as_floats() == pytest.approx(other.metrics.as_floats(), rel=1e-6)


@over_methods
def test_a_window_of_one_is_a_step(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    for number in range(3):
        by_closures(optimizer, lambda: model.losses(number))  # noqa: B023
        train(twin, other, [number])
    assert whole_state(model, optimizer) == whole_state(twin, other)


def patterned(method, form, pattern):
    """`pattern` says which losses the first, second and third micro-batch have."""
    return run(method, form, present=lambda number: tuple(pattern[number % MICRO]))


@over_methods
def test_a_loss_that_leaves_early(method):
    pattern = ("abc", "a", "b")
    assert_same_run(patterned(method, by_closures, pattern), patterned(method, at_once, pattern))


@over(lambda method: not method.id.startswith(SHARED_OUT))
def test_a_loss_that_joins_late(method):
    pattern = ("ab", "abc", "ab")
    assert_same_run(patterned(method, by_closures, pattern), patterned(method, at_once, pattern))


@over(lambda method: method.id.startswith(SHARED_OUT))
def test_a_loss_that_joins_late_where_that_changes_what_is_done(method):
    with pytest.raises(BalanceError, match="same losses throughout"):
        patterned(method, by_closures, ("ab", "abc", "ab"))


@over_methods
def test_a_loss_that_a_whole_window_lacks_waits(method):
    def present(number):
        return NAMES if number // MICRO != 2 else ("a", "c")

    assert_same_run(
        run(method, by_closures, present=present), run(method, at_once, present=present)
    )


@over_methods
def test_windows_and_steps_may_alternate(method):
    def either(windowed):
        model, optimizer = setup(method)
        for step in range(4):
            batches = [lambda number=number: part(model, number) for number in numbers(step)]
            if step % 2:
                windowed(optimizer, *batches)
            else:
                train(model, optimizer, [step])
        return model, optimizer

    assert_same_run(either(by_closures), either(at_once))


@over_kinds
def test_nested_windows_are_one(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    with optimizer.accumulate():
        with optimizer.accumulate():
            optimizer.backward(part(model, 0))
        optimizer.backward(part(model, 1))
    optimizer.backward(part(model, 2))
    optimizer.step()
    for number in range(2):
        with other.accumulate():
            other.backward(part(twin, number))
    other.backward(part(twin, 2))
    other.step()
    assert whole_state(model, optimizer) == whole_state(twin, other)


# ---------------------------------------------------------------------- what a window keeps


@over_methods
def test_gradients_show_when_the_window_closes_or_at_once_if_weights_are_known(method):
    """Loss-only methods whose weights do not depend on losses need no memory of their own."""
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
    seen = any(grad is not None for grad in gradients(model))
    window = optimizer._balancer.ledger.accumulation
    assert seen == is_known(method) == (window.gradients is None)


@over(lambda method: not is_known(method))
def test_a_window_keeps_one_gradient_per_loss_and_parameter_that_it_reaches(method):
    """K·P numbers at most, however many micro-batches there are."""
    model, optimizer = setup(method)
    kept = []
    for number in range(3):
        with optimizer.accumulate():
            optimizer.backward(part(model, number))
        rows = optimizer._balancer.ledger.accumulation.gradients.rows
        kept.append(sum(g.numel() for row in rows.values() for g in row if g is not None))
    head = sum(p.numel() for p in model.heads[0].parameters())
    trunk = sum(p.numel() for p in model.trunk.parameters())
    assert kept == [len(NAMES) * (trunk + head)] * 3


@over_methods
def test_graphs_are_freed_micro_batch_by_micro_batch(method):
    model, optimizer = setup(method)
    losses = part(model, 0)
    with optimizer.accumulate():
        optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["a"].backward()


@over_methods
def test_zero_grad_drops_the_window(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 7))
    for net, run_ in ((model, optimizer), (twin, other)):
        batches = [lambda number=number, net=net: part(net, number) for number in range(MICRO)]
        by_closures(run_, *batches)
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
def test_a_window_that_is_open_is_no_part_of_a_checkpoint(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    with optimizer.accumulate():
        optimizer.backward(part(model, 2))
    assert whole_state(model, optimizer) == before
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._balancer.ledger.accumulation is None


# ---------------------------------------------------------------------- what goes wrong within


@over_methods
def test_a_step_that_does_not_close_the_window_is_refused(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    before = whole_state(model, optimizer)
    batches = [lambda number=number: part(model, number) for number in range(2)]
    with optimizer.accumulate():
        optimizer.backward(batches[0])
        with pytest.raises(BalanceError, match="Found it open"):
            optimizer.step()
    with pytest.raises(BalanceError, match=r"Found it open.*outside of `accumulate\(\)`"):
        optimizer.step()
    with pytest.raises(BalanceError, match="should only compute the losses"):
        optimizer.step(batches[1])
    assert whole_state(model, optimizer) == before
    optimizer.backward(batches[1])
    optimizer.step()
    by_closures(other, *(lambda number=number: part(twin, number) for number in range(2)))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
def test_a_window_after_a_backward_that_was_staged_is_not_forgotten(method):
    """The step would take the first and leave the second for the next."""
    model, optimizer = setup(method)
    optimizer.backward(model.losses(0))
    with optimizer.accumulate():
        optimizer.backward(model.losses(1))
    with pytest.raises(BalanceError, match="Found it open"):
        optimizer.step()


def spoiled(losses, kind):
    """Something is wrong with loss "b"."""
    if kind == "nan":
        return {**losses, "b": losses["b"] * math.nan}
    if kind == "detached":
        return {**losses, "b": losses["b"].detach()}
    if kind == "unknown":
        return {**losses, "d": losses["a"] * 1.0}
    return {**losses, "b": losses["b"].expand(2)}


@over_kinds
@pytest.mark.parametrize("kind", ["nan", "detached", "unknown", "shape"])
@pytest.mark.parametrize("closing", [False, True])
def test_an_error_in_a_window_leaves_it_as_it_was(method, kind, closing):
    model, optimizer = setup(method, loss_names=NAMES)
    twin, other = setup(method, loss_names=NAMES)
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 0))
    gradient = snapshot(gradients(model))
    bad = spoiled(part(model, 5), kind)
    window = nullcontext() if closing else optimizer.accumulate()
    with window, pytest.raises(BalanceError, match=r"Loss `[bd]`"):
        optimizer.backward(bad)
    assert snapshot(gradients(model)) == gradient
    with optimizer.accumulate():
        optimizer.backward(lambda: part(model, 1))
    optimizer.backward(lambda: part(model, 2))
    optimizer.step()
    by_closures(other, *(lambda number=number: part(twin, number) for number in range(MICRO)))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_methods
@pytest.mark.parametrize("spoilt", range(MICRO))
def test_a_nan_in_a_window_skips_the_whole_window(method, spoilt):
    model, optimizer = setup(method, nonfinite="skip")
    before = whole_state(model, optimizer)

    def losses(number):
        found = part(model, number)
        return spoiled(found, "nan") if number == spoilt else found

    optimizer.zero_grad()
    for number in range(MICRO - 1):
        with optimizer.accumulate():
            optimizer.backward(lambda: losses(number))  # noqa: B023
    optimizer.backward(lambda: losses(MICRO - 1))
    optimizer.step()
    after = whole_state(model, optimizer)
    assert after["model"] == before["model"]
    assert after["optimizer"]["balance"] == {**before["optimizer"]["balance"], "skipped": 1}

    twin, other = setup(method)
    for net, run_ in ((model, optimizer), (twin, other)):
        train(net, run_, [1])
    assert whole_state(model, optimizer)["model"] == whole_state(twin, other)["model"]


@over(lambda method: method.bounds(NAMES)[0] == 0.0)
def test_a_bound_holds_for_the_window_not_for_each_micro_batch(method):
    """A batch may contribute nothing, or less than nothing, to a sum that is positive."""
    model, optimizer = setup(method)

    def shifted(number, by):
        return {name: loss - loss.detach() + by for name, loss in part(model, number).items()}

    with optimizer.accumulate():
        optimizer.backward(shifted(0, -0.5))
    optimizer.backward(shifted(1, 1.5))
    assert [float(loss) for loss in optimizer.metrics.losses.values()] == pytest.approx([1.0] * 3)
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(shifted(0, 0.5))
    with pytest.raises(BalanceError, match=r"Loss `a` should be above 0.* Found -1\b"):
        optimizer.backward(shifted(1, -1.5))


@over_kinds
def test_combine_in_a_window_is_refused(method):
    model, optimizer = setup(method)
    with optimizer.accumulate(), pytest.raises(BalanceError, match="Found a window"):
        optimizer.combined_loss(part(model, 0))
    with optimizer.accumulate():
        optimizer.backward(part(model, 0))
    with pytest.raises(BalanceError, match="Found a window"):
        optimizer.combined_loss(part(model, 1))


@over_kinds
def test_an_error_of_the_users_own_leaves_accumulate(method):
    _, optimizer = setup(method)
    with pytest.raises(KeyError), optimizer.accumulate():
        raise KeyError
    assert not optimizer._balancer.ledger.accumulating


@over(lambda method: method.observes)
def test_a_window_watched_by_hand_wants_all_its_losses(method):
    model, optimizer = setup(method)
    with optimizer.accumulate():
        optimizer.backward(part(model, 0, ("a", "b")))
    optimizer.backward(part(model, 1, ("a", "c")))
    optimizer.step()
    with pytest.raises(BalanceError, match="losses of the last backward, `a`, `b`, `c`"):
        optimizer.observe(part(model, 1, ("a", "c")))


@over_some("MGDA-none")
def test_a_gradient_that_is_nan_in_a_window_is_named_when_it_closes(method):
    model, optimizer = setup(method, optimizer=sgd)
    losses = part(model, 0)
    losses["b"] = losses["b"] + (losses["b"] * 0.0).sqrt()
    with optimizer.accumulate():
        optimizer.backward(losses)
    with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
        optimizer.backward(part(model, 1))


@over_kinds
def test_narrow_parameters_accumulate_in_their_own_precision(method):
    """As a plain loop does: the rows of a window have the dtype of their parameters."""
    model = Toy().to(torch.bfloat16)
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    by_closures(optimizer, *(lambda number=number: part(model, number) for number in range(MICRO)))
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert bool(flat_gradient(model).isfinite().all())
