from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls

from moo_balance.functional import _nnls
from moo_balance.functional._host import Few, Many

MATRICES = {"few rows": lambda t: Few(t.tolist()), "many rows": lambda t: Many(t.numpy())}
over_matrices = pytest.mark.parametrize("held", MATRICES.values(), ids=MATRICES)


@over_matrices
@pytest.mark.parametrize("exchanges", [0, 6], ids=["active set alone", "with exchanges"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
def test_equals_scipy(count, exchanges, held, monkeypatch):
    monkeypatch.setattr(_nnls, "_EXCHANGES", exchanges)
    generator = torch.Generator().manual_seed(count)
    for _ in range(5):
        system = torch.randn(count + 3, count, generator=generator, dtype=torch.float64)
        system = system / system.norm(dim=0)
        target = torch.randn(count + 3, generator=generator, dtype=torch.float64)
        expected, _ = nnls(system.numpy(), target.numpy())
        found = _nnls.nonnegative_quadratic(held(system.T @ system), (system.T @ target).tolist())
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-7)


@over_matrices
def test_the_solution_may_be_zero(held):
    identity = held(torch.eye(3, dtype=torch.float64))
    assert _nnls.nonnegative_quadratic(identity, [-1.0] * 3) == [0.0] * 3


@over_matrices
def test_a_matrix_that_is_definite_gets_the_smallest_ridge(held):
    ridge = _nnls.definite(held(torch.eye(4, dtype=torch.float64)), 1e-7).ridge
    assert ridge == 16 * torch.finfo(torch.float64).eps


@over_matrices
def test_the_ridge_grows_to_cover_negative_curvature(held):
    cosines = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    cosines[0, 1] = cosines[1, 0] = 1.0 + 1e-7
    matrix, ridge, _ = _nnls.definite(held(cosines), 1e-7)
    assert 1e-7 < ridge < 1e-6
    assert float(torch.linalg.eigvalsh(matrix.tensor())[0]) > 0
