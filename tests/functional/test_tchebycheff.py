"""Tchebycheff coefficients are the gradients of their scalarizations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from moo_balance.errors import BalanceValueError
from moo_balance.functional import (
    set_tchebycheff,
    set_tchebycheff_value,
    smooth_tchebycheff,
    smooth_tchebycheff_log,
    smooth_tchebycheff_log_value,
    smooth_tchebycheff_value,
    tchebycheff,
    tchebycheff_value,
)
from tests.support.gradients import property_test

DOUBLE = torch.float64
LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=DOUBLE)
NADIR = torch.tensor([1.0, 4.0, 0.5], dtype=DOUBLE)
THIRDS = torch.full((3,), 1 / 3, dtype=DOUBLE)


def vector(count, low, high):
    entries = st.lists(st.floats(low, high), min_size=count, max_size=count)
    return entries.map(lambda values: torch.tensor(values, dtype=DOUBLE))


@st.composite
def problems(draw):
    """Losses, a preference, an ideal point below the losses and a nadir above it."""
    count = draw(st.integers(1, 6))
    ideal = draw(vector(count, -5.0, 5.0))
    return (
        ideal + draw(vector(count, 0.01, 10.0)),
        draw(vector(count, 0.01, 1.0)),
        ideal,
        ideal + draw(vector(count, 0.1, 10.0)),
    )


smoothing = st.floats(0.01, 10.0)


def assert_gradient(coefficients, value, losses):
    """The coefficients are what autograd makes of the value."""
    losses = losses.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(losses), losses)
    torch.testing.assert_close(coefficients, expected, rtol=1e-9, atol=1e-12)


@property_test
@given(problems(), st.sampled_from([0.0, 0.1]))
def test_tchebycheff_is_the_gradient_of_its_value(problem, augment):
    losses, preference, ideal, _ = problem
    assert_gradient(
        tchebycheff(losses, preference, ideal, augment),
        lambda at: tchebycheff_value(at, preference, ideal, augment),
        losses,
    )


@property_test
@given(problems(), smoothing, st.booleans())
def test_smooth_tchebycheff_is_the_gradient_of_its_value(problem, mu, with_nadir):
    losses, preference, ideal, nadir = problem
    nadir = nadir if with_nadir else None
    assert_gradient(
        smooth_tchebycheff(losses, preference, ideal, nadir, mu),
        lambda at: smooth_tchebycheff_value(at, preference, ideal, nadir, mu),
        losses,
    )


@property_test
@given(problems(), smoothing, st.booleans())
def test_smooth_tchebycheff_log_is_the_gradient_of_its_value(problem, mu, with_nadir):
    above, preference, ideal, nadir = problem
    losses, nadir = above - ideal, nadir - ideal if with_nadir else None
    assert_gradient(
        smooth_tchebycheff_log(losses, preference, nadir, mu),
        lambda at: smooth_tchebycheff_log_value(at, preference, nadir, mu),
        losses,
    )


@property_test
@given(problems(), smoothing, st.integers(1, 4))
def test_set_tchebycheff_is_the_gradient_of_its_value(problem, mu, solutions):
    losses, preference, ideal, _ = problem
    losses = torch.stack([losses.roll(shift) for shift in range(solutions)])
    assert_gradient(
        set_tchebycheff(losses, preference, ideal, mu),
        lambda at: set_tchebycheff_value(at, preference, ideal, mu),
        losses,
    )


@property_test
@given(problems(), smoothing)
def test_smoothing_overestimates_by_at_most_mu_log_k(problem, mu):
    losses, preference, ideal, _ = problem
    hard = float(tchebycheff_value(losses, preference, ideal))
    smooth = float(smooth_tchebycheff_value(losses, preference, ideal, None, mu))
    assert hard - 1e-9 <= smooth <= hard + mu * math.log(len(losses)) + 1e-9


@property_test
@given(problems(), smoothing)
def test_a_set_of_one_is_a_single_solution(problem, mu):
    losses, preference, ideal, _ = problem
    torch.testing.assert_close(
        set_tchebycheff(losses[None], preference, ideal, mu)[0],
        smooth_tchebycheff(losses, preference, ideal, None, mu),
    )


@property_test
@given(problems(), st.integers(2, 4))
def test_equal_solutions_share_the_coefficients_of_one(problem, solutions):
    losses, preference, ideal, _ = problem
    result = set_tchebycheff(losses.expand(solutions, -1), preference, ideal, 0.1)
    assert torch.equal(result, result[:1].expand_as(result))


def test_ties_share_equally():
    result = tchebycheff(torch.tensor([2.0, 1.0, 2.0]), torch.full((3,), 0.5), 0.0)
    torch.testing.assert_close(result, torch.tensor([0.25, 0.0, 0.25]))


def test_the_ideal_point_and_the_preference_decide_which_loss_is_active():
    losses, preference = torch.tensor([3.0, 2.0]), torch.tensor([0.2, 0.8])
    torch.testing.assert_close(tchebycheff(losses, preference, 0.0), torch.tensor([0.0, 0.8]))
    moved = tchebycheff(losses, preference, torch.tensor([0.0, 1.5]), augment=0.5)
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize(
    ("mu", "value", "coefficients"),
    [
        (1.0, 1.426233, (0.094592, 0.155956, 0.082785)),
        (0.1, 0.667514, (0.002227, 0.330519, 0.000587)),
        (0.01, 0.666667, (0.0, 0.333333, 0.0)),
    ],
)
def test_golden_smooth(mu, value, coefficients):
    result = smooth_tchebycheff(LOSSES, THIRDS, 0.0, None, mu)
    expected = torch.tensor(coefficients, dtype=DOUBLE)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    result = float(smooth_tchebycheff_value(LOSSES, THIRDS, 0.0, None, mu))
    assert result == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("mu", "value", "coefficients"),
    [
        (1.0, 0.546965, (2.5, 0.625, 5.0)),
        (0.5, -0.924279, (2.777778, 0.694444, 2.222222)),
        (0.1, None, (2.999843, 0.749961, 0.001573)),
    ],
)
def test_golden_smooth_log(mu, value, coefficients):
    result = smooth_tchebycheff_log(LOSSES, THIRDS, NADIR, mu)
    expected = torch.tensor(coefficients, dtype=DOUBLE)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    if value is not None:
        result = float(smooth_tchebycheff_log_value(LOSSES, THIRDS, NADIR, mu))
        assert result == pytest.approx(value, abs=1e-6)


def test_a_nadir_changes_the_unit_of_each_loss():
    ideal = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
    unit = (LOSSES - ideal) / (NADIR - ideal)
    torch.testing.assert_close(
        smooth_tchebycheff(LOSSES, THIRDS, ideal, NADIR, 0.1) * (NADIR - ideal),
        smooth_tchebycheff(unit, THIRDS, 0.0, None, 0.1),
    )


def test_a_set_counts_each_objective_by_its_best_solution():
    losses = torch.tensor([[0.0, 9.0, 1.0], [9.0, 0.5, 2.0]], dtype=DOUBLE)
    result = set_tchebycheff(losses, torch.ones(3, dtype=DOUBLE), 0.0, 1e-3)
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    value = float(set_tchebycheff_value(losses, torch.ones(3, dtype=DOUBLE), 0.0, 1e-3))
    assert value == pytest.approx(1.0)


HALF = torch.tensor([0.25, 0.75])
CALLS = [
    lambda losses, mu: smooth_tchebycheff(losses, HALF, 0.0, None, mu),
    lambda losses, mu: smooth_tchebycheff_value(losses, HALF, 0.0, None, mu),
    lambda losses, mu: smooth_tchebycheff_log(losses, HALF, None, mu),
    lambda losses, mu: smooth_tchebycheff_log_value(losses, HALF, None, mu),
    lambda losses, mu: set_tchebycheff(losses.expand(2, 2), HALF, 0.0, mu),
    lambda losses, mu: set_tchebycheff_value(losses.expand(2, 2), HALF, 0.0, mu),
]
HARD = [
    lambda losses, mu: tchebycheff(losses, HALF, 0.0),
    lambda losses, mu: tchebycheff_value(losses, HALF, 0.0),
]


@pytest.mark.parametrize("call", CALLS + HARD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(call, dtype):
    losses = torch.tensor([0.5, 2.0])
    result = call(losses.to(dtype), 0.1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, call(losses, 0.1))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mu", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_bad_mu(call, mu):
    with pytest.raises(BalanceValueError, match=f"`mu` should be positive and finite. Found {mu}"):
        call(torch.ones(2), mu)


def test_a_set_needs_one_row_for_each_solution():
    with pytest.raises(BalanceValueError, match=r"`losses` should have shape \[S, K\].*\(2,\)"):
        set_tchebycheff(torch.ones(2), torch.ones(2), 0.0, 0.1)
