"""Projected steps: the host's two ways against the device's."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance.functional import project_simplex
from moo_balance.functional._projected_descent import projected_descent
from tests.support.statistics import normal


def slowly(
    products: Tensor, offset: Tensor, weights: Tensor, lr: float, ridge: float, momentum: float
) -> Tensor:
    velocity = torch.zeros_like(weights)
    for _ in range(7):
        velocity = momentum * velocity + products @ weights + ridge * weights + offset
        weights = project_simplex(weights - lr * velocity)
    return weights


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    lr=st.floats(0.001, 30.0),
    momentum=st.floats(0.0, 0.9),
    ridge=st.floats(0.0, 1.0),
)
def test_the_host_takes_the_steps_of_the_device(seed, count, lr, momentum, ridge):
    draw = normal(count, count, seed=seed)
    products, offset = draw + draw.T, normal(count, seed=seed + 1)
    weights = project_simplex(normal(count, seed=seed + 2))
    before = weights.clone()
    found = projected_descent(
        products, offset, weights, lr, ridge=ridge, momentum=momentum, iterations=7
    )
    expected = slowly(products, offset, weights, lr, ridge, momentum)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(weights, before)
    on_device = projected_descent(
        products,
        offset,
        weights,
        lr,
        ridge=ridge,
        momentum=momentum,
        iterations=7,
        left_out=torch.zeros(count, dtype=torch.bool),
    )
    torch.testing.assert_close(on_device, expected, rtol=1e-9, atol=1e-9)


def test_the_result_has_memory_of_its_own():
    for count in (1, 2, 3):
        weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
        zero = torch.zeros(count, count, dtype=torch.float64)
        found = projected_descent(zero, zero[0], weights, 1.0)
        found += 1.0
        assert weights.tolist() == [1.0 / count] * count
