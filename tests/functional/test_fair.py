"""`fair_weights`: the defining equation, its limits, and gradients without a solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional import _fair, fair_weights, min_norm_weights, project_dual_cone
from tests.support.gradients import gramian_of, jacobians, property_test, relative_products
from tests.support.statistics import assert_near, normal, vector

ALPHAS = [0.1, 0.5, 1.0, 2.0, 10.0]
over_alphas = pytest.mark.parametrize("alpha", ALPHAS)


def residual(gramian: Tensor, weights: Tensor, alpha: float, preference: Tensor | None = None):
    """Largest error in the defining equation, relative to what its sums cancel."""
    shares = torch.ones_like(weights) if preference is None else preference / preference.mean()
    norms = gramian.diagonal().sqrt()
    wanted = (shares / weights) ** (1 / alpha)
    errors = (gramian @ weights - wanted).abs() / (norms * (norms * weights).sum() + wanted)
    return float(errors.max())


def smallest_combination(rows: Tensor) -> float:
    """Length of the shortest convex combination of the unit gradients."""
    units = rows / rows.norm(dim=1, keepdim=True)
    return float((min_norm_weights(gramian_of(units)) @ units).norm())


@over_alphas
@property_test
@given(rows=jacobians(counts=(1, 8), decades=1.0), seed=st.integers(0, 1000))
def test_the_equation_holds(rows, seed, alpha):
    gramian, preference = gramian_of(rows), normal(len(rows), seed=seed).exp()
    for shares in (None, preference):
        weights = fair_weights(gramian, alpha, shares)
        assert float(weights.min()) > 0.0
        assert residual(gramian, weights, alpha, shares) < 1e-11
        assert float(relative_products(rows, weights).min()) > -1e-13


@property_test
@given(jacobians(counts=(2, 8), decades=6.0))
def test_nash_weights_make_equal_contributions_to_a_length_of_k(rows):
    gramian = gramian_of(rows)
    weights = fair_weights(gramian)
    assert_near(weights * (gramian @ weights), [1.0] * len(rows), 1e-9)
    assert float((weights @ rows).square().sum()) == pytest.approx(len(rows), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@property_test
@given(rows=jacobians(counts=(2, 8), decades=1.0, degenerate=True))
def test_dependent_gradients_have_fair_weights_unless_they_cancel(rows, alpha):
    rows = rows[rows.norm(dim=1) > 0]
    gramian = gramian_of(rows)
    weights = fair_weights(gramian, alpha)
    assert bool(weights.isfinite().all())
    assert float(weights.min()) > 0.0
    if smallest_combination(rows) > 2e-4:
        assert residual(gramian, weights, alpha) < 1e-10
    else:
        assert float(relative_products(rows, weights).min()) > -2e-8


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@property_test
@given(
    rows=jacobians(counts=(2, 6), decades=1.0, degenerate=True),
    random=st.randoms(use_true_random=False),
)
def test_permuting_the_gradients_permutes_the_weights(rows, random, alpha):
    order = random.sample(range(len(rows)), len(rows))
    straight = fair_weights(gramian_of(rows), alpha)
    crossed = fair_weights(gramian_of(rows[order]), alpha)
    torch.testing.assert_close(crossed, straight[order], rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
@property_test
@given(rows=jacobians(counts=(1, 8), decades=5.0, degenerate=True))
def test_all_gramians_have_weights(rows, alpha, dtype):
    """Dependent, opposite and zero gradients, of norms far apart, in narrow dtypes too."""
    rows = rows.to(dtype)
    weights = fair_weights(gramian_of(rows), alpha)
    assert bool(weights.isfinite().all())
    assert torch.equal(weights > 0, rows.norm(dim=1) > 0)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
@property_test
@given(rows=jacobians(counts=(2, 5)), data=st.data())
def test_norms_may_be_far_apart(rows, data, alpha):
    norms = vector(10 ** data.draw(st.floats(-30.0, 30.0)) for _ in rows)
    gramian = gramian_of(rows / rows.norm(dim=1, keepdim=True)) * norms * norms[:, None]
    weights = fair_weights(gramian, alpha)
    assert bool(weights.isfinite().all())
    if alpha < 4:
        assert float(weights.min()) > 0.0
        assert residual(gramian, weights, alpha) < 1e-11


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("factor", [1e-100, 1e-30, 1e30, 1e100])
@pytest.mark.parametrize("count", [2, 3])
def test_a_common_factor_has_the_stated_effect(alpha, factor, count):
    gramian = gramian_of(normal(count, 5, seed=1))
    expected = fair_weights(gramian, alpha) * factor ** (-2 * alpha / (1 + alpha))
    found = fair_weights(gramian * factor * factor, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("cosine", [-1 + 1e-7, -0.99, -0.5, 0.0, 0.7, 1.0])
def test_nash_weights_of_two_have_a_closed_form(cosine):
    norms = vector([3.0, 0.25])
    gramian = vector([1.0, cosine, cosine, 1.0]).reshape(2, 2) * norms * norms[:, None]
    expected = 1 / (norms * (1 + cosine) ** 0.5)
    torch.testing.assert_close(fair_weights(gramian), expected, rtol=1e-8, atol=0.0)


@over_alphas
@pytest.mark.parametrize("shares", [(1.0, 1.0), (5.0, 1.0), (1e-3, 1.0)])
@pytest.mark.parametrize("cosine", [-1.0, -1 + 1e-9, -1 + 1e-6, -0.9, 0.0, 0.9, 1.0])
def test_two_gradients_are_solved_as_many_in_general(cosine, shares, alpha):
    """A third gradient of zero is ignored."""
    norms = vector([2.0, 0.5])
    gramian = vector([1.0, cosine, cosine, 1.0]).reshape(2, 2) * norms * norms[:, None]
    larger = torch.block_diag(gramian, torch.zeros(1, 1).double())
    expected = fair_weights(larger, alpha, vector([*shares, 9.0]))
    assert float(expected[2]) == 0.0
    found = fair_weights(gramian, alpha, vector(shares))
    torch.testing.assert_close(found, expected[:2], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("count", [2, 3])
def test_alpha_leads_from_a_projection_of_the_sum_to_the_min_norm_direction(count):
    for seed in range(10):
        rows = normal(count, 6, seed=seed)
        gramian = gramian_of(rows)
        projection = project_dual_cone(gramian, torch.ones(count))
        for alpha, expected in ((1e-3, projection), (1e3, min_norm_weights(gramian))):
            along, other = fair_weights(gramian, alpha) @ rows, expected @ rows
            assert float(torch.cosine_similarity(along, other, dim=0)) > 1 - 1e-5


def test_it_agrees_with_a_slow_obvious_solver():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(30):
        rows = normal(2 + seed % 5, 12, seed=seed)
        gramian = gramian_of(rows).numpy()
        for alpha in (0.5, 1.0, 2.0):
            # In logarithms, so that it cannot leave the positive weights.
            solution = optimize.root(
                lambda logs: gramian @ np.exp(logs) - np.exp(-logs / alpha),  # noqa: B023
                np.zeros(len(rows)),
                tol=1e-13,
            )
            weights = fair_weights(torch.from_numpy(gramian), alpha)
            assert_near(weights, torch.from_numpy(np.exp(solution.x)), 1e-8)


# ---------------------------------------------------------------------- no solution


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [-2.0, 0.0]],
        [[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]],
    ],
    ids=["opposite", "opposite and a third", "three in a plane"],
)
def test_steps_fade_out_where_gradients_cancel(rows, alpha):
    """The coefficients stay bounded, and what cancels leaves nothing."""
    rows = torch.tensor(rows, dtype=torch.float64)
    weights = fair_weights(gramian_of(rows), alpha)
    lengths = weights * rows.norm(dim=1)
    assert float(lengths.max()) < 1e8 ** (alpha / (1 + alpha)) * 3
    along = weights @ rows
    assert float(along[:1].abs()) <= 1e-8 * float(lengths.max())


@pytest.mark.parametrize("count", [2, 3])
def test_the_way_to_the_stationary_point_is_continuous(count):
    """From 1e-2 to 1e-8 between a gradient and the opposite of another."""
    before = None
    for exponent in torch.linspace(-2.0, -8.0, 121).tolist():
        rows = torch.zeros(count, 3).double()
        rows[0, 0], rows[1, 0], rows[1, 1] = 1.0, -1.0, 10**exponent
        if count == 3:
            rows[2, 2] = 1.0
        weights = fair_weights(gramian_of(rows))
        assert float(weights.max()) <= 1.01e4
        length = float((weights @ rows)[:2].norm())
        assert length <= 2**0.5 * (1 + 1e-6)
        if exponent > -3.5:
            assert length == pytest.approx(2**0.5, rel=1e-6)
        if before is not None:
            assert float((weights / before - 1).abs().max()) < 0.2
        before = weights
    assert length < 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_a_float32_gramian_of_opposite_gradients_is_solved(count):
    rows = normal(count, 1000, seed=5).float()
    rows[1] = -rows[0] * (1 + 1e-6 * normal(1000, seed=6).float())
    weights = fair_weights(gramian_of(rows))
    assert bool(weights.isfinite().all())
    assert weights.dtype == torch.float32


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_zero_gradient_changes_nothing_for_the_others(count, alpha):
    rows = normal(count, 6, seed=3)
    rows[1] = 0.0
    others = [k for k in range(count) if k != 1]
    found = fair_weights(gramian_of(rows), alpha)
    assert float(found[1]) == 0.0
    expected = fair_weights(gramian_of(rows[others]), alpha)
    torch.testing.assert_close(found[others], expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_zero_gradients_only_have_no_weights(count):
    assert not fair_weights(torch.zeros(count, count)).any()


@over_alphas
def test_the_weight_of_a_single_gradient(alpha):
    weights = fair_weights(torch.tensor([[9.0]], dtype=torch.float64), alpha)
    assert float(weights) == pytest.approx(9 ** (-alpha / (1 + alpha)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_narrow_dtypes_are_computed_wide(dtype, count):
    weights = fair_weights(torch.eye(count, dtype=dtype) * 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.full((count,), 0.5))


@pytest.mark.parametrize("count", [2, 3])
def test_weights_beyond_the_range_of_the_dtype_are_finite(count):
    gramian = torch.eye(count) * 1e-44
    assert bool(fair_weights(gramian, 30.0).isfinite().all())


def test_a_loss_that_needs_no_weight_has_next_to_none():
    """A long gradient improves a short one much more than is fair already, for alpha = 10."""
    gramian = vector([1.0, 0.5, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0]).reshape(3, 3)
    norms = vector([1.0, 1e30, 1e-30])
    weights = fair_weights(gramian * norms * norms[:, None], 10.0)
    assert bool(weights.isfinite().all())
    assert float(weights.min()) >= 0.0


@pytest.mark.parametrize(
    ("gramian", "arguments", "message"),
    [
        (torch.ones(2, 3), {}, r"`gramian` should be a square"),
        (torch.full((2, 2), torch.nan), {}, "`gramian` should be finite"),
        (torch.eye(3) * 2 - torch.ones(3, 3), {}, "positive semidefinite"),
        (torch.eye(2), {"alpha": 0.0}, "`alpha` should be positive and finite"),
        (torch.eye(2), {"preference": torch.ones(3)}, r"shape \(2,\).*\(3,\)"),
        (torch.eye(3), {"preference": -torch.ones(3)}, "`preference` should be positive"),
    ],
)
def test_refuses_bad_input(gramian, arguments, message):
    with pytest.raises(BalanceValueError, match=message):
        fair_weights(gramian, **arguments)


def test_a_path_of_ridges_leads_to_the_same_weights(monkeypatch):
    gramian = gramian_of(normal(6, 4, seed=1))
    expected = fair_weights(gramian, 2.0)
    monkeypatch.setattr(_fair, "_STEPS", 5)
    torch.testing.assert_close(fair_weights(gramian, 2.0), expected, rtol=1e-6, atol=0.0)


def test_a_wrong_solution_is_never_returned(monkeypatch):
    monkeypatch.setattr(_fair, "_STEPS", 0)
    with pytest.raises(ConvergenceError, match=r"Found a residual of .* for 3 gradients"):
        fair_weights(gramian_of(normal(3, 4, seed=1)))
