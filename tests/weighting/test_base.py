"""What all weightings share."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moo_balance import BalanceValueError, FixedWeights
from moo_balance.weighting import GramianWeighting, Statistics
from moo_balance.weighting.base import (
    check_names,
    check_range,
    log_coefficients,
    named_values,
    normalized_preference,
    state_dtype,
    uniform,
)
from tests.support.statistics import CPU, assert_near, drawn, fresh, shown, vector


@dataclass(frozen=True)
class Shares(GramianWeighting):
    """Weight by squared norm; counts how often it was asked to solve."""

    every: int = 1
    solved: list[int] = field(default_factory=list)

    def solve(self, statistics: Statistics, gramian: Tensor) -> Tensor:
        self.solved.append(statistics.step)
        return gramian.diagonal() / gramian.diagonal().sum()

    def coefficients(self, statistics: Statistics, weights: Tensor) -> Tensor:
        return weights * statistics.losses


def test_between_two_refreshes_only_the_coefficients_follow() -> None:
    weighting = Shares(every=3)
    state = fresh(weighting, 2)
    for step, losses in enumerate(drawn(7, 2)):
        scale = torch.diag(vector((1.0 + step, 1.0)))
        answer = weighting.weights(shown(losses, scale if step % 3 == 0 else None, step), state)
        state = answer.state
        last = 1.0 + step - step % 3
        assert_near(answer.weights, (last / (last + 1), 1 / (last + 1)), 1e-15)
        assert_near(answer.coefficients, answer.weights * losses, 1e-15)
    assert weighting.solved == [0, 3, 6]


def test_kept_weights_have_the_precision_of_a_state() -> None:
    weighting = Shares(every=2)
    answer = weighting.weights(shown((1.0, 1.0), torch.eye(2)), fresh(weighting, 2))
    assert answer.state["weights"].dtype == state_dtype(CPU)


def test_nothing_is_kept_where_every_step_refreshes() -> None:
    weighting = Shares()
    assert fresh(weighting, 2) == {}
    assert weighting.weights(shown((1.0, 1.0), torch.eye(2)), {}).state == {}


def test_log_coefficients_are_the_gradient_of_weighted_logs() -> None:
    weights, gaps = torch.softmax(drawn(4), 0), drawn(4, seed=1).exp().requires_grad_()
    (weights * gaps.log()).sum().backward()
    assert_near(log_coefficients(weights, gaps.detach(), renormalize=False), gaps.grad, 1e-15)
    assert_near(log_coefficients(weights, gaps.detach()), gaps.grad / gaps.grad.sum(), 1e-15)


def test_values_by_name_fall_back_to_a_default() -> None:
    assert named_values(0.5, ("a", "b")) == [0.5, 0.5]
    assert named_values({"b": 2}, ("a", "b"), default=1.0) == [1.0, 2.0]


def test_preferences_of_present_losses_sum_to_one() -> None:
    present = Statistics(("a", "c"), torch.ones(2, dtype=torch.float64))
    preference = normalized_preference({"a": 1.0, "b": 5.0, "c": 3.0}, present)
    assert_near(preference, (0.25, 0.75), 1e-15)
    assert_near(normalized_preference(None, present), (0.5, 0.5), 1e-15)


def test_uniform_is_the_centre_in_double_precision() -> None:
    assert uniform(4, CPU).tolist() == [0.25] * 4
    assert uniform(4, CPU).dtype == torch.float64


@pytest.mark.parametrize(("value", "fault"), [({"d": 1.0}, "`d`"), ({"a": 1.0}, "`b`")])
def test_names_that_do_not_fit_are_named(value: dict[str, float], fault: str) -> None:
    with pytest.raises(BalanceValueError, match=f"`preference`.*{fault}"):
        check_names("preference", value, ("a", "b"), complete=True)


def test_the_entry_out_of_range_is_named() -> None:
    weighting = FixedWeights({"a": 1.0, "b": 7.0})
    with pytest.raises(BalanceValueError, match=r"`values\['b'\]` of FixedWeights.*Found 7"):
        check_range(weighting, "values", 0.0, 5.0)
    check_range(weighting, "values", 0.0, 7.0)
    with pytest.raises(BalanceValueError, match=r"\(0, 7\)"):
        check_range(weighting, "values", 0.0, 7.0, open=True)
