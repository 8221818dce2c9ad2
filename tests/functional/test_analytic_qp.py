"""`analytic_qp_weights`: the explicit inverse, degenerate gradients, golden weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from moo_balance.errors import BalanceValueError
from moo_balance.functional import analytic_qp_weights, scale_gramian
from tests.support.gradients import Operations, gramian_of, jacobians, property_test

DOUBLE = torch.float64


def rows_of(*rows):
    return torch.tensor(rows, dtype=DOUBLE)


@property_test
@given(jacobians())
def test_weights_equal_the_explicit_inverse(rows):
    gramian = gramian_of(rows)
    numerator = torch.linalg.inv(gramian).sum(dim=1)
    expected = numerator / numerator.sum()
    torch.testing.assert_close(analytic_qp_weights(gramian), expected, rtol=1e-10, atol=1e-10)


@property_test
@given(jacobians(decades=12.0))
def test_over_24_decades_of_norms_every_gradient_is_equally_far_along_the_direction(rows):
    gramian = gramian_of(rows)
    weights = analytic_qp_weights(gramian)
    along = gramian @ weights
    norms = rows.norm(dim=1)
    error = (along - weights @ along) / (norms * (weights.abs() @ norms))
    assert float(error.abs().max()) <= 1e-10


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_weights_of_degenerate_gradients_are_finite_and_sum_to_one(rows):
    weights = analytic_qp_weights(gramian_of(rows))
    assert bool(torch.isfinite(weights).all())
    assert float((weights.sum() - 1).abs()) <= 1e-12 * max(1.0, float(weights.abs().sum()))


@property_test
@given(jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_gradients_permutes_the_weights(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    expected = analytic_qp_weights(gramian_of(rows))[order]
    torch.testing.assert_close(
        analytic_qp_weights(gramian_of(rows[order])), expected, rtol=1e-9, atol=1e-9
    )


@property_test
@given(jacobians(decades=3.0, degenerate=True), st.randoms(use_true_random=False))
def test_permuting_dependent_gradients_permutes_the_weights(rows, random):
    """Of the many weights that are optimal."""
    order = random.sample(range(len(rows)), len(rows))
    gramian = gramian_of(rows)
    weights = analytic_qp_weights(gramian)
    permuted = analytic_qp_weights(gramian[order][:, order])
    scale = max(1.0, float(weights.abs().max()))
    torch.testing.assert_close(permuted / scale, weights[order] / scale, rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_dependent_gradients_of_equal_length_have_weights_in_any_order(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        basis = torch.randn(2, 9, generator=generator, dtype=DOUBLE)
        rows = torch.randn(count, 2, generator=generator, dtype=DOUBLE) @ basis
        gramian = gramian_of(rows / rows.norm(dim=1, keepdim=True)).fill_diagonal_(1.0)
        weights, order = analytic_qp_weights(gramian), torch.randperm(count, generator=generator)
        permuted = analytic_qp_weights(gramian[order][:, order])
        torch.testing.assert_close(permuted, weights[order], rtol=1e-10, atol=1e-10)
        assert float((weights @ gramian @ weights).clamp(min=0.0).sqrt()) <= 1e-6


@property_test
@given(jacobians(), st.integers(-30, 30))
def test_scaling_all_gradients_together_changes_nothing(rows, exponent):
    torch.testing.assert_close(
        analytic_qp_weights(gramian_of(rows) * 10.0**exponent),
        analytic_qp_weights(gramian_of(rows)),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (rows_of((3.0, 4.0)), (1.0,)),
        (rows_of((1.0, 1.0), (3.0, 1.0)), (1.5, -0.5)),
        (rows_of((1.0, 2.0), (1.0, 2.0)), (0.5, 0.5)),
        (rows_of((1.0, 2.0), (2.0, 4.0)), (2.0, -1.0)),
        (rows_of((0.0, 0.0), (2.0, 4.0)), (1.0, 0.0)),
        (rows_of((0.0, 0.0), (0.0, 0.0)), (0.5, 0.5)),
        (rows_of((1.0, 0.0), (0.0, 0.0), (0.0, 0.0)), (0.0, 0.5, 0.5)),
        (rows_of((1.0, 0.0), (1.0, 0.0), (0.0, 1.0)), (0.25, 0.25, 0.5)),
        # Every affine combination of parallel gradients that vanishes is optimal. The limit is the
        # one along the null vector of the cosines.
        (rows_of((1.0, 0.0), (2.0, 0.0), (0.0, 1.0)), (2.0, -1.0, 0.0)),
        (rows_of((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0)), (0.5, 0.5, 0.0)),
    ],
)
def test_weights_of_small_cases(rows, expected):
    weights = analytic_qp_weights(gramian_of(rows))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_golden_weights_of_log_losses():
    rows = rows_of((1.0, 2.0, 0.0, -1.0), (0.0, -1.0, 1.0, 0.5), (-2.0, 0.5, 0.3, 1.0))
    shifted = 1 + torch.tensor((0.5, 2.0, 0.1), dtype=DOUBLE)
    weights = analytic_qp_weights(scale_gramian(gramian_of(rows), shifted))
    torch.testing.assert_close(
        weights, torch.tensor((0.207226, 0.734270, 0.058504), dtype=DOUBLE), rtol=0, atol=1e-6
    )
    projected = torch.softmax(weights, dim=0)
    torch.testing.assert_close(
        projected, torch.tensor((0.281236, 0.476391, 0.242372), dtype=DOUBLE), rtol=0, atol=1e-6
    )
    on_raw = projected / shifted / (projected / shifted).sum()
    torch.testing.assert_close(
        on_raw, torch.tensor((0.330890, 0.280250, 0.388860), dtype=DOUBLE), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_wide(count, dtype):
    gramian = gramian_of(torch.randn(count, 9, generator=torch.Generator().manual_seed(0))).to(
        dtype
    )
    weights = analytic_qp_weights(gramian)
    assert weights.dtype == torch.float32
    # Only the ridge depends on the dtype, and refinement leaves its square.
    tolerance = 1e-6 + (64 * count * torch.finfo(dtype).eps / 0.2) ** 2
    expected = analytic_qp_weights(gramian.double()).float()
    torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_value_is_read(count):
    # A meta tensor holds no values, so any branch on one would fail.
    assert analytic_qp_weights(torch.empty(count, count, device="meta")).shape == (count,)


def test_the_solution_takes_few_operations():
    gramian = torch.eye(3)
    with Operations() as operations:
        analytic_qp_weights(gramian)
    assert len(operations.names) <= 45


def test_refuses_a_matrix_that_is_no_gramian():
    with pytest.raises(BalanceValueError, match=r"square.*Found shape \(2, 3\)"):
        analytic_qp_weights(torch.ones(2, 3))
