from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls

from moo_balance.functional import _nnls


@pytest.mark.parametrize("exchanges", [0, 6], ids=["active set alone", "with exchanges"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
def test_equals_scipy(count, exchanges, monkeypatch):
    monkeypatch.setattr(_nnls, "_EXCHANGES", exchanges)
    generator = torch.Generator().manual_seed(count)
    for _ in range(5):
        system = torch.randn(count + 3, count, generator=generator, dtype=torch.float64)
        system = system / system.norm(dim=0)
        target = torch.randn(count + 3, generator=generator, dtype=torch.float64)
        expected, _ = nnls(system.numpy(), target.numpy())
        found = _nnls.nonnegative_quadratic(system.T @ system, system.T @ target)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


def test_the_solution_may_be_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    found = _nnls.nonnegative_quadratic(torch.eye(3, dtype=torch.float64), zero - 1)
    torch.testing.assert_close(found, zero)


def test_a_matrix_that_is_definite_gets_the_smallest_ridge():
    _, ridge = _nnls.definite(torch.eye(4, dtype=torch.float64), 1e-7)
    assert ridge == 16 * torch.finfo(torch.float64).eps


def test_the_ridge_grows_to_cover_negative_curvature():
    cosines = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    cosines[0, 1] = cosines[1, 0] = 1.0 + 1e-7
    matrix, ridge = _nnls.definite(cosines, 1e-7)
    assert 1e-7 < ridge < 1e-6
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
