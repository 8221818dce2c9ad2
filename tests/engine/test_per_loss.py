"""What is particular to the reference engine: its passes, its precision, its windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moo_balance.engine import PerLoss, Problem
from tests.support.engine_graphs import (
    Graph,
    clear,
    counted,
    drawn,
    gradient,
    naive_jacobian,
    parameter,
)


def test_a_method_without_a_gramian_costs_one_pass() -> None:
    built, trunk, heads = counted()
    PerLoss().linearize(built.problem()).add_to_grad(torch.ones(2))
    assert (trunk, heads) == ([1], [[1], [1]])


def test_a_gramian_costs_a_pass_per_loss_and_the_combination_none() -> None:
    built, trunk, heads = counted()
    linearization = PerLoss().linearize(built.problem(retain_graph=True))
    assert trunk == [0]
    linearization.gramian()
    assert (trunk, heads) == ([2], [[1], [1]])
    linearization.add_to_grad(torch.ones(2))
    assert (trunk, heads) == ([2], [[1], [1]])


def test_a_combined_scalar_costs_no_further_pass() -> None:
    built, trunk, heads = counted()
    linearization = PerLoss().linearize(built.problem())
    linearization.gramian()
    linearization.combined(torch.ones(2)).backward()
    assert (trunk, heads) == ([2], [[1], [1]])


def test_a_float64_gramian_of_float32_gradients_is_exact() -> None:
    weight = nn.Parameter(drawn(100_000).float())
    other = drawn(100_000, seed=1).float()
    exact = torch.stack([weight.detach().double() * 2, other.double()])
    exact = exact @ exact.T

    def gramian(engine: PerLoss) -> Tensor:
        built = Graph([weight.square().sum(), (weight * other).sum()], [weight])
        return engine.linearize(built.problem()).gramian()

    assert gramian(PerLoss()).dtype == torch.float32
    torch.testing.assert_close(gramian(PerLoss(dtype=torch.float64)), exact, rtol=1e-13, atol=1e-9)


def micro_batches(weight: nn.Parameter, table: nn.Embedding) -> list[dict[str, Tensor]]:
    """Three of them; one loss skips the second."""
    looked_up = table(torch.tensor([0, 2]))
    return [
        {"a": weight.square().sum(), "b": looked_up.sum() + weight.sum()},
        {"b": table.weight.square().sum()},
        {"a": (looked_up @ weight).sum(), "b": looked_up.exp().sum()},
    ]


def test_a_window_equals_one_batch_of_its_micro_batches() -> None:
    weight, table = parameter(3), nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
    params = [weight, table.weight]
    parts = micro_batches(weight, table)
    whole = Graph([sum(part[n] for part in parts if n in part) for n in "ab"], params)
    jacobian = naive_jacobian(whole)

    parts = micro_batches(weight, table)
    window = PerLoss().window()
    problems = [
        Problem(list(part), list(part.values()), params, retain_graph=True) for part in parts
    ]
    for problem in problems[:-1]:
        window.add(problem)
    linearization = window.close(problems[-1])
    torch.testing.assert_close(linearization.gramian(), jacobian @ jacobian.T)
    clear(whole)
    coefficients = drawn(2, seed=3)
    linearization.add_to_grad(coefficients)
    torch.testing.assert_close(gradient(whole), coefficients @ jacobian)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_per_loss_is_a_value(dtype: torch.dtype) -> None:
    assert PerLoss(dtype) == PerLoss(dtype=dtype)
    assert repr(PerLoss(dtype)) == f"PerLoss(dtype={dtype}, unbiased=False)"
