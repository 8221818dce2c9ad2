"""`equal_projections`: the equation on unit gradients, its two lengths, and dependent gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.functional import equal_projections
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.statistics import assert_near, normal, vector

over_lengths = pytest.mark.parametrize("length", ["config", "imtl_g"])
exponents = st.floats(-140.0, 140.0)


def units(rows: Tensor) -> Tensor:
    """The unit gradients; zero for a zero gradient."""
    return torch.nn.functional.normalize(rows, dim=1, eps=0.0).nan_to_num(nan=0.0)


def by_least_squares(rows: Tensor, preference: Tensor) -> Tensor:
    """The direction of ConFIG, from the gradients themselves."""
    x = torch.linalg.pinv(units(rows), rtol=1e-7) @ preference
    x = x / x.norm()
    return (rows @ x).sum() * x


@over_lengths
@property_test
@given(rows=jacobians(decades=6.0), seed=st.integers(0, 1000))
def test_projections_on_unit_gradients_are_proportional_to_the_preference(rows, seed, length):
    preference = normal(len(rows), seed=seed).exp()
    for wanted in (None, preference):
        direction = equal_projections(gramian_of(rows), wanted, length) @ rows
        ratios = units(rows) @ direction / (1.0 if wanted is None else wanted)
        assert float(ratios.min()) > 0.0
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-6, atol=0.0)


@property_test
@given(jacobians(decades=1.0, degenerate=True), st.integers(0, 1000))
def test_it_is_the_least_squares_solution_on_the_gradients_themselves(rows, seed):
    present = rows[rows.norm(dim=1) > 0]
    preference = normal(len(rows), seed=seed).exp()
    expected = by_least_squares(present, preference[rows.norm(dim=1) > 0])
    direction = equal_projections(gramian_of(rows), preference) @ rows
    scale = float(rows.norm(dim=1).sum())
    assert_near(direction, expected, 1e-6 * scale)


@property_test
@given(jacobians(decades=2.0, degenerate=True))
def test_the_two_lengths_have_one_direction(rows):
    one = equal_projections(gramian_of(rows), length="config")
    other = equal_projections(gramian_of(rows), length="imtl_g")
    ratio = one.abs().sum() / other.abs().sum()
    sign = torch.sign(one.dot(other))
    torch.testing.assert_close(one, sign * ratio * other, rtol=1e-9, atol=1e-12 * float(ratio))


@over_lengths
@property_test
@given(rows=jacobians(decades=2.0, degenerate=True), random=st.randoms(use_true_random=False))
def test_permuting_the_gradients_permutes_the_coefficients(rows, random, length):
    order = random.sample(range(len(rows)), len(rows))
    straight = equal_projections(gramian_of(rows), length=length)
    crossed = equal_projections(gramian_of(rows[order]), length=length)
    torch.testing.assert_close(crossed, straight[order], rtol=1e-7, atol=1e-9)


@over_lengths
@property_test
@given(rows=jacobians(counts=(2, 6), decades=2.0), exponent=exponents)
def test_a_common_factor_does_not_matter(rows, exponent, length):
    gramian = gramian_of(rows)
    scaled = equal_projections(gramian * 10**exponent * 10**exponent, length=length)
    torch.testing.assert_close(
        scaled, equal_projections(gramian, length=length), rtol=1e-9, atol=1e-9
    )


@over_lengths
@property_test
@given(rows=jacobians(counts=(2, 4)), data=st.data())
def test_norms_may_be_far_apart(rows, data, length):
    norms = vector(10 ** data.draw(st.floats(-30.0, 30.0)) for _ in rows)
    gramian = gramian_of(units(rows)) * norms * norms[:, None]
    lengths = equal_projections(gramian, length=length) * norms
    expected = torch.linalg.solve(gramian_of(units(rows)), torch.ones(len(rows)).double())
    assert bool(lengths.isfinite().all())
    torch.testing.assert_close(
        lengths / lengths.norm(), expected / expected.norm(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("preference", [None, (3.0, 1.0)])
@pytest.mark.parametrize("cosine", [-1.0, -1 + 1e-9, -0.9, 0.0, 0.5, 1 - 1e-9, 1.0])
@over_lengths
def test_two_gradients_in_closed_form_are_as_many_in_general(cosine, preference, length):
    """A third gradient of zero is ignored."""
    gramian = torch.tensor([[1.0, 2 * cosine], [2 * cosine, 4.0]], dtype=torch.float64)
    larger = torch.block_diag(gramian, torch.zeros(1, 1, dtype=torch.float64))
    shares = None if preference is None else vector(preference)
    others = None if preference is None else vector([*preference, 7.0])
    found = equal_projections(gramian, shares, length)
    expected = equal_projections(larger, others, length)
    assert float(expected[2]) == 0.0
    torch.testing.assert_close(found, expected[:2], rtol=1e-6, atol=1e-9)


@over_lengths
@pytest.mark.parametrize("third", [(), ((0.0, 1.0),)])
def test_opposite_gradients_leave_no_direction(third, length):
    rows = vector([1.0, 0.0, -3.0, 0.0, *sum(third, ())]).reshape(-1, 2)
    coefficients = equal_projections(gramian_of(rows), length=length)
    assert bool(coefficients.isfinite().all())
    direction = coefficients @ rows
    assert_near(direction[:1], (0.0,), 1e-12)


@over_lengths
def test_a_zero_gradient_changes_nothing_for_the_others(length):
    rows = normal(4, 6, seed=3)
    without = equal_projections(gramian_of(rows), length=length)
    rows = torch.cat([rows[:2], torch.zeros(1, 6).double(), rows[2:]])
    found = equal_projections(gramian_of(rows), length=length)
    assert float(found[2]) == 0.0
    torch.testing.assert_close(found[[0, 1, 3, 4]], without, rtol=1e-12, atol=0.0)


@over_lengths
@pytest.mark.parametrize("count", [1, 2, 3])
def test_zero_gradients_only_have_no_coefficients(count, length):
    assert not equal_projections(torch.zeros(count, count), length=length).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_narrow_dtypes_are_computed_wide(dtype, count):
    gramian = torch.eye(count, dtype=dtype) * 4
    coefficients = equal_projections(gramian)
    assert coefficients.dtype == torch.float32
    torch.testing.assert_close(coefficients, torch.ones(count))


def test_equal_gradients_of_a_narrow_gramian_share_alike():
    rows = normal(3, 1000, seed=1).float()
    rows[1] = rows[0] * (1 + 1e-6)
    coefficients = equal_projections(gramian_of(rows))
    assert float(coefficients.abs().max()) < 10
    torch.testing.assert_close(coefficients[0], coefficients[1], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("gramian", "arguments", "message"),
    [
        (torch.ones(2, 3), {}, r"`gramian` should be a square"),
        (torch.full((2, 2), torch.nan), {}, "`gramian` should be finite"),
        (torch.full((3, 3), torch.inf), {}, "`gramian` should be finite"),
        (torch.eye(2), {"length": "l2"}, "`length` should be one of 'config', 'imtl_g'.*'l2'"),
        (torch.eye(2), {"preference": torch.ones(3)}, r"shape \(2,\).*\(3,\)"),
        (torch.eye(2), {"preference": torch.tensor([1.0, 0.0])}, "positive and finite.*0.0"),
        (torch.eye(2), {"preference": torch.tensor([1.0, torch.nan])}, "positive and finite.*nan"),
    ],
)
def test_refuses_bad_input(gramian, arguments, message):
    with pytest.raises(BalanceValueError, match=message):
        equal_projections(gramian, **arguments)
