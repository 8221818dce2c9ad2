"""A loss may be absent: the others are balanced among themselves, and its own state is kept."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moo_balance import IMTLG, BalanceValueError, GradientNorms, LearningRateAnnealing
from moo_balance.weighting import GramianWeighting
from moo_balance.weighting._reduction import ReductionWeighting
from tests.support.problems import (
    as_vector,
    flat_gradient,
    jacobian,
    setup,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import (
    FIRST_OF_EACH,
    NAMES,
    over_each_method,
    over_kinds,
    over_some,
)

pytestmark = pytest.mark.capability("losses that are absent from a batch")

SUBSETS = [("b",), ("a", "c")]


def state_of(balance, name):
    """The part of a saved state that belongs to one loss, bit by bit."""
    position = balance["names"].index(name)
    return snapshot({key: value[position] for key, value in balance["state"].items() if value.ndim})


# One of each kind, and one of each kind of state.
@over_some(
    "SumLog",
    "FAMO-lagged",
    "FAMO-adam",
    "BalancedTrajectory-defaults",
    "MGDA-every",
    "Tchebycheff-running",
    "SmoothTchebycheff-warm-up",
    "OnlineTchebycheff",
    "MovingAverage-MGDA",
    "MovingAverage-FAMO",
)
@pytest.mark.parametrize("present", SUBSETS, ids="".join)
def test_the_state_of_an_absent_loss_is_kept(method, present):
    model, optimizer = setup(method)
    train(model, optimizer, range(4))
    before = optimizer.state_dict()["balance"]
    train(model, optimizer, range(4, 8), present)
    after = optimizer.state_dict()["balance"]
    assert tuple(optimizer.metrics.names) == present
    assert after["names"] == list(NAMES)
    for name in set(NAMES) - set(present):
        assert state_of(after, name) == state_of(before, name)


@over_kinds
def test_losses_may_leave_and_return(method):
    """The three are balanced again, and finite, whatever happened in between."""
    model, optimizer = setup(method)
    for names in (NAMES, ("a",), NAMES, ("b", "c"), ("c",), NAMES):
        train(model, optimizer, [0, 1], names)
        coefficients = optimizer.metrics.coefficients
        assert tuple(coefficients) == names
        total = as_vector(coefficients).sum()
        assert bool(total.isfinite())
        assert method.negative or float(total) > 0


@over_each_method
def test_present_losses_are_balanced_among_themselves(method):
    """A loss that was declared and never seen changes nothing."""
    model, optimizer = setup(method, loss_names=NAMES)
    twin, other = setup(method, of=("a", "b"))
    for step in range(6):
        train(model, optimizer, [step], ("a", "b"))
        train(twin, other, [step], ("a", "b"))
        for kind in ("weights", "coefficients"):
            actual = as_vector(getattr(optimizer.metrics, kind))
            expected = as_vector(getattr(other.metrics, kind))
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


@over_each_method
def test_coefficients_of_present_losses_keep_sum_and_sign(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(3))
    for step, present in enumerate(SUBSETS, start=3):
        train(model, optimizer, [step], present)
        coefficients = as_vector(optimizer.metrics.coefficients)
        assert method.negative or bool((coefficients >= 0).all())
        if method.total is not None:
            losses = as_vector(optimizer.metrics.losses)
            total = coefficients.sum().item()
            assert total == pytest.approx(method.total(present, losses), rel=1e-9)


@over_kinds
def test_the_gradient_is_that_of_the_present_losses(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    losses = model.losses(2, ("a", "c"))
    rows = jacobian(losses, list(model.parameters()))
    optimizer.backward(losses)
    coefficients = as_vector(optimizer.metrics.coefficients)
    torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)
    absent_head = model.heads[1]
    assert all(p.grad is None for p in absent_head.parameters())


@over_each_method
@settings(max_examples=2)
@given(pattern=st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=3, max_size=6))
def test_no_pattern_of_absence_breaks_a_run(method, pattern):
    model, optimizer = setup(method, loss_names=NAMES)
    for step, present in enumerate(pattern):
        train(model, optimizer, [step], sorted(present))
        figures = as_vector(optimizer.metrics.coefficients)
        assert bool(figures.isfinite().all())
    twin, other = setup(method)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, run in ((model, optimizer), (twin, other)):
        train(net, run, range(2))
    assert whole_state(twin, other) == whole_state(model, optimizer)


@over_some("FAMO-adam", "FAMO-every")
def test_the_losses_after_a_step_should_be_those_before_it(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    while not optimizer.state_dict()["balance"]["awaiting"]:
        optimizer.zero_grad()
        optimizer.backward(model.losses(1, ("a", "c")))
        optimizer.step()
    for others in (NAMES, ("a",), ("a", "b")):
        with pytest.raises(BalanceValueError, match="last backward, `a`, `c`"):
            optimizer.observe(model.losses(1, others))
    optimizer.observe(model.losses(1, ("a", "c")))


@over_kinds
def test_names_can_be_declared_before_they_are_seen(method):
    model, optimizer = setup(method, loss_names=NAMES)
    train(model, optimizer, [0], ("c",))
    train(model, optimizer, [1], NAMES[::-1])
    assert optimizer.state_dict()["balance"]["names"] == list(NAMES)
    assert tuple(optimizer.metrics.names) == NAMES


@over_some("Sum")
def test_a_loss_that_was_never_declared_is_refused(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0], ("a", "b"))
    with pytest.raises(BalanceValueError, match=r"`c` is none of the declared ones, `a`, `b`\."):
        optimizer.backward(model.losses(1))


@over_some("MGDA-every", "AnalyticQP-every")
def test_kept_weights_of_present_losses_may_all_be_zero(method):
    """Between two refreshes, where the absent loss had all the weight."""
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    saved["balance"]["state"]["weights"] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer.load_state_dict(saved)
    optimizer.backward(model.losses(1, ("a", "b")))
    assert as_vector(optimizer.metrics.weights).tolist() == [0.5, 0.5]
    assert bool(as_vector(optimizer.metrics.coefficients).isfinite().all())


@over_kinds
def test_parameters_that_only_an_absent_loss_reaches_stay_as_they_are(method):
    model, optimizer = setup(method, loss_names=NAMES)
    before = snapshot(model.heads[2].state_dict())
    train(model, optimizer, range(3), ("a", "b"))
    assert snapshot(model.heads[2].state_dict()) == before


# ---------------------------------------------------------------------- between two refreshes


def refreshed_rarely():
    """Each Gramian method that can keep its weights, with an `every` of 3."""
    for method in FIRST_OF_EACH:
        weighting = method.make(NAMES)
        fields = {field.name for field in dataclasses.fields(weighting)}
        if isinstance(weighting, GramianWeighting) and "every" in fields:
            rarely = dataclasses.replace(weighting, every=3)
            yield dataclasses.replace(method, make=lambda names, rarely=rarely: rarely)


over_kept = pytest.mark.parametrize("method", list(refreshed_rarely()), ids=repr)


def play_standing(method, *presences):
    """The coefficients of steps on the same batch, with a learning rate of 0."""
    model, optimizer = setup(method, optimizer=standing, loss_names=NAMES)
    for present in presences:
        train(model, optimizer, [0], present)
        yield as_vector(optimizer.metrics.coefficients)


def standing(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


@over_kept
def test_a_loss_that_returns_finds_its_kept_weight(method):
    *_, straight = play_standing(method, NAMES, NAMES, NAMES)
    for present in SUBSETS:
        *_, actual = play_standing(method, NAMES, present, NAMES)
        torch.testing.assert_close(actual, straight, rtol=1e-12, atol=0.0)


@over_kept
def test_kept_weights_make_up_for_an_absent_loss(method):
    weighting, present = method.make(NAMES), ("a", "c")
    before, actual = play_standing(method, NAMES, present)
    if method.total is not None:
        assert float(actual.sum()) == pytest.approx(method.total(present, actual))
    elif isinstance(weighting, IMTLG):
        assert float(actual.sum()) == pytest.approx(1.0)
    elif isinstance(weighting, ReductionWeighting):
        shares, others = (weighting.shares(names) for names in (NAMES, present))
        expected = before[[0, 2]] / shares[0] * others[0]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)


@over_kept
def test_a_loss_that_no_solution_has_had_gets_no_weight_of_its_own(method):
    """Its share where weights are shares, else zero: its scale is not known."""
    weighting = method.make(NAMES)
    *_, actual = play_standing(method, ("a", "b"), NAMES)
    if isinstance(weighting, ReductionWeighting):
        assert float(actual[2]) == weighting.shares(NAMES)[2]
    elif method.total is None and not isinstance(weighting, GradientNorms | LearningRateAnnealing):
        assert float(actual[2]) == 0.0
