"""What is particular to streaming: its cuts, what it keeps, how often it passes a layer."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from moo_balance import MGDA, BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.engine import Engine, PerLoss, Problem, Streaming
from moo_balance.engine.autograd import nodes_above
from moo_balance.engine.cuts import SMALL, finest, sparing
from moo_balance.engine.descent import Descent, Rows
from moo_balance.engine.portions import Choice, Portion, parted, portions
from moo_balance.engine.survey import Survey
from tests.support.engine_graphs import (
    GRAPHS,
    Graph,
    assert_same,
    counted,
    drawn,
    hooked_and_tied,
    hooked_beside_a_way_around,
    hooked_in_between,
    naive_jacobian,
    parameter,
    wide_and_hooked,
)
from tests.support.engines import REFUSED_BY_STREAMING, Parted, everywhere, over_engines


def deep(depth: int = 6, count: int = 4, samples: int = 3, width: int = 16) -> Graph:
    """A residual trunk; with more samples than the layers are wide, factors do not pay."""
    layers = [nn.Linear(width, width, dtype=torch.float64) for _ in range(depth)]
    heads = [nn.Linear(width, 2, dtype=torch.float64) for _ in range(count)]
    value = drawn(samples, width)
    for layer in layers:
        value = value + torch.tanh(layer(value))
    params = [p for layer in (*layers, *heads) for p in layer.parameters()]
    return Graph([head(value).square().mean() for head in heads], params)


def surveyed(built: Graph) -> Survey:
    problem = built.problem()
    return Survey(problem, nodes_above(problem.losses), range(len(built.params)))


def planned(built: Graph, memory: float) -> list[Portion]:
    problem = built.problem()
    return portions(problem, nodes_above(problem.losses), range(len(built.params)), memory)


def needs(survey: Survey, cuts: list[int]) -> list[float]:
    """What each portion keeps, with what leaves it."""
    bounds = zip([0, *cuts], [*cuts, len(survey.order)], strict=True)
    return [
        sum(survey.kept(place, start) for place in range(start, end)) + survey.crossing[end]
        for start, end in bounds
    ]


# ---------------------------------------------------------------------- where it cuts


@pytest.mark.parametrize("samples", [1, 3, 20, 200])
@pytest.mark.parametrize("allowed", [0, 600, 1200, 2400, 10**6])
def test_cuts_are_the_best_of_all(samples: int, allowed: int) -> None:
    survey = surveyed(deep(depth=3, count=2, samples=samples))
    places = finest(survey)
    ways = [[*way] for size in range(len(places) + 1) for way in combinations(places, size)]
    least = min(max(needs(survey, way)) for way in ways)
    good = [way for way in ways if max(needs(survey, way)) <= max(allowed, least)]

    def cost(way: list[int]) -> tuple[int, float]:
        return len(way), sum(survey.crossing[cut] for cut in way)

    found = sparing(survey, allowed, slack=0)
    assert found in good
    assert cost(found) == min(map(cost, good))


def test_less_memory_takes_more_cuts() -> None:
    survey = surveyed(deep())
    counts = [len(sparing(survey, allowed, slack=0)) for allowed in (500, 1000, 2000, 4000)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2
    assert counts[-1] == 0


def test_nothing_is_cut_where_more_would_cross_than_is_kept() -> None:
    assert sparing(surveyed(deep(samples=200)), allowed=0, slack=0) == []


def test_cuts_are_made_where_least_crosses() -> None:
    """Between blocks there is the residual stream alone; within them, that and the block's own."""
    found = parted(surveyed(deep(samples=20)), partial(sparing, allowed=0, slack=0))
    assert len(found) > 3
    assert all(len(portion.leaving) == 1 for portion in found[:-1])


def test_every_parameter_is_done_with_once() -> None:
    built = deep(samples=20)
    found = parted(surveyed(built), everywhere)
    assert sorted(c for portion in found for c in portion.last) == list(range(len(built.params)))


def test_what_enters_at_a_layer_is_its_cotangent() -> None:
    """So that it is there once, and not also for the sake of the layer's products."""
    found = parted(surveyed(deep(depth=4)), finest)
    assert [len(portion.entered) for portion in found[-4:]] == [1, 1, 1, 1]
    assert not any(portion.layers for portion in found)


def chain(depth: int, size: int, count: int = 4) -> Graph:
    """Parameters that each scale a number."""
    weights, value = [parameter(size, seed=k) for k in range(depth)], torch.ones(())
    for weight in weights:
        value = (weight * value).mean()
    return Graph([value * (k + 1) for k in range(count)], weights)


def test_less_than_is_worth_a_cut_is_kept_whatever_the_memory() -> None:
    assert len(planned(chain(3, SMALL // 12), memory=1e-9)) == 1
    # One of these takes as much as that, so that two do not take much more.
    found = planned(chain(3, SMALL // 4), memory=1e-9)
    assert sorted(len(portion.columns) for portion in found) == [1, 2]


def test_enough_memory_makes_one_portion() -> None:
    assert len(planned(chain(3, SMALL // 4), memory=4.0)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_that_was_recorded_in_several_threads_is_not_cut(seed: int) -> None:
    """Each thread has numbers of its own, so that they tell nothing of the order."""
    built = deep()
    jacobian, problem = naive_jacobian(built), built.problem()
    draw = random.Random(seed)
    for node in nodes_above(problem.losses):
        node._set_sequence_nr(draw.randrange(1000))
    assert everywhere(surveyed(built)) == sparing(surveyed(built), 0, slack=0) == []
    assert_same(Parted(everywhere).linearize(problem).gramian(), jacobian @ jacobian.T)


# ---------------------------------------------------------------------- what it keeps, and passes


@pytest.mark.parametrize("choose", [finest, partial(sparing, allowed=1000, slack=0)])
@pytest.mark.parametrize("samples", [3, 20])
def test_no_more_is_kept_than_was_planned(
    monkeypatch: pytest.MonkeyPatch, choose: Choice, samples: int
) -> None:
    kept, taken = [], Descent._rows

    def watched(self: Descent, portion: Portion, number: int) -> Rows:
        rows = taken(self, portion, number)
        cotangents = (layer.output_gradients for layer in portion.layers)
        found = [g for each in (*rows, *cotangents, *self.arrived.values()) for g in each]
        kept.append(sum(g.numel() for g in found if g is not None))
        return rows

    monkeypatch.setattr(Descent, "_rows", watched)
    survey = surveyed(deep(samples=samples))
    Parted(choose).linearize(deep(samples=samples).problem()).gramian()
    planned = needs(survey, [*choose(survey)])
    assert all(numbers <= plan for numbers, plan in zip(kept, planned, strict=True))
    assert kept[-1] == planned[-1]


@over_engines
@pytest.mark.parametrize(
    "build", [hooked_and_tied, hooked_in_between, hooked_beside_a_way_around, wide_and_hooked]
)
def test_hooks_see_each_gradient_as_a_whole(engine: Engine, build: Callable[..., Graph]) -> None:
    def clipped(gradient: Tensor) -> Tensor:
        norm = gradient.norm()
        return gradient if norm < 0.1 else gradient * (0.1 / norm)

    jacobian = naive_jacobian(build(clipped))
    assert_same(engine.linearize(build(clipped).problem()).gramian(), jacobian @ jacobian.T)


@given(st.sampled_from(sorted({*GRAPHS} - REFUSED_BY_STREAMING)), st.randoms())
@settings(max_examples=200, deadline=None)
def test_any_cuts_will_do(name: str, draw: random.Random) -> None:
    def some(survey: Survey) -> list[int]:
        return [cut for cut in everywhere(survey) if draw.random() < 0.4]

    jacobian, built = naive_jacobian(GRAPHS[name]()), GRAPHS[name]()
    assert_same(Parted(some).linearize(built.problem()).gramian(), jacobian @ jacobian.T)


def test_a_gramian_costs_a_pass_per_loss_and_the_gradient_one_more() -> None:
    built, trunk, heads = counted()
    linearization = Parted(finest).linearize(built.problem())
    linearization.gramian()
    assert (trunk, heads) == ([2], [[1], [1]])
    linearization.add_to_grad(torch.ones(2))
    assert (trunk, heads) == ([3], [[2], [2]])


def test_hooks_see_the_balanced_gradient_once() -> None:
    weight = nn.Parameter(drawn(3))
    seen: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA(), engine=Streaming())
    optimizer.backward({"a": weight.square().sum(), "b": weight.exp().sum()})
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], weight.grad)


def test_parameters_that_are_not_measured_cost_no_products() -> None:
    built = deep()
    problem = Problem(
        [str(k) for k in range(4)], built.losses, built.params, compared={0, 1},
        retain_graph=True,
    )  # fmt: skip
    expected = PerLoss().linearize(problem).gramian()
    for engine in (Streaming(), Parted(everywhere)):
        torch.testing.assert_close(engine.linearize(problem).gramian(), expected)


def test_a_loss_that_is_a_parameter() -> None:
    weight, other = parameter(), parameter(seed=1)
    built = Graph([weight, weight * other], [weight, other])
    expected = PerLoss().linearize(built.problem(retain_graph=True)).gramian()
    for engine in (Streaming(), Parted(everywhere)):
        gramian = engine.linearize(built.problem(retain_graph=True)).gramian()
        torch.testing.assert_close(gramian, expected)


def test_windows_need_another_engine() -> None:
    weight = nn.Parameter(drawn(3))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA(), engine=Streaming())
    with optimizer.accumulate(), pytest.raises(BalanceError, match=r"PerLoss\(\)"):
        optimizer.backward({"a": weight.square().sum(), "b": weight.exp().sum()})


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan")])
def test_memory_must_be_positive(memory: float) -> None:
    with pytest.raises(BalanceValueError, match="`memory`"):
        Streaming(memory=memory)
