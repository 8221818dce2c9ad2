"""Nonnegative quadratic problems: equal to SciPy, from any start, with the smallest ridge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from moo_balance.errors import BalanceValueError
from moo_balance.functional import _nnls
from moo_balance.functional._nnls import make_definite, nonnegative_quadratic


def systems(count, number=5):
    random = np.random.default_rng(count)
    for _ in range(number):
        system = random.standard_normal((count + 3, count))
        yield system / np.linalg.norm(system, axis=0), random.standard_normal(count + 3)


@pytest.mark.parametrize("exchanges", [0, 6], ids=["active set only", "with exchanges"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
def test_solutions_equal_scipy(count, exchanges, monkeypatch):
    monkeypatch.setattr(_nnls, "_EXCHANGES", exchanges)
    for system, target in systems(count):
        expected, _ = nnls(system, target)
        solution = nonnegative_quadratic(system.T @ system, system.T @ target)
        assert solution == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_starts_that_are_not_optimal_reach_the_optimum(monkeypatch):
    """The active set method from the empty support, without the guess."""
    monkeypatch.setattr(_nnls, "_guess", lambda matrix, vector: np.zeros(len(vector)))
    for system, target in systems(12, number=20):
        expected, _ = nnls(system, target)
        solution = nonnegative_quadratic(system.T @ system, system.T @ target)
        assert solution == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_the_solution_may_be_zero():
    assert nonnegative_quadratic(np.eye(3), -np.ones(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("chosen", [[], [3], [0, 2, 5], [1, 2, 3, 4, 6], list(range(7))])
def test_a_solution_on_a_support_is_zero_elsewhere(chosen):
    (system, _), *_ = systems(7)
    matrix, vector = system.T @ system, np.linspace(-1.0, 2.0, 7)
    support, expected = np.zeros(7, bool), np.zeros(7)
    support[chosen] = True
    expected[chosen] = np.linalg.solve(matrix[np.ix_(chosen, chosen)], vector[chosen])
    assert _nnls._solve_on(support, matrix, vector) == pytest.approx(expected, rel=1e-12)


def test_the_smallest_pivot_is_that_of_cholesky():
    (system, _), *_ = systems(6)
    matrix = system.T @ system
    expected = np.linalg.cholesky(matrix).diagonal().min() ** 2
    assert _nnls._smallest_pivot(matrix) == pytest.approx(expected)
    assert _nnls._smallest_pivot(np.array([[1.0, 2.0], [2.0, 1.0]])) == 0.0


def test_a_definite_matrix_gets_the_smallest_ridge():
    assert make_definite(np.eye(4), 1e-7).ridge == 16 * torch.finfo(torch.float64).eps


def test_the_ridge_grows_to_cover_negative_curvature():
    cosines = np.array([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]])
    before = cosines.copy()
    matrix, ridge, _ = make_definite(cosines, 1e-7)
    assert 1e-7 < ridge < 1e-6
    assert np.linalg.eigvalsh(matrix)[0] > 0
    assert np.array_equal(cosines, before)


def test_an_indefinite_matrix_is_refused_with_its_eigenvalue():
    with pytest.raises(BalanceValueError, match=r"eigenvalue -1\.000e\+00"):
        make_definite(np.array([[1.0, 2.0], [2.0, 1.0]]), 1e-7)
