"""What solvers are compared with: the enumeration, the duality gap, and conflicts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.solvers import KINDS, conflicts, enumeration, gap, slsqp
from moo_balance.functional import min_norm_weights


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 5])
def test_all_exact_solvers_agree_on_a_random_gramian(count):
    rows = KINDS["random"](count, 0)
    expected = min_norm_weights(rows @ rows.T)
    torch.testing.assert_close(enumeration(rows @ rows.T), expected)
    torch.testing.assert_close(slsqp(rows @ rows.T), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_enumeration_has_no_gap(kind):
    rows = KINDS[kind](5, 1)
    weights = enumeration(rows @ rows.T)
    assert weights.sum() == pytest.approx(1.0)
    assert gap(rows @ rows.T, weights) < 1e-6
    assert not conflicts(rows @ rows.T, weights)


def test_the_gap_does_not_depend_on_scale():
    gramian = tensor([1.0, 0.0], [0.0, 3.0])
    assert gap(gramian, tensor(0.75, 0.25)) == pytest.approx(0.0, abs=1e-18)
    assert gap(gramian, tensor(1.0, 0.0)) == pytest.approx(1 / 3**0.5)
    assert gap(1e12 * gramian, tensor(1.0, 0.0)) == pytest.approx(1 / 3**0.5)


def test_a_conflict_is_a_gradient_that_points_away():
    opposed = tensor([1.0, -0.5], [-0.5, 1.0])
    assert conflicts(opposed, tensor(1.0, 0.0))
    assert not conflicts(opposed, tensor(0.5, 0.5))
    vanishing = tensor([1.0, -1.0], [-1.0, 1.0])
    assert not conflicts(vanishing, tensor(0.5, 0.5))
