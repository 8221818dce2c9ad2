"""`dual_cone` and `project_dual_cone`: equal to SciPy, and conflict with no gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import nnls

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional import _solvers, project_dual_cone
from tests.support.gradients import gramian_of, jacobians, property_test, relative_products


def uniform(rows):
    return torch.ones(len(rows), dtype=rows.dtype)


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_the_projection_conflicts_with_no_gradient(rows):
    coefficients = project_dual_cone(gramian_of(rows), uniform(rows))
    assert bool((coefficients >= 1).all())
    assert float(relative_products(rows, coefficients).min()) >= -1e-10


@property_test
@given(jacobians(), st.integers(0, 1))
def test_the_projection_equals_scipy_on_the_gradients_themselves(rows, index):
    start = torch.eye(len(rows), dtype=torch.float64)[index]
    # What is added is the non-negative combination of gradients closest to minus the direction.
    added, _ = nnls(rows.T.numpy(), -rows[index].numpy())
    torch.testing.assert_close(
        project_dual_cone(gramian_of(rows), start),
        start + torch.from_numpy(added),
        rtol=0,
        atol=1e-9,
    )


@property_test
@given(jacobians())
def test_projecting_twice_changes_nothing(rows):
    gramian = gramian_of(rows)
    once = project_dual_cone(gramian, uniform(rows))
    torch.testing.assert_close(project_dual_cone(gramian, once), once, rtol=0, atol=1e-9)


@property_test
@given(jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_gradients_permutes_the_coefficients(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    start = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    torch.testing.assert_close(
        project_dual_cone(gramian_of(rows[order]), start[order]),
        project_dual_cone(gramian_of(rows), start)[order],
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("count", [16, 64])
def test_many_gradients_are_projected(count):
    rows = torch.randn(
        count, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    coefficients = project_dual_cone(gramian_of(rows), uniform(rows))
    assert float(relative_products(rows, coefficients).min()) >= -1e-12
    assert int((coefficients > 1).sum()) > 0


def test_negative_coefficients_may_rise_to_zero():
    result = project_dual_cone(torch.eye(2), torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(result, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_wide(dtype):
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=dtype)
    result = project_dual_cone(gramian, torch.tensor([1.0, 0.0], dtype=dtype))
    torch.testing.assert_close(result, torch.tensor([1.0, 0.5]))


def test_zero_coefficients_stay_zero():
    torch.testing.assert_close(project_dual_cone(torch.eye(2), torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize(
    ("gramian", "coefficients", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), r"`gramian` should be a square.*\(2, 3\)"),
        (torch.eye(2), torch.ones(3), r"`coefficients` should have shape \(2,\).*\(3,\)"),
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "`coefficients` should be finite.*nan"),
        (torch.eye(3) * 2 - torch.ones(3, 3), torch.ones(3), "positive semidefinite.*-1"),
    ],
)
def test_refuses_bad_input(gramian, coefficients, message):
    with pytest.raises(BalanceValueError, match=message):
        project_dual_cone(gramian, coefficients)


def test_a_wrong_solution_is_never_returned(monkeypatch):
    monkeypatch.setattr(_solvers, "nonnegative_quadratic", lambda matrix, vector: 0.0 * vector)
    with pytest.raises(ConvergenceError, match=r"residual of 1\.000e\+00 for 2 gradients"):
        project_dual_cone(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([1.0, 0.0]))
