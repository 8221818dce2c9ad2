"""What every engine starts from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalanceError
from moo_balance.engine import Engine, Linearization, PerLoss, Problem
from moo_balance.engine.base import weighted_backward, weighted_sum


def problem(weight: Tensor, dtypes: Sequence[torch.dtype], scale: float | None = None) -> Problem:
    losses = [(k + 1) * weight.sum().to(dtype) for k, dtype in enumerate(dtypes)]
    factor = None if scale is None else torch.tensor(scale)
    return Problem(names=["a", "b"], losses=losses, params=[weight], scale=factor)


def test_grad_outputs_have_the_dtype_of_their_loss_and_carry_the_scale() -> None:
    weight = nn.Parameter(torch.ones(2))
    mixed = problem(weight, [torch.float16, torch.float64], scale=8.0)
    assert [output.dtype for output in mixed.grad_outputs()] == [torch.float16, torch.float64]
    assert [output.item() for output in mixed.grad_outputs()] == [8.0, 8.0]
    plain = problem(weight, [torch.float32, torch.float32])
    assert [output.item() for output in plain.grad_outputs()] == [1.0, 1.0]


def test_weighted_sum_and_backward_agree_across_dtypes() -> None:
    weight = nn.Parameter(torch.ones(2))
    coefficients = torch.tensor([0.25, 3.0], dtype=torch.float64)
    scalar = weighted_sum(problem(weight, [torch.float32, torch.float64]), coefficients)
    assert scalar.item() == 0.25 * 2 + 3 * 4
    scalar.backward()
    assert weight.grad.tolist() == [6.25, 6.25]
    weighted_backward(problem(weight, [torch.float32, torch.float64], scale=2.0), coefficients)
    assert weight.grad.tolist() == [18.75, 18.75]


class Windowless(Engine):
    def linearize(self, problem: Problem) -> Linearization:
        return PerLoss().linearize(problem)


def test_an_engine_without_windows_says_so() -> None:
    with pytest.raises(BalanceError, match="PerLoss"):
        Windowless().window()
