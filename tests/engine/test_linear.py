"""Factored weight gradients: the same products and sums as of the gradients themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from moo_balance.engine.autograd import nodes_above
from moo_balance.engine.distributed import RowAverager
from moo_balance.engine.linear import (
    GradInputs,
    LinearWeightGradient,
    add_linear_layers,
    find_linear_layers,
)
from tests.support.engine_graphs import Graph, drawn, naive_jacobian, parameter, wide

SAMPLES, INPUTS, OUTPUTS = 3, 20, 70


def found(built: Graph, **arguments: Any) -> list[int]:
    problem = built.problem(**arguments)
    return [layer.param_index for layer in find_linear_layers(problem, nodes_above(problem.losses))]


def three(output: Tensor) -> list[Tensor]:
    return [output.sum(), output.square().sum(), output.exp().mean()]


def layer(
    reached: list[bool], transposed: bool, dtype: torch.dtype
) -> tuple[LinearWeightGradient, Tensor]:
    """A layer, and its gradients [K, P] multiplied out."""
    inputs = drawn(SAMPLES, INPUTS).to(dtype)
    at_output = [drawn(SAMPLES, OUTPUTS, seed=k + 1).to(dtype) for k in range(len(reached))]
    kept = [gradient if there else None for gradient, there in zip(at_output, reached, strict=True)]
    node = (parameter(1) * 1).grad_fn
    assert isinstance(node, Node)
    rows = [
        torch.zeros(INPUTS, OUTPUTS).double() if d is None else inputs.double().T @ d.double()
        for d in kept
    ]
    jacobian = torch.stack([(row.T if transposed else row).reshape(-1) for row in rows])
    return LinearWeightGradient(node, 0, inputs, transposed, kept), jacobian


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("chunk", [None, 40])
def test_products_and_sums_equal_those_of_the_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool, chunk: int | None
) -> None:
    if chunk is not None:
        monkeypatch.setattr("moo_balance.engine.products._CPU_CHUNK", chunk)
    factored, jacobian = layer([True, False, True], transposed, dtype)
    assert factored.losses == (0, 2)
    close = {"rtol": 1e-5 if dtype != torch.float64 else 1e-12, "atol": 1e-5}
    chosen = jacobian[[0, 2]]
    products = factored.products(torch.float32)
    assert products.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(products, products.T)
    torch.testing.assert_close(products.double(), chosen @ chosen.T, **close)
    gramian = add_linear_layers(torch.ones(3, 3), [factored], None, torch.float32)
    torch.testing.assert_close(gramian.double(), 1 + jacobian @ jacobian.T, **close)
    coefficients = drawn(3, seed=9)
    total = factored.combine(coefficients)
    assert total is not None
    assert total.shape == ((OUTPUTS, INPUTS) if transposed else (INPUTS, OUTPUTS))
    close["rtol"] = close["atol"] = 2e-2 if dtype == torch.float16 else close["rtol"]
    torch.testing.assert_close(total.double().reshape(-1), coefficients @ jacobian, **close)


def test_a_layer_that_no_loss_reaches_adds_nothing() -> None:
    factored, _ = layer([False, False], True, torch.float32)
    assert factored.combine(torch.ones(2)) is None
    gramian = torch.ones(2, 2)
    assert add_linear_layers(gramian, [factored], None, torch.float32) is gramian


def test_layers_that_are_not_compared_add_no_products() -> None:
    factored, _ = layer([True, True], True, torch.float32)
    gramian, ones = torch.ones(2, 2), torch.ones(2, 2)
    assert add_linear_layers(gramian, [factored], {1, 2}, torch.float32) is gramian
    assert torch.equal(gramian, ones)
    assert not torch.equal(add_linear_layers(gramian, [factored], {0}, torch.float32), ones)


@pytest.mark.parametrize("bias", [True, False])
def test_wide_layers_on_few_samples_are_found(bias: bool) -> None:
    module = nn.Linear(16, 16, bias)
    built = Graph(three(module(drawn(2, 16).float())), [*module.parameters()])
    assert found(built) == [0]
    narrow = Graph(three(module(drawn(64, 16).float())), [*module.parameters()])
    assert found(narrow) == []


def test_a_single_loss_and_several_ranks_have_no_factored_layers() -> None:
    built = wide()
    assert found(built) == [0]
    assert found(Graph(built.losses[:1], built.params)) == []
    assert found(built, averager=RowAverager(None)) == []


def used_twice(weight: nn.Parameter, x: Tensor) -> Tensor:
    return torch.tanh(x @ weight) @ weight


def regularized(weight: nn.Parameter, x: Tensor) -> Tensor:
    return x @ weight + weight.square().sum()


def transposed_and_regularized(weight: nn.Parameter, x: Tensor) -> Tensor:
    return x @ weight.t() + weight.square().sum()


def transposed_once_for_two(weight: nn.Parameter, x: Tensor) -> Tensor:
    transposed = weight.t()
    return torch.tanh(x @ transposed) @ transposed


def computed(weight: nn.Parameter, x: Tensor) -> Tensor:
    return x @ (2 * weight)


def multiplied(weight: nn.Parameter, x: Tensor) -> Tensor:
    return torch.addmm(torch.zeros(16).double(), x, weight, alpha=2)


@pytest.mark.parametrize(
    "use",
    [
        used_twice,
        regularized,
        transposed_and_regularized,
        transposed_once_for_two,
        computed,
        multiplied,
    ],
)
def test_weights_with_another_use_are_not_factored(
    use: Callable[[nn.Parameter, Tensor], Tensor],
) -> None:
    weight, x = parameter(16, 16), drawn(2, 16)
    assert found(Graph(three(x @ weight), [weight])) == [0]
    assert found(Graph(three(x @ weight.t()), [weight])) == [0]
    assert found(Graph(three(use(weight, x)), [weight])) == []


class Subclass(nn.Parameter):
    pass


@pytest.mark.parametrize("kind", ["subclass", "complex"])
def test_weights_whose_gradient_is_observed_are_not_factored(kind: str) -> None:
    weight, x = parameter(16, 16), drawn(2, 16)
    if kind == "subclass":
        weight = Subclass(drawn(16, 16))
    else:
        weight, x = parameter(16, 16, dtype=torch.complex128), x.to(torch.complex128)
    output = (x @ weight).abs()
    assert found(Graph(three(output), [weight])) == []


def test_factored_layers_come_in_the_order_of_the_parameters() -> None:
    """Autograd's nodes come in the order of their addresses, which another run does not repeat."""
    layers = [nn.Linear(32, 32, bias=False) for _ in range(12)]
    params = [layer.weight for layer in layers]
    out = nn.Sequential(*layers)(drawn(2, 32).float())
    problem = Graph([out.sum(), out.square().sum()], params).problem()
    found = [
        layer.param_index for layer in find_linear_layers(problem, nodes_above(problem.losses))
    ]
    assert found == list(range(12))


def test_gradients_are_split_into_a_row_and_output_gradients() -> None:
    built = wide()
    problem = built.problem()
    jacobian = naive_jacobian(built)
    layers = find_linear_layers(problem, nodes_above(problem.losses))
    inputs = GradInputs(built.params, layers)
    for k, loss in enumerate(built.losses):
        with inputs.recorder:
            gradients = torch.autograd.grad(
                loss, inputs.inputs, retain_graph=True, allow_unused=True
            )
            row = inputs.split(gradients)
        assert row[0] is None
        (weights,) = layers
        gradient = weights.output_gradients[k]
        assert gradient is not None
        size = built.params[0].numel()
        torch.testing.assert_close((gradient.T @ weights.inputs).reshape(-1), jacobian[k, :size])
        rest = [p if g is None else g for p, g in zip(built.params, row, strict=True)][1:]
        zeros = [
            torch.zeros_like(g) if r is None else g for g, r in zip(rest, row[1:], strict=True)
        ]
        flat = torch.cat([entry.detach().reshape(-1) for entry in zeros])
        torch.testing.assert_close(flat, jacobian[k, size:])
