"""The baselines against their one-line formulae."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moo_balance import BalancedOptimizer, FixedWeights, Sum, SumLog
from tests.support.statistics import assert_near, names, normal, statistics_of, vector


def test_sum_is_the_gradient_of_the_sum() -> None:
    one, other = (nn.Parameter(vector((1.0, -2.0, 0.5))) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([one], lr=0.1), Sum())
    optimizer.backward({"a": one.square().sum(), "b": one.prod()})
    (other.square().sum() + other.prod()).backward()
    assert torch.equal(one.grad, other.grad)


def test_sum_counts_its_losses() -> None:
    answer = Sum().weights(statistics_of((0.5, 2.0, -1.0)), {})
    assert answer.coefficients.tolist() == answer.weights.tolist() == [1.0, 1.0, 1.0]


def test_fixed_weights_go_by_name_not_by_order() -> None:
    weighting = FixedWeights({"c": -0.5, "a": 1.0, "b": 2.0})
    answer = weighting.weights(statistics_of((0.5, 2.0, 0.1)), {})
    assert answer.coefficients.tolist() == answer.weights.tolist() == [1.0, 2.0, -0.5]


def test_fixed_weights_do_not_follow_a_later_edit_of_the_mapping() -> None:
    values = {"a": 1.0}
    weighting = FixedWeights(values)
    values["a"] = 2.0
    assert weighting.weights(statistics_of((1.0,)), {}).coefficients.tolist() == [1.0]


@pytest.mark.parametrize(("bounds", "shift"), [(0.0, 0.0), (-1.5, 0.25), (0.0, 1.0)])
def test_sum_log_is_the_gradient_of_the_sum_of_logs(bounds: float, shift: float) -> None:
    losses = normal(5).exp().requires_grad_()
    (losses - bounds + shift).log().sum().backward()
    raw = SumLog(bounds, shift, renormalize=False).weights(statistics_of(losses.detach()), {})
    assert_near(raw.coefficients, losses.grad, 1e-15)
    answer = SumLog(bounds, shift).weights(statistics_of(losses.detach()), {})
    assert_near(answer.coefficients, losses.grad / losses.grad.sum(), 1e-15)
    assert_near(answer.weights, (0.2,) * 5, 1e-15)


def test_sum_log_does_not_depend_on_the_unit_of_a_loss() -> None:
    losses, units = normal(3).exp(), vector((1e-6, 1.0, 1e6))
    plain = SumLog(renormalize=False).weights(statistics_of(losses), {}).coefficients
    scaled = SumLog(renormalize=False).weights(statistics_of(losses * units), {}).coefficients
    torch.testing.assert_close(scaled * units, plain, rtol=1e-14, atol=0.0)


def test_sum_log_bounds_by_name() -> None:
    weighting = SumLog(bounds={"a": -1.0, "b": 0.5}, shift={"b": 0.25})
    assert weighting.lower_bounds(names(3)) == [-1.0, 0.25, 0.0]
    answer = weighting.weights(statistics_of((1.0, 1.25, 4.0)), {})
    assert_near(answer.coefficients, vector((0.5, 1.0, 0.25)) / 1.75, 1e-15)
