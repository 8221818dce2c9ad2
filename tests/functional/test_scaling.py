"""Scales of gradients by norms and losses, and the cosines that follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from moo_balance.errors import BalanceValueError
from moo_balance.functional import cosine_similarity, gradient_scales, regularize, scale_gramian
from tests.support.gradients import Operations, gramian_of, jacobians, property_test

LOSSES = torch.tensor([0.5, 2.0, 0.125])
ROWS = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        (None, (1.0, 1.0, 1.0)),
        ("l2", (5.0, 2.0, 0.0)),
        ("loss", (0.5, 2.0, 0.125)),
        ("loss+", (2.5, 4.0, 0.0)),
        ("log", (0.5, 2.0, 0.125)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scales_of_each_normalisation(normalize, expected, dtype):
    result = gradient_scales(LOSSES.to(dtype), gramian_of(ROWS).to(dtype), normalize)
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=wide), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [None, "loss", "log"])
def test_scales_without_norms_need_no_gramian(normalize):
    assert gradient_scales(LOSSES, None, normalize).shape == (3,)


@pytest.mark.parametrize("normalize", ["l2", "loss+"])
def test_scales_with_norms_are_refused_without_a_gramian(normalize):
    with pytest.raises(BalanceValueError, match="`gramian` should be given"):
        gradient_scales(LOSSES, None, normalize)


def test_refuses_an_unknown_name():
    with pytest.raises(BalanceValueError, match=r"`normalize` should be None.*Found 'L2'"):
        gradient_scales(LOSSES, None, "L2")


@property_test
@given(jacobians(decades=3.0))
def test_scaling_the_gramian_is_scaling_the_gradients(rows):
    scales = torch.linspace(0.1, 7.0, len(rows), dtype=torch.float64)
    expected = gramian_of(rows / scales[:, None])
    torch.testing.assert_close(scale_gramian(gramian_of(rows), scales), expected)


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_unit_norms_give_cosines_and_leave_zero_gradients_zero(rows):
    gramian = gramian_of(rows)
    scales = gradient_scales(torch.ones(len(rows)), gramian, "l2")
    result = scale_gramian(gramian, scales)
    nonzero = (scales > 0).to(result.dtype)
    torch.testing.assert_close(result, cosine_similarity(gramian) * nonzero.outer(nonzero))


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_cosines_are_those_of_the_gradients(rows):
    norms = rows.norm(dim=1, keepdim=True)
    expected = gramian_of(rows / torch.where(norms == 0, 1.0, norms)).fill_diagonal_(1.0)
    result = cosine_similarity(gramian_of(rows))
    torch.testing.assert_close(result, expected)
    assert float(result.abs().max()) <= 1.0
    assert torch.equal(result, result.T)


def test_cosines_of_extreme_norms_stay_in_range():
    gramian = torch.tensor([[1e38, -1e37], [-1e37, 1e36]])
    torch.testing.assert_close(cosine_similarity(gramian), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def test_cosines_are_clamped():
    result = cosine_similarity(torch.tensor([[1.0, 1.5], [1.5, 1.0]]))
    torch.testing.assert_close(result, torch.ones(2, 2))


@property_test
@given(jacobians(decades=6.0))
def test_regularisation_commutes_with_scaling(rows):
    scales = torch.linspace(0.1, 7.0, len(rows), dtype=torch.float64)
    gramian = gramian_of(rows)
    torch.testing.assert_close(
        regularize(scale_gramian(gramian, scales), 0.1),
        scale_gramian(regularize(gramian, 0.1), scales),
    )


def test_no_value_is_read():
    # A meta tensor holds no values, so any branch on one would fail.
    gramian, losses = torch.empty(3, 3, device="meta"), torch.empty(3, device="meta")
    assert scale_gramian(gramian, gradient_scales(losses, gramian, "loss+")).shape == (3, 3)
    assert regularize(cosine_similarity(gramian), 0.1).shape == (3, 3)


def test_scaling_takes_few_operations():
    """Each step of a method that normalises passes through here."""
    gramian, losses = torch.eye(3), torch.ones(3)
    with Operations() as operations:
        scale_gramian(gramian, gradient_scales(losses, gramian, "loss+"))
    assert len(operations.names) <= 18


@pytest.mark.parametrize("function", [cosine_similarity, lambda g: scale_gramian(g, torch.ones(2))])
def test_finite_entries_may_overflow_in_sums(function):
    result = function(torch.full((2, 2), 3e38))
    torch.testing.assert_close(result / result[0, 0], torch.ones(2, 2))


@pytest.mark.parametrize("function", [cosine_similarity, lambda g: scale_gramian(g, torch.ones(2))])
def test_refuses_a_matrix_that_is_no_gramian(function):
    with pytest.raises(BalanceValueError, match=r"square.*Found shape \(2, 3\)"):
        function(torch.ones(2, 3))
    with pytest.raises(BalanceValueError, match="finite"):
        function(torch.full((2, 2), float("inf")))
