"""TrimmedMean against TorchJD, and where losses do not reach a parameter."""

from __future__ import annotations

import pytest
import torch

from moo_balance import BalancedOptimizer, TrimmedMean
from tests.support.problems import SmallModel, jacobian, sgd


def combine(rows, trim):
    return TrimmedMean(trim).combine(list(rows), lambda: torch.zeros(0))


@pytest.mark.parametrize(("count", "trim"), [(1, 0), (3, 0), (3, 1), (7, 3), (8, 2), (9, 2)])
def test_it_is_that_of_torchjd(count, trim):
    aggregation = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        expected = aggregation.TrimmedMean(trim)(rows)
        torch.testing.assert_close(combine(rows, trim), expected, rtol=1e-13, atol=1e-15)


def test_zeros_do_not_count():
    rows = torch.tensor([[0.0, 0.0, 5.0], [3.0, 0.0, 1.0], [1.0, 0.0, 3.0]])
    assert combine(rows, 1).tolist() == [2.0, 0.0, 3.0]


def test_of_few_gradients_the_median_is_left():
    rows = torch.tensor([[1.0, 1.0], [2.0, 5.0], [9.0, 6.0], [4.0, 0.5]])
    assert combine(rows[:1], 3).tolist() == [1.0, 1.0]
    assert combine(rows[:2], 3).tolist() == [1.5, 3.0]
    assert combine(rows[:3], 3).tolist() == [2.0, 5.0]
    assert combine(rows, 3).tolist() == [3.0, 3.0]


def test_an_outlier_has_no_pull():
    rows = torch.tensor([[1.0], [2.0], [3.0], [1e30]])
    assert combine(rows, 1).tolist() == [2.5]


def test_a_head_has_the_gradient_of_its_loss():
    model = SmallModel()
    BalancedOptimizer(sgd(model), TrimmedMean()).backward(model.losses())
    rows = jacobian(model.losses(), list(model.parameters()))
    torch.testing.assert_close(model.heads[0].weight.grad.flatten(), rows[0, 16:20])
    expected = rows[:, :12].median(0).values.view(4, 3)
    torch.testing.assert_close(model.trunk.weight.grad, expected, rtol=1e-12, atol=0)
