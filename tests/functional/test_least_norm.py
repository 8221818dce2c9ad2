"""Of all coefficients that give the same direction, the shortest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance.functional import cosine_similarity
from moo_balance.functional._least_norm import least_norm
from tests.support.gradients import gramian_of, jacobians, property_test

EPS = 2.0**-52


def units(rows: Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def start(count: int, seed: int) -> np.ndarray:
    """Multiples, some of which are zero."""
    return np.maximum(np.random.default_rng(seed).normal(size=count), 0.0)


def shortest(rows: Tensor, lengths: np.ndarray) -> np.ndarray:
    cosines = cosine_similarity(gramian_of(rows)).numpy()
    return least_norm(lengths, cosines, np.ones(len(rows), bool), EPS)


@property_test
@given(jacobians(degenerate=True), st.integers(0, 1000))
def test_the_direction_stays_and_the_coefficients_get_no_longer(rows: Tensor, seed: int) -> None:
    rows = rows[rows.norm(dim=1) > 0]
    lengths = start(len(rows), seed)
    found = shortest(rows, lengths)
    assert (found >= 0).all()
    np.testing.assert_allclose(found @ units(rows), lengths @ units(rows), atol=1e-7)
    assert np.linalg.norm(found) <= np.linalg.norm(lengths) * (1 + 1e-9) + 1e-7


@property_test
@given(jacobians(degenerate=True), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_answer_depends_on_the_direction_only(rows: Tensor, seed: int, random: Any) -> None:
    """Not on the order, and not on the coefficients that it was found from."""
    rows = rows[rows.norm(dim=1) > 0]
    found = shortest(rows, start(len(rows), seed))
    order = list(range(len(rows)))
    random.shuffle(order)
    np.testing.assert_allclose(shortest(rows[order], found[order]), found[order], atol=1e-7)


@property_test
@given(jacobians(), st.integers(0, 1000))
def test_independent_gradients_keep_theirs(rows: Tensor, seed: int) -> None:
    lengths = start(len(rows), seed)
    assert (shortest(rows, lengths) == lengths).all()


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_equal_gradients_share(scale: float) -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    found = shortest(rows, scale * np.array([3.0, 0.0, 1.0])) / scale
    np.testing.assert_allclose(found, [1.5, 1.5, 1.0], atol=1e-9)


def test_only_those_that_may_have_a_multiple_get_one() -> None:
    rows = torch.ones(3, 2, dtype=torch.float64)
    cosines = gramian_of(rows).numpy() / 2
    may = np.array([True, False, True])
    found = least_norm(np.array([1.0, 0.0, 0.0]), cosines, may, EPS)
    np.testing.assert_allclose(found, [0.5, 0.0, 0.5], atol=1e-9)
