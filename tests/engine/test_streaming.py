"""What is particular to `Streaming`: where it cuts, what it keeps, how often it passes a node."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.autograd.graph import Node

from moo_balance import MGDA, BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.engine import Engine, PerLoss, Streaming
from moo_balance.engine.autograd import edges_of, nodes_above
from moo_balance.engine.streaming import partition as module
from moo_balance.engine.streaming.engine import BackwardSweep
from moo_balance.engine.streaming.partition import (
    NEGLIGIBLE,
    GraphCosts,
    Segment,
    build_segments,
    choose_cuts,
    partition,
)
from tests.support.engine_graphs import (
    GRAPHS,
    Graph,
    Halves,
    assert_same,
    counted,
    drawn,
    gradient,
    hooked_and_tied,
    hooked_beside_a_way_around,
    hooked_in_between,
    naive_jacobian,
    parameter,
    unhooked_jacobian,
    wide_and_hooked,
)
from tests.support.engines import (
    REFUSED_BY_STREAMING,
    CutAt,
    everywhere,
    in_little_memory,
    over_engines,
)

over_cut_graphs = pytest.mark.parametrize("name", sorted({*GRAPHS} - REFUSED_BY_STREAMING))


def residual(depth: int = 6, count: int = 4, samples: int = 3, width: int = 16) -> Graph:
    """A residual trunk; with more samples than the layers are wide, factors do not pay."""
    layers = [nn.Linear(width, width, dtype=torch.float64) for _ in range(depth)]
    heads = [nn.Linear(width, 2, dtype=torch.float64) for _ in range(count)]
    value = drawn(samples, width)
    for layer in layers:
        value = value + torch.tanh(layer(value))
    params = [p for layer in (*layers, *heads) for p in layer.parameters()]
    return Graph([head(value).square().mean() for head in heads], params)


def recurrent(steps: int, width: int = 512, count: int = 8) -> Graph:
    """One weight for all steps, large enough that K gradients exceed the budget."""
    weight = parameter(width, width, dtype=torch.float32)
    state = torch.ones(1, width)
    for _ in range(steps):
        state = torch.tanh(state @ weight)
    return Graph([(k + 1) * state.square().sum() for k in range(count)], [weight])


def chain(depth: int, size: int, count: int = 4) -> Graph:
    """Parameters that each scale a number."""
    weights, value = [parameter(size, seed=k) for k in range(depth)], torch.ones(())
    for weight in weights:
        value = (weight * value).mean()
    return Graph([value * (k + 1) for k in range(count)], weights)


def costs_of(built: Graph) -> GraphCosts:
    return GraphCosts(built.problem(), nodes_above(built.losses))


def segments_of(built: Graph, per_param: float) -> list[Segment]:
    return partition(built.problem(), nodes_above(built.losses), per_param)


# ---------------------------------------------------------------------- where it cuts


def test_cuts_are_between_residual_blocks() -> None:
    """Within a block, a part of the gradient of its input would cross."""
    costs = costs_of(residual(samples=20))
    segments = build_segments(costs, choose_cuts(costs, budget=500))
    assert len(segments) > 4
    assert all(len(segment.leaving) == 1 for segment in segments[:-1])


def test_cuts_are_at_the_narrowest_place() -> None:
    widths = [16, 16, 2, 16, 16]
    weights = [parameter(a, b, seed=a + b) for a, b in pairwise(widths)]
    value = drawn(50, 16)
    for weight in weights:
        value = torch.tanh(value @ weight)
    costs = costs_of(Graph([value.sum(), value.square().sum()], weights))
    (cut,) = choose_cuts(costs, budget=2 * (16 * 16 + 2 * 16) + 200)
    assert costs.cut_size[cut] == 2 * 50 * 2


def test_less_memory_takes_more_cuts() -> None:
    costs = costs_of(residual())
    counts = [len(choose_cuts(costs, budget)) for budget in (500, 1000, 2000, 10**4)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2
    assert counts[-1] == 0


def test_nothing_is_cut_where_more_would_cross_than_is_kept() -> None:
    assert in_little_memory(costs_of(residual(samples=200))) == []


def test_a_model_whose_gradients_fit_into_the_budget_is_not_cut() -> None:
    assert segments_of(chain(3, NEGLIGIBLE // 12), per_param=1e-9) == []
    assert segments_of(chain(3, NEGLIGIBLE // 4), per_param=4.0) == []
    assert len(segments_of(chain(3, NEGLIGIBLE // 4), per_param=1e-9)) > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_that_was_recorded_in_several_threads_is_not_cut(seed: int) -> None:
    """Each thread counts its nodes separately, so that the counts do not give an order."""
    built = residual()
    jacobian, problem = naive_jacobian(built), built.problem()
    draw = random.Random(seed)
    for node in nodes_above(problem.losses):
        node._set_sequence_nr(draw.randrange(1000))
    assert everywhere(costs_of(built)) == in_little_memory(costs_of(built)) == []
    assert_same(CutAt(everywhere).linearize(problem).gramian(), jacobian @ jacobian.T)


@given(st.sampled_from(sorted({*GRAPHS} - REFUSED_BY_STREAMING)), st.randoms())
@settings(max_examples=200, deadline=None)
def test_any_partition_gives_the_same_gramian(name: str, draw: random.Random) -> None:
    def some(costs: GraphCosts) -> list[int]:
        return [cut for cut in everywhere(costs) if draw.random() < 0.4]

    jacobian, built = unhooked_jacobian(GRAPHS[name]()), GRAPHS[name]()
    assert_same(CutAt(some).linearize(built.problem()).gramian(), jacobian @ jacobian.T)


# ---------------------------------------------------------------------- what it keeps


def test_an_output_gradient_that_enters_a_segment_is_not_kept_for_its_layer() -> None:
    costs = costs_of(residual(samples=3))
    assert costs.layers
    for node in costs.layers:
        place = costs.order.index(node)
        assert costs.kept(place, start=place) < costs.kept(place, start=0)


@pytest.mark.parametrize("samples", [3, 20])
@pytest.mark.parametrize("choose", [everywhere, in_little_memory])
def test_what_crosses_a_cut_is_what_was_counted(
    choose: Callable[[GraphCosts], list[int]], samples: int
) -> None:
    built = residual(samples=samples)
    costs = costs_of(built)
    cuts = choose(costs)
    sweep = BackwardSweep(built.problem(), torch.float64)
    for number, segment in enumerate(build_segments(costs, cuts)):
        sweep.pass_segment(segment, number)
        arrived = [g for gradients in sweep.arrived for g in gradients.values()]
        expected = costs.cut_size[cuts[number]] if number < len(cuts) else 0
        assert sum(g.numel() for g in arrived if g.dim()) == expected  # without the losses' own


# ---------------------------------------------------------------------- how often it passes a node


@contextmanager
def visits(built: Graph) -> Iterator[Counter[Node]]:
    """How often each node is run, which must be with a gradient."""
    counts: Counter[Node] = Counter()

    def count(node: Node) -> Callable[[Any], None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            assert any(gradient is not None for gradient in gradients)
            counts[node] += 1

        return hook

    inner = [node for node in nodes_above(built.losses) if edges_of(node)]
    handles = [node.register_prehook(count(node)) for node in inner]
    yield counts
    for handle in handles:
        handle.remove()


@over_cut_graphs
def test_a_node_is_run_once_for_each_loss_and_with_a_gradient(name: str) -> None:
    built = GRAPHS[name]()
    with visits(built) as expected:
        PerLoss().linearize(built.problem(retain_graph=True)).gramian()
    with visits(built) as found:
        CutAt(everywhere).linearize(built.problem(retain_graph=True)).gramian()
    assert all(found[node] <= expected[node] for node in found)


def random_graph(draw: random.Random) -> Graph:
    """Functions with several outputs, skips, edits in place and shared weights."""
    weights = [parameter(4, seed=k) for k in range(6)]
    values = [torch.tanh(weights[0])]
    for _ in range(draw.randint(3, 14)):
        a, b = draw.choice(values[-4:]), draw.choice(values[-4:])
        weight = draw.choice(weights)
        kind = draw.choice(["halves", "halves", "add", "multiply", "chunk", "weight", "edit"])
        if kind == "halves":
            values += Halves.apply(a, draw.choice([weight, b]))
        elif kind == "add":
            values.append(a + b)
        elif kind == "multiply":
            values.append(torch.tanh(a * weight))
        elif kind == "chunk":
            left, right = a.chunk(2)
            values += [torch.cat([right, right * 2]), torch.cat([left.sin(), left])]
        elif kind == "weight":
            values.append(torch.sin(weight) + a)
        else:
            copy = a * 1.0
            copy[1:3] = b[:2]
            values.append(copy)
    chosen = [(draw.choice(values), draw.choice(values)) for _ in range(draw.randint(2, 4))]
    return Graph([a.sum() + b.square().mean() for a, b in chosen], weights)


@given(st.randoms(use_true_random=False), st.sampled_from([everywhere, in_little_memory]))
@settings(max_examples=150, deadline=None)
def test_no_node_is_run_more_often_or_with_fewer_gradients_than_in_plain_passes(
    draw: random.Random, choose: Callable[[GraphCosts], list[int]]
) -> None:
    built = random_graph(draw)
    jacobian = naive_jacobian(built)
    with patterns(built) as expected:
        PerLoss().linearize(built.problem(retain_graph=True)).gramian()
    with patterns(built) as found:
        gramian = CutAt(choose).linearize(built.problem(retain_graph=True)).gramian()
    assert_same(gramian, jacobian @ jacobian.T)
    assert found <= expected


@contextmanager
def patterns(built: Graph) -> Iterator[Counter[tuple[Node, tuple[bool, ...]]]]:
    """How often each node is run with which of its gradients."""
    counts: Counter[tuple[Node, tuple[bool, ...]]] = Counter()

    def count(node: Node) -> Callable[[Any], None]:
        return lambda gradients: counts.update([(node, tuple(g is not None for g in gradients))])

    inner = [node for node in nodes_above(built.losses) if edges_of(node)]
    handles = [node.register_prehook(count(node)) for node in inner]
    yield counts
    for handle in handles:
        handle.remove()


def test_a_recurrence_is_passed_once_for_each_loss() -> None:
    built = recurrent(steps=40)
    with visits(built) as counts:
        Streaming().linearize(built.problem()).gramian()
    assert max(counts.values()) == len(built.losses)


def test_planning_is_linear_in_the_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing can be cut, as in a recurrence, or where hooks forbid each cut."""
    calls: Counter[str] = Counter()
    kept, probe = GraphCosts.kept, module.has_hook_at

    def count_kept(self: GraphCosts, place: int, start: int) -> int:
        calls["kept"] += 1
        return kept(self, place, start)

    def count_probes(edge: tuple[Node, int]) -> bool:
        calls["probes"] += 1
        return probe(edge)

    monkeypatch.setattr(GraphCosts, "kept", count_kept)
    monkeypatch.setattr(module, "has_hook_at", count_probes)
    for build in (recurrent, residual, hooked_everywhere):
        built = build(40)
        calls.clear()
        costs = costs_of(built)
        assert calls["kept"] == len(costs.order)
        for budget in (0, 1000, 3000):
            calls["kept"] = 0
            choose_cuts(costs, budget)
            assert calls["kept"] <= 3 * len(costs.order)
        assert calls["probes"] <= len(costs.spans)


def hooked_everywhere(depth: int) -> Graph:
    weights, value = [parameter(16, 16, seed=k) for k in range(depth)], drawn(2, 16)
    for weight in weights:
        value = torch.tanh(value @ weight)
        value.register_hook(lambda gradient: 2 * gradient)
    return Graph([value.sum(), value.square().sum()], weights)


def test_a_gramian_costs_a_pass_per_loss_and_the_gradient_one_more() -> None:
    built, trunk, heads = counted()
    linearization = CutAt(everywhere).linearize(built.problem())
    linearization.gramian()
    assert (trunk, heads) == ([2], [[1], [1]])
    linearization.add_to_grad(torch.ones(2))
    assert (trunk, heads) == ([3], [[2], [2]])


# ---------------------------------------------------------------------- hooks and surroundings


def test_no_cut_is_made_where_a_hook_would_see_a_gradient_twice() -> None:
    costs = costs_of(hooked_everywhere(6))
    cuts = choose_cuts(costs, budget=70)
    assert len(cuts) > 1
    assert not any(map(costs.has_hook_at, cuts))


@over_engines
@pytest.mark.parametrize(
    "build", [hooked_and_tied, hooked_in_between, hooked_beside_a_way_around, wide_and_hooked]
)
def test_hooks_see_each_gradient_as_a_whole(engine: Engine, build: Callable[..., Graph]) -> None:
    def clip(gradient: Tensor) -> Tensor:
        norm = gradient.norm()
        return gradient if norm < 0.1 else gradient * (0.1 / norm)

    jacobian = unhooked_jacobian(build(clip))
    assert_same(engine.linearize(build(clip).problem()).gramian(), jacobian @ jacobian.T)


def test_hooks_of_parameters_see_the_balanced_gradient_once() -> None:
    weight = nn.Parameter(drawn(3))
    seen: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA(), engine=Streaming())
    optimizer.backward({"a": weight.square().sum(), "b": weight.exp().sum()})
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], weight.grad)


def test_only_compared_parameters_are_differentiated() -> None:
    built = residual()
    problem = built.problem(compared={0, 1}, retain_graph=True)
    expected = PerLoss().linearize(problem).gramian()
    for engine in (Streaming(), CutAt(everywhere)):
        torch.testing.assert_close(engine.linearize(problem).gramian(), expected)


def test_a_loss_that_is_a_parameter_counts_in_the_gramian() -> None:
    weight, other = parameter(), parameter(seed=1)
    built = Graph([weight, weight * other], [weight, other])
    expected = PerLoss().linearize(built.problem(retain_graph=True)).gramian()
    for engine in (Streaming(), CutAt(everywhere)):
        gramian = engine.linearize(built.problem(retain_graph=True)).gramian()
        torch.testing.assert_close(gramian, expected)


class Once(torch.autograd.Function):
    """A fused loss: its gradient is ready after the forward pass, and `spend` takes it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, spend: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.gradient, ctx.parts, ctx.spend = value.exp(), [value.exp()], spend
        ctx.save_for_backward(value.exp())
        return value.exp().sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.spend(ctx, upstream), None


def spend_attribute(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.gradient.mul_(upstream * 2) / 2  # type: ignore[no-any-return]


def spend_entry(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.parts[0].mul_(upstream * 2) / 2  # type: ignore[no-any-return]


def spend_saved(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.saved_tensors[0].mul_(upstream * 2) / 2  # type: ignore[no-any-return]


def replace_attribute(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, torch.zeros_like(ctx.gradient)
    return gradient * upstream  # type: ignore[no-any-return]


def free_attribute(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.__dict__.pop("gradient") * upstream  # type: ignore[no-any-return]


def keep_attribute(ctx: Any, upstream: Tensor) -> Tensor:
    """Something new may be kept, and what is no tensor may change."""
    ctx.count = getattr(ctx, "count", 0) + 1
    ctx.cache = ctx.gradient * upstream
    return ctx.cache  # type: ignore[no-any-return]


def fused(spend: Callable[[Any, Tensor], Tensor]) -> Graph:
    weight, other = parameter(4), parameter(4, seed=1)
    hidden = torch.tanh(weight * other)
    losses = [Once.apply(hidden, spend), Once.apply(hidden.sin(), spend), hidden.square().sum()]
    return Graph(losses, [weight, other])


ONCE = [spend_attribute, spend_entry, spend_saved, replace_attribute, free_attribute]


@pytest.mark.parametrize("engine", [Streaming(), CutAt(everywhere)], ids=["uncut", "cut"])
@pytest.mark.parametrize("spend", ONCE, ids=lambda spend: spend.__name__)
def test_a_function_that_may_run_once_is_refused(
    engine: Engine, spend: Callable[[Any, Tensor], Tensor]
) -> None:
    built = fused(spend)
    with pytest.raises(BalanceError, match="`OnceBackward`, which changes"):
        engine.linearize(built.problem()).gramian()
    assert all(param.grad is None for param in built.params)


@pytest.mark.parametrize(
    ("engine", "spend"),
    [(PerLoss(), spend) for spend in ONCE]
    + [(engine, keep_attribute) for engine in (PerLoss(), Streaming(), CutAt(everywhere))],
)
def test_functions_of_single_losses_may_run_once_where_nothing_runs_twice(
    engine: Engine, spend: Callable[[Any, Tensor], Tensor]
) -> None:
    jacobian, built = naive_jacobian(fused(keep_attribute)), fused(spend)
    linearization = engine.linearize(built.problem())
    assert_same(linearization.gramian(), jacobian @ jacobian.T)
    linearization.add_to_grad(drawn(3, seed=9))
    assert_same(gradient(built), drawn(3, seed=9) @ jacobian)


def test_tensors_of_inference_mode_may_be_kept() -> None:
    """They have no version."""
    with torch.inference_mode():
        table = torch.ones(4)
    jacobian, built = naive_jacobian(fused(keep_attribute)), fused(keep_attribute)
    built.losses[0].grad_fn.table = table  # type: ignore[union-attr]
    assert_same(Streaming().linearize(built.problem()).gramian(), jacobian @ jacobian.T)


def test_accumulation_windows_need_another_engine() -> None:
    weight = nn.Parameter(drawn(3))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA(), engine=Streaming())
    with optimizer.accumulate(), pytest.raises(BalanceError, match=r"PerLoss\(\)"):
        optimizer.backward({"a": weight.square().sum(), "b": weight.exp().sum()})


@pytest.mark.parametrize("value", [0.0, -1.0, -inf, float("nan")])
def test_elements_per_param_must_be_above_zero(value: float) -> None:
    with pytest.raises(BalanceValueError, match="`elements_per_param`"):
        Streaming(elements_per_param=value)
