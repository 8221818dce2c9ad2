"""The checks and conversions of arguments that methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from moo_balance import (
    FAMO,
    BalanceValueError,
    FixedWeights,
    GradDrop,
    MovingAverage,
    RandomWeights,
    ReLoBRaLo,
    SumLog,
    Tchebycheff,
)
from moo_balance.weighting import Statistics, Weighting
from moo_balance.weighting._arguments import (
    broadcastable,
    check_choice,
    check_names,
    check_preference,
    check_range,
    check_whole,
    constant_state,
    log_coefficients,
    lower_limits,
    normalize_preference,
    renormalize,
    shifted_losses,
    values_by_name,
)
from tests.support.statistics import CPU, assert_near, normal, statistics_of, vector


def test_a_constant_state_has_double_precision() -> None:
    assert constant_state(0.25, 4, CPU).tolist() == [0.25] * 4
    assert constant_state(0.25, 4, CPU).dtype == torch.float64


def test_values_by_name_are_zero_where_a_name_is_missing() -> None:
    assert values_by_name(0.5, ("a", "b")) == [0.5, 0.5]
    assert values_by_name({"b": 2}, ("a", "b")) == [0.0, 2.0]


def test_an_argument_broadcasts_against_the_losses_in_their_dtype() -> None:
    statistics = Statistics(("a", "b"), torch.ones(2))
    assert broadcastable(3, statistics) == 3.0
    by_name = broadcastable({"b": 2.0}, statistics)
    assert by_name.tolist() == [0.0, 2.0]
    assert by_name.dtype == torch.float32


def test_shifted_losses_are_positive_above_the_lower_limits() -> None:
    bounds, shift = {"a": -1.0, "b": 0.5}, 0.25
    limits = lower_limits(bounds, shift, ("a", "b", "c"))
    assert limits == [-1.25, 0.25, -0.25]
    assert_near(shifted_losses(bounds, shift, statistics_of(limits)), (0.0, 0.0, 0.0), 1e-15)


def test_a_lower_limit_of_zero_has_no_sign() -> None:
    (limit,) = lower_limits(0.0, 0.0, ("a",))
    assert str(limit) == "0.0"


def test_log_coefficients_are_the_gradient_of_weighted_logs() -> None:
    weights, distances = torch.softmax(normal(4), 0), normal(4, seed=1).exp().requires_grad_()
    (weights * distances.log()).sum().backward()
    gradient = distances.grad
    assert gradient is not None
    plain = log_coefficients(weights, distances.detach(), renormalize=False)
    assert_near(plain, gradient, 1e-15)
    assert_near(log_coefficients(weights, distances.detach()), gradient / gradient.sum(), 1e-15)


def test_preferences_of_present_losses_sum_to_one() -> None:
    present = Statistics(("a", "c"), torch.ones(2, dtype=torch.float64))
    preference = normalize_preference({"a": 1.0, "b": 5.0, "c": 3.0}, present)
    assert_near(preference, (0.25, 0.75), 1e-15)
    assert_near(normalize_preference(None, present), (0.5, 0.5), 1e-15)


def test_weights_are_renormalized_and_equal_where_all_were_zero() -> None:
    assert_near(renormalize(vector((0.1, 0.3))), (0.25, 0.75), 1e-15)
    assert_near(renormalize(vector((0.0, 0.0))), (0.5, 0.5), 1e-15)


@pytest.mark.parametrize(("value", "fault"), [({"d": 1.0}, "`d`"), ({"a": 1.0}, "`b`")])
def test_names_that_do_not_fit_are_named(value: dict[str, float], fault: str) -> None:
    with pytest.raises(BalanceValueError, match=f"`preference`.*{fault}"):
        check_names("preference", value, ("a", "b"), complete=True)


def test_the_entry_out_of_range_is_named() -> None:
    weighting = FixedWeights({"a": 1.0, "b": 7.0})
    with pytest.raises(BalanceValueError, match=r"`values\['b'\]` of FixedWeights.*Found 7"):
        check_range(weighting, "values", 0.0, 5.0, named=True)
    check_range(weighting, "values", 1.0, 7.5, named=True)
    with pytest.raises(BalanceValueError, match=r"finite number, above 1\. Found 1"):
        check_range(weighting, "values", 1.0, open=True, named=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedWeights({"a": math.inf}), "should be a finite number. Found inf"),
        (lambda: FAMO(decay=-1.0), "should be a finite number, at least 0. Found -1"),
        (lambda: FAMO(lr=0.0), "should be a finite number, above 0. Found 0"),
        (lambda: MovingAverage(FAMO(), beta=2), ", at least 0 and below 1, or 'adaptive'. Found 2"),
        (lambda: MovingAverage(FAMO(), beta="no"), "below 1, or 'adaptive'. Found 'no'"),
        (lambda: Tchebycheff(ideal="worst"), "finite number, or 'running'. Found 'worst'"),
        (lambda: FixedWeights([1.0, 2.0]), r"map each loss's name to a finite.* Found \[1.0, 2.0"),
        (lambda: FixedWeights(1.0), "map each loss's name to a finite number. Found 1.0"),
        (lambda: Tchebycheff([1.0]), "`preference` of Tchebycheff should map each loss's name"),
    ],
)
def test_the_range_is_said_in_words(make: Callable[[], Weighting], message: str) -> None:
    with pytest.raises(BalanceValueError, match=message):
        make()
    MovingAverage(FAMO(), beta=math.nextafter(1.0, 0.0))
    with pytest.raises(BalanceValueError, match="below 1"):
        MovingAverage(FAMO(), beta=1.0)


def test_a_choice_that_is_not_offered_is_refused() -> None:
    with pytest.raises(BalanceValueError, match=r"`bounds` of SumLog.*one of 1, None. Found 0"):
        check_choice(SumLog(), "bounds", (1, None))


@dataclass(frozen=True)
class Holder(SumLog):
    count: object = 1


@pytest.mark.parametrize("value", [0, 1.5, "2", None])
def test_a_number_that_is_not_whole_or_too_small_is_refused(value: object) -> None:
    with pytest.raises(BalanceValueError, match=r"`count` of Holder.*at least 1. Found"):
        check_whole(Holder(count=value), "count", 1)
    check_whole(RandomWeights(seed=0), "seed", 0)


def test_a_preference_is_positive_or_left_out() -> None:
    check_preference(Tchebycheff())
    check_preference(SumLog())
    with pytest.raises(BalanceValueError, match=r"`preference\['a'\]`.*number, above 0. Found 0"):
        Tchebycheff(preference={"a": 0.0})


def test_a_refusal_states_a_range_that_includes_its_end() -> None:
    with pytest.raises(BalanceValueError, match=r"at least 0 and at most 1\. Found 1\.5"):
        GradDrop(leak=1.5)
    assert GradDrop(leak=1.0).leak == ReLoBRaLo(lookback=1.0).lookback == 1.0
