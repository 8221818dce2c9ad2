"""`project_simplex`: equal to bisection, in any dtype, without a synchronization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from moo_balance.errors import BalanceValueError
from moo_balance.functional import project_simplex
from tests.support.gradients import property_test

vectors = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
radii = st.floats(1e-6, 1e6)


def by_bisection(vector, radius):
    """The slow obvious twin: bisect on the threshold."""
    low, high = vector.min() - radius, vector.max()
    for _ in range(200):
        middle = (low + high) / 2
        if float((vector - middle).clamp(min=0).sum()) > radius:
            low = middle
        else:
            high = middle
    return (vector - high).clamp(min=0)


@property_test
@given(vectors, radii)
def test_the_projection_equals_bisection(vector, radius):
    torch.testing.assert_close(
        project_simplex(vector, radius), by_bisection(vector, radius), rtol=1e-9, atol=1e-8
    )


@property_test
@given(vectors, radii)
def test_the_projection_lies_on_the_simplex_and_projecting_twice_changes_nothing(vector, radius):
    once = project_simplex(vector, radius)
    assert bool((once >= 0).all())
    torch.testing.assert_close(once.sum().item(), radius, rtol=1e-9, atol=0)
    torch.testing.assert_close(project_simplex(once, radius), once, rtol=1e-9, atol=1e-9 * radius)


@property_test
@given(vectors, st.integers(-1000, 1000))
def test_a_common_shift_changes_nothing(vector, shift):
    torch.testing.assert_close(
        project_simplex(vector + shift), project_simplex(vector), rtol=0, atol=1e-8
    )


def test_golden_projections():
    result = project_simplex(torch.tensor([[0.6, 0.7, -0.1], [0.2, 0.3, 0.5]]))
    torch.testing.assert_close(result, torch.tensor([[0.45, 0.55, 0.0], [0.2, 0.3, 0.5]]))


@pytest.mark.parametrize("count", [1, 2, 300])
def test_batches_are_projected_one_by_one(count):
    batch = torch.randn(
        2, 3, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    radius = torch.tensor([[0.0, 0.5, 1.0], [2.0, 3.0, 1e-9]], dtype=torch.float64)
    result = project_simplex(batch, radius)
    for index in [(row, column) for row in range(2) for column in range(3)]:
        torch.testing.assert_close(
            result[index], project_simplex(batch[index], float(radius[index]))
        )
    torch.testing.assert_close(result.sum(dim=-1), radius)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    result = project_simplex(torch.tensor([1, 3, 3], dtype=dtype))
    torch.testing.assert_close(result, torch.tensor([0.0, 0.5, 0.5]))


def test_large_entries_lose_no_digits():
    result = project_simplex(torch.tensor([1e6 + 0.25, 1e6], dtype=torch.float32))
    torch.testing.assert_close(result, torch.tensor([0.625, 0.375]))


def test_no_value_is_read():
    # A meta tensor holds no values, so any branch on one would fail.
    assert project_simplex(torch.empty(4, 3, device="meta")).shape == (4, 3)


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_refuses_a_bad_radius(radius):
    with pytest.raises(BalanceValueError, match=f"`radius` should be non-negative.*{radius}"):
        project_simplex(torch.ones(2), radius)


@pytest.mark.parametrize("vector", [torch.tensor(1.0), torch.ones(2, 0)])
def test_refuses_a_tensor_that_is_no_vector(vector):
    with pytest.raises(BalanceValueError, match="`vector` should have a last dimension"):
        project_simplex(vector)
