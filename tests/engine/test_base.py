"""Problems, weighted sums, and sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalanceError
from moo_balance.engine import Engine, Linearization, PerLoss, Problem
from moo_balance.engine.base import (
    add_rows,
    add_to_grad,
    deliver,
    gradients_of,
    gradients_through_hooks,
    precomputed_gradient,
    remove_loss_scale,
    stack_losses,
    weighted_backward,
    weighted_root,
    weighted_sum,
)
from moo_balance.engine.distributed import RowAverager
from tests.support.engine_graphs import Graph, drawn, gradient, naive_jacobian, parameter, shared


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


@pytest.mark.parametrize("scale", [None, 8.0])
def test_what_passes_start_from_is_handed_out_once(scale: float | None) -> None:
    weight = nn.Parameter(torch.ones(2))
    described = problem(weight, [torch.float32, torch.float32], scale=scale)
    outputs, coefficients = described.grad_outputs(), torch.ones(2)
    _, start = weighted_root(described, coefficients)
    for tensor in (*outputs, start):
        tensor.zero_()
    assert [output.item() for output in described.grad_outputs()] == [scale or 1.0] * 2
    assert coefficients.tolist() == [1.0, 1.0]


def test_a_gradient_is_delivered_in_every_way_alike() -> None:
    """Directly, by autograd, and by hand: on several ranks, or to a parameter that is frozen."""

    def delivered(hooked: bool, **arguments: Any) -> tuple[Tensor | None, list[Any]]:
        param, idle, seen = parameter(3), parameter(2, seed=1), list[Any]()
        param.grad = torch.ones_like(param)
        for each in (param, idle) if hooked else ():
            each.register_hook(lambda gradient: (seen.append(gradient.clone()), 2 * gradient)[1])
            each.register_hook(lambda gradient: None)
            each.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        param.requires_grad_(arguments.pop("trains", True))
        described = Problem(["a"], [param.sum()], [param, idle], **arguments)
        deliver([drawn(3, seed=2), None], described)
        assert idle.grad is None
        return param.grad, seen

    plain, _ = delivered(hooked=False)
    torch.testing.assert_close(plain, 1 + drawn(3, seed=2))
    for arguments in ({}, {"averager": RowAverager(None)}, {"trains": False}):
        gradient, (before, after) = delivered(hooked=True, **arguments)
        torch.testing.assert_close(gradient, 1 + 2 * drawn(3, seed=2))
        torch.testing.assert_close(before, drawn(3, seed=2))
        torch.testing.assert_close(after, gradient)


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


def test_losses_of_different_precision_are_stacked_in_the_widest() -> None:
    weight = nn.Parameter(torch.ones(2))
    stacked = stack_losses([weight.sum().half(), weight.double().sum(), weight.sum()])
    assert stacked.dtype == torch.float64
    assert stacked.requires_grad
    assert stacked.tolist() == [2, 2, 2]
    with torch.no_grad():
        assert stack_losses([weight.sum()]).dtype == torch.float32


def test_a_loss_scale_is_squared_in_the_gramian() -> None:
    gramian = drawn(2, 2)
    assert remove_loss_scale(gramian, None) is gramian
    assert torch.equal(remove_loss_scale(64 * gramian, torch.tensor(8.0)), gramian)


def test_a_precomputed_gradient_is_scaled_and_added_as_any_other() -> None:
    used, idle = parameter(3), parameter(2, seed=1)
    used.grad = torch.ones_like(used)
    described = Problem(["a"], [used.sum()], [used, idle])
    value = precomputed_gradient(torch.tensor(2.0), [drawn(3, seed=2), None], described)
    assert value.item() == 2.0
    (3 * value).backward()
    torch.testing.assert_close(used.grad, 1 + 3 * drawn(3, seed=2))
    assert idle.grad is None


def test_a_precomputed_gradient_of_no_parameter_has_a_backward_pass_all_the_same() -> None:
    mine, theirs = parameter(2), parameter(2, seed=1)
    built = Problem(names=["a"], losses=[theirs.sum()], params=[mine])
    precomputed_gradient(torch.tensor(3.0), [None], built).backward()
    assert mine.grad is None
    assert theirs.grad is None


@pytest.mark.parametrize("take", [gradients_of, gradients_through_hooks])
def test_rows_are_taken_without_touching_grad(take: Any) -> None:
    built = shared()
    jacobian = naive_jacobian(built)
    for param in built.params:
        param.grad = torch.ones_like(param)
    rows = [take([loss], [torch.ones_like(loss)], built.params, True) for loss in built.losses]
    assert all(torch.equal(param.grad, torch.ones_like(param)) for param in built.params)
    for row, expected in zip(rows, jacobian, strict=True):
        for param, entry in zip(built.params, row, strict=True):
            param.grad = entry
        torch.testing.assert_close(gradient(Graph([], built.params)), expected)


def some_gradients() -> list[Tensor | None]:
    values = drawn(2, 3, seed=1)
    with torch.sparse.check_sparse_tensor_invariants(True):
        sparse = torch.sparse_coo_tensor([[1, 3]], values, (4, 3))
    return [None, drawn(4, 3), sparse]


def as_dense(gradient: Tensor | None) -> Tensor:
    return torch.zeros(4, 3).double() if gradient is None else gradient.to_dense()


@pytest.mark.parametrize("before", range(3), ids=["nothing", "dense", "sparse"])
@pytest.mark.parametrize("added", range(3), ids=["nothing", "dense", "sparse"])
def test_gradients_of_any_kind_are_added(before: int, added: int) -> None:
    param, first, second = parameter(4, 3), some_gradients()[before], some_gradients()[added]
    expected = as_dense(first) + as_dense(second)
    (total,) = add_rows([first], [second])
    assert (total is None) == (before == added == 0)
    torch.testing.assert_close(as_dense(total), expected)
    param.grad = first
    add_to_grad([second], [param])
    torch.testing.assert_close(as_dense(param.grad), expected)
