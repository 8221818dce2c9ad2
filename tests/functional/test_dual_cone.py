"""`dual_cone` and `project_dual_cone`: equal to SciPy, and conflict with no gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import nnls

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional import _cone, _nnls, project_dual_cone
from tests.support.gradients import gramian_of, jacobians, property_test, relative_products
from tests.support.statistics import normal


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


@property_test
@given(jacobians(decades=2.0, degenerate=True), st.randoms(use_true_random=False))
def test_the_order_of_dependent_gradients_does_not_matter(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    every = torch.eye(len(rows), dtype=torch.float64)
    straight = project_dual_cone(gramian_of(rows), every).sum(0)
    crossed = project_dual_cone(gramian_of(rows[order]), every).sum(0)
    norms = rows.norm(dim=1)
    lengths = straight * norms
    torch.testing.assert_close(
        crossed * norms[order], lengths[order], rtol=1e-7, atol=1e-7 * float(lengths.max())
    )


@property_test
@given(jacobians(decades=5.0, degenerate=True))
def test_float32_gramians_of_dependent_gradients_are_projected(rows):
    rows = rows.float()
    coefficients = project_dual_cone(gramian_of(rows), torch.eye(len(rows))).sum(0)
    assert bool(coefficients.isfinite().all())
    assert float(relative_products(rows.double(), coefficients.double()).min()) >= -1e-4


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_directions_are_projected_together_as_each_by_itself(rows):
    gramian, every = gramian_of(rows), torch.eye(len(rows), dtype=torch.float64)
    together = project_dual_cone(gramian, every)
    for coefficients, start in zip(together, every, strict=True):
        assert float(relative_products(rows, coefficients).min()) >= -1e-10
        by_itself = project_dual_cone(gramian, start)
        lengths = (coefficients - by_itself) * rows.norm(dim=1)
        assert float(lengths.abs().max()) <= 1e-7 * float((by_itself * rows.norm(dim=1)).max())


@pytest.mark.parametrize("exchanges", [0, 12], ids=["row by row", "together"])
@pytest.mark.parametrize("count", [3, 8, 32])
def test_several_projections_equal_scipy(count, exchanges, monkeypatch):
    monkeypatch.setattr(_nnls, "_ROUNDS", exchanges)
    rows = normal(count, count + 3, seed=count)
    found = project_dual_cone(gramian_of(rows), torch.eye(count, dtype=torch.float64))
    for start, coefficients in zip(torch.eye(count).double(), found, strict=True):
        added, _ = nnls(rows.T.numpy(), -(start @ rows).numpy())
        torch.testing.assert_close(
            coefficients, start + torch.from_numpy(added), rtol=1e-8, atol=1e-8
        )


@property_test
@given(st.floats(-1.0, 1.0), st.floats(-12.0, 12.0), st.floats(-3.0, 3.0), st.floats(-3.0, 3.0))
def test_two_gradients_in_closed_form_are_as_many_in_general(cosine, decades, one, other):
    """A third gradient, orthogonal to the two, changes nothing."""
    norms = torch.tensor([10**decades, 1.0], dtype=torch.float64)
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    gramian = gramian * norms * norms[:, None]
    start = torch.tensor([one, other], dtype=torch.float64) / norms
    larger = torch.block_diag(gramian, torch.ones(1, 1, dtype=torch.float64))
    expected = project_dual_cone(larger, torch.cat([start, start.new_zeros(1)]))[:2]
    difference = (project_dual_cone(gramian, start) - expected) * norms
    # Of the square of the length, so that opposite gradients may share a length that is zero.
    unit = gramian / norms / norms[:, None]
    assert float(difference @ unit @ difference) <= 1e-14


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_directions_in_any_layout_is_projected(count):
    gramian = gramian_of(normal(count, 4, seed=1))
    starts = normal(count, 5, seed=2).T  # not contiguous
    expected = [project_dual_cone(gramian, start) for start in starts]
    torch.testing.assert_close(project_dual_cone(gramian, starts), torch.stack(expected))
    assert project_dual_cone(gramian, starts[:0]).shape == (0, count)


@pytest.mark.parametrize("count", [2, 3])
def test_a_zero_gradient_keeps_its_coefficient(count):
    rows = normal(count, 4, seed=1)
    rows[0] = 0.0
    start = -torch.ones(count, dtype=torch.float64)
    assert float(project_dual_cone(gramian_of(rows), start)[0]) == -1.0


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
        (torch.eye(2), torch.ones(2, 1), r"or \(N, 2\)\. Found shape \(2, 1\)"),
        (torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), torch.ones(2), "`gramian` should be fin"),
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "`coefficients` should be finite.*nan"),
        (torch.eye(3) * 2 - torch.ones(3, 3), torch.ones(3), "positive semidefinite.*-1"),
    ],
)
def test_refuses_bad_input(gramian, coefficients, message):
    with pytest.raises(BalanceValueError, match=message):
        project_dual_cone(gramian, coefficients)


def test_a_wrong_solution_is_never_returned(monkeypatch):
    monkeypatch.setattr(_cone, "nonnegative_quadratics", lambda matrix, vector: 0.0 * vector)
    gramian = torch.eye(3)
    gramian[0, 1] = gramian[1, 0] = -0.5
    with pytest.raises(ConvergenceError, match=r"residual of 5\.000e-01 for 3 gradients"):
        project_dual_cone(gramian, torch.tensor([1.0, 0.0, 0.0]))
