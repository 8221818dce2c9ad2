"""What every engine must do on every graph: agree with the naive Jacobian, and own its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from moo_balance.engine import Engine, Problem
from tests.support.engine_graphs import (
    Graph,
    assert_same,
    clear,
    drawn,
    gradient,
    naive_jacobian,
    parameter,
    shared,
    unhooked_jacobian,
)
from tests.support.engines import (
    ENGINES,
    over_engines,
    over_engines_and_graphs,
    over_engines_graphs_and_gramians,
)

Build = Callable[[], Graph]


def coefficients(built: Graph) -> Tensor:
    return drawn(len(built.losses), seed=9)


@over_engines_and_graphs
def test_gramian_equals_that_of_the_naive_jacobian(engine: Engine, build: Build) -> None:
    jacobian, built = unhooked_jacobian(build()), build()
    gramian = engine.linearize(built.problem()).gramian()
    assert gramian.dtype == torch.float64
    assert not gramian.requires_grad
    assert torch.equal(gramian, gramian.T)
    assert_same(gramian, jacobian @ jacobian.T)
    assert all(param.grad is None for param in built.params)


@over_engines_graphs_and_gramians
def test_add_to_grad_writes_the_weighted_gradient(
    engine: Engine, build: Build, with_gramian: bool
) -> None:
    jacobian, built = naive_jacobian(build()), build()
    linearization = engine.linearize(built.problem())
    if with_gramian:
        linearization.gramian()
    linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built), coefficients(built) @ jacobian)
    assert reached(built) == reached(summed(build()))


def summed(built: Graph) -> Graph:
    for loss in built.losses:
        loss.backward(retain_graph=True)
    return built


def reached(built: Graph) -> list[bool]:
    return [param.grad is not None for param in built.params]


@over_engines_graphs_and_gramians
def test_add_to_grad_adds_to_gradients_that_are_there(
    engine: Engine, build: Build, with_gramian: bool
) -> None:
    jacobian, built = naive_jacobian(build()), summed(build())
    linearization = engine.linearize(built.problem())
    if with_gramian:
        linearization.gramian()
    linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built), (1 + coefficients(built)) @ jacobian)


@over_engines_graphs_and_gramians
def test_parameters_gradients_and_saved_tensors_keep_their_memory(
    engine: Engine, build: Build, with_gramian: bool
) -> None:
    built = build()
    params = [param.detach().clone() for param in built.params]
    for _ in range(2):  # the second time finds gradients to add to
        linearization = engine.linearize(built.problem(retain_graph=True))
        if with_gramian:
            linearization.gramian()
        linearization.add_to_grad(coefficients(built))
    for param, before in zip(built.params, params, strict=True):
        assert torch.equal(param, before)
    for param in built.params:
        others = [p.grad.clone() for p in built.params if p is not param and p.grad is not None]
        if param.grad is not None:
            param.grad.zero_()
        left = [p.grad for p in built.params if p is not param and p.grad is not None]
        for now, then in zip(left, others, strict=True):
            assert_same(now.to_dense(), then.to_dense().to(now.to_dense().dtype))
    for memory, copy in built.held:
        assert torch.equal(memory, copy)


@over_engines_and_graphs
def test_gradients_may_be_edited_in_place_one_by_one(engine: Engine, build: Build) -> None:
    """Under autograd, too, which refuses some views."""
    built = build()
    linearization = engine.linearize(built.problem())
    linearization.gramian()
    linearization.add_to_grad(coefficients(built))
    grads = [p.grad for p in built.params if p.grad is not None and not p.grad.is_sparse]
    versions = [grad._version for grad in grads]
    for k, grad in enumerate(grads):
        grad += torch.ones_like(grad, requires_grad=True)
        assert [g._version for g in grads[k + 1 :]] == versions[k + 1 :]
        grad.detach_()


@over_engines_graphs_and_gramians
def test_combined_has_the_weighted_gradient(
    engine: Engine, build: Build, with_gramian: bool
) -> None:
    jacobian, built = naive_jacobian(build()), build()
    # A scaler's factor is the trainer's business: it multiplies the scalar, as does the 3 here.
    linearization = engine.linearize(built.problem(scale=torch.tensor(2.0**16)))
    if with_gramian:
        linearization.gramian()
    scalar = linearization.combined(coefficients(built))
    assert scalar.shape == ()
    values = torch.stack([loss.detach() for loss in built.losses])
    assert_same(scalar.detach(), coefficients(built) @ values)
    (3 * scalar).backward()
    assert_same(gradient(built), 3 * coefficients(built) @ jacobian)


@over_engines_and_graphs
def test_a_loss_scale_is_in_the_gradient_and_not_in_the_gramian(
    engine: Engine, build: Build
) -> None:
    jacobian, rows, built = naive_jacobian(build()), unhooked_jacobian(build()), build()
    linearization = engine.linearize(built.problem(scale=torch.tensor(2.0**16)))
    assert_same(linearization.gramian(), rows @ rows.T)
    linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built) / 2**16, coefficients(built) @ jacobian)
    other = build()
    engine.linearize(other.problem(scale=torch.tensor(2.0**16))).add_to_grad(coefficients(other))
    assert_same(gradient(other) / 2**16, coefficients(other) @ jacobian)


@over_engines_and_graphs
def test_a_retained_graph_can_be_used_again(engine: Engine, build: Build) -> None:
    jacobian, built = naive_jacobian(build()), build()
    linearization = engine.linearize(built.problem(retain_graph=True))
    linearization.gramian()
    linearization.add_to_grad(coefficients(built))
    clear(built)
    engine.linearize(built.problem(retain_graph=True)).add_to_grad(coefficients(built))
    clear(built)
    assert_same(naive_jacobian(built), jacobian)


@over_engines
@pytest.mark.parametrize("with_gramian", [True, False], ids=["gramian", "losses_only"])
def test_a_graph_that_is_not_retained_is_freed(engine: Engine, with_gramian: bool) -> None:
    built = shared()
    linearization = engine.linearize(built.problem())
    if with_gramian:
        linearization.gramian()
    linearization.add_to_grad(coefficients(built))
    with pytest.raises(RuntimeError, match="second time"):
        built.losses[0].backward()


@over_engines
def test_a_gramian_is_on_the_device_of_the_losses(engine: Engine) -> None:
    """Also if there is nothing but factors to take it from."""
    with torch.device("meta"):
        trunk, heads = nn.Linear(64, 64, bias=False), nn.Linear(64, 3)
        losses = list(heads(trunk(torch.randn(2, 64))).square().mean(0).unbind())
    params = [*trunk.parameters(), *heads.parameters()]
    for compared in (None, {0}):
        problem = Problem(("a", "b", "c"), losses, params, compared, retain_graph=True)
        assert engine.linearize(problem).gramian().is_meta


@over_engines
def test_inner_products_are_taken_over_the_compared_parameters_only(engine: Engine) -> None:
    jacobian, built = naive_jacobian(shared()), shared()
    count = built.params[0].numel()
    problem = built.problem(compared={0})
    linearization = engine.linearize(problem)
    assert_same(linearization.gramian(), jacobian[:, :count] @ jacobian[:, :count].T)
    linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built), coefficients(built) @ jacobian)


@over_engines
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gramian_is_accumulated_in_float32_at_least(engine: Engine, dtype: torch.dtype) -> None:
    weight = nn.Parameter(drawn(4096).to(dtype))
    built = Graph(
        [10 * weight.sum(), (weight * drawn(4096, seed=1).to(dtype)).sum() * 10], [weight]
    )
    jacobian = torch.stack([torch.full((4096,), 10.0), 10 * drawn(4096, seed=1).to(dtype).double()])
    assert jacobian.norm(dim=1).square().min() > torch.finfo(torch.float16).max
    gramian = engine.linearize(built.problem()).gramian()
    assert gramian.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(
        gramian.double(), jacobian.double() @ jacobian.double().T, rtol=5e-3, atol=2e3
    )


@over_engines
def test_rows_of_a_sparse_half_precision_table_do_not_overflow(engine: Engine) -> None:
    table = nn.Embedding(8, 4096, sparse=True, dtype=torch.float16)
    built = Graph([10 * table(torch.tensor([0, 3])).sum()], [table.weight])
    gramian = engine.linearize(built.problem()).gramian()
    assert gramian.item() == 2 * 4096 * 100


@over_engines
def test_parameters_of_different_precision_share_a_gramian(engine: Engine) -> None:
    wide, narrow = parameter(3), parameter(3, seed=1, dtype=torch.float32)
    total = narrow.double().sum()
    built = Graph([wide.sum() + total, total * 2], [wide, narrow])
    jacobian = naive_jacobian(built)
    linearization = engine.linearize(built.problem())
    assert_same(linearization.gramian(), jacobian @ jacobian.T)
    linearization.add_to_grad(coefficients(built))
    torch.testing.assert_close(gradient(built), coefficients(built) @ jacobian, rtol=1e-6, atol=0)
    assert (wide.grad.dtype, narrow.grad.dtype) == (torch.float64, torch.float32)


@over_engines
def test_losses_of_different_precision_survive_a_large_scale(engine: Engine) -> None:
    weight = nn.Parameter(torch.ones(3))
    built = Graph([weight.sum().half() / 64, weight.square().sum()], [weight])
    jacobian = naive_jacobian(built)
    built = Graph([weight.sum().half() / 64, weight.square().sum()], [weight])
    gramian = engine.linearize(built.problem(scale=torch.tensor(2.0**15))).gramian()
    assert_same(gramian, jacobian @ jacobian.T)
    flipped = Graph([weight.sum().half(), weight.square().sum()], [weight])
    gramian = engine.linearize(flipped.problem(scale=torch.tensor(2.0**16))).gramian()
    assert gramian[1, 1] == 12  # the half-precision loss overflows; its neighbour does not


@over_engines
def test_frozen_parameters_get_no_gradient(engine: Engine) -> None:
    frozen, weight = parameter(3, 3).requires_grad_(False), parameter(3, seed=1)
    built = Graph([(frozen @ weight).sum(), weight.sum()], [weight])
    jacobian = naive_jacobian(built)
    built = Graph([(frozen @ weight).sum(), weight.sum()], [weight])
    linearization = engine.linearize(built.problem())
    assert_same(linearization.gramian(), jacobian @ jacobian.T)
    assert frozen.grad is None


# ---------------------------------------------------------------------- random programs

OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: torch.tanh(a),
    lambda a, b: a.mean().expand(4),
    lambda a, b: (a * 1.0).add_(b),
    lambda a, b: (b * 2.0).index_copy_(0, torch.tensor([1]), a[2:3]),
    lambda a, b: a.detach() - b,
    lambda a, b: a.sin() if a.detach().sum() > 0 else b.cos(),
    lambda a, b: drawn(4, 4, seed=5) @ a,
    lambda a, b: a.flip(0),
    lambda a, b: torch.cat([a[1:], b[:1]]),
    lambda a, b: torch.where(a.detach() > 0, a, b),
    lambda a, b: a.reshape(2, 2).T.reshape(4),
    lambda a, b: torch.maximum(a, b),
]
REDUCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda a: a.sum(),
    lambda a: a.square().mean(),
    lambda a: a[0],
    lambda a: a.exp().sum(),
]

whole = st.integers(0, 99)
steps = st.lists(st.tuples(st.sampled_from(OPERATIONS), whole, whole), max_size=12)
reductions = st.lists(st.tuples(st.sampled_from(REDUCTIONS), whole), min_size=1, max_size=5)


def run(
    count: int,
    program: list[tuple[Callable[[Tensor, Tensor], Tensor], int, int]],
    reduced: list[tuple[Callable[[Tensor], Tensor], int]],
) -> Graph:
    params = [parameter(4, seed=k) for k in range(count)]
    values: list[Tensor] = list(params)
    for operation, i, j in program:
        result = operation(values[i % len(values)], values[j % len(values)])
        values.append(torch.tanh(result))
    losses = [reduction(values[-1 - k % len(values)]) for reduction, k in reduced]
    return Graph([loss if loss.requires_grad else loss + params[0][0] for loss in losses], params)


@pytest.mark.parametrize("name", list(ENGINES))
@given(st.integers(1, 4), steps, reductions)
@settings(max_examples=60, deadline=None)
def test_random_programs_agree_with_the_naive_jacobian(
    name: str, count: int, program: list, reduced: list
) -> None:
    jacobian, built = naive_jacobian(run(count, program, reduced)), run(count, program, reduced)
    linearization = ENGINES[name].linearize(built.problem())
    assert_same(linearization.gramian(), jacobian @ jacobian.T)
    linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built), coefficients(built) @ jacobian)
    other = run(count, program, reduced)
    ENGINES[name].linearize(other.problem()).add_to_grad(coefficients(other))
    assert_same(gradient(other), coefficients(other) @ jacobian)
