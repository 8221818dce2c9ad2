"""What is particular to streaming: its cuts, what it keeps, how often it passes a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moo_balance import MGDA, BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.engine import PerLoss, Problem, Streaming
from moo_balance.engine.graph import nodes_above
from moo_balance.engine.portions import Portion, portions
from moo_balance.engine.streaming import Descent
from tests.engine.graphs import Graph, drawn, parameter
from tests.engine.test_per_loss import counted


def deep(depth: int = 6, count: int = 4, samples: int = 20) -> Graph:
    """More samples than the layers are wide: factors do not pay."""
    layers = [nn.Linear(5, 5, dtype=torch.float64) for _ in range(depth)]
    heads = [nn.Linear(5, 2, dtype=torch.float64) for _ in range(count)]
    value = drawn(samples, 5)
    for layer in layers:
        value = value + torch.tanh(layer(value))
    params = [p for layer in (*layers, *heads) for p in layer.parameters()]
    return Graph([head(value).square().mean() for head in heads], params)


def plan(built: Graph, memory: float) -> list[Portion]:
    problem = built.problem()
    return portions(problem, nodes_above(problem.losses), range(len(built.params)), memory)


def sizes(built: Graph, portion: Portion) -> int:
    """Numbers kept for the trunk by all losses, for a head by its own."""
    trunk = len(built.params) - 2 * len(built.losses)
    return sum(
        built.params[column].numel() * (len(built.losses) if column < trunk else 1)
        for column in portion.columns
    )


def test_portions_keep_within_the_memory_allowed_and_cover_every_parameter_once() -> None:
    built = deep()
    total = sum(param.numel() for param in built.params)
    found = plan(built, total)
    assert len(found) > 3
    assert all(sizes(built, portion) <= total for portion in found)
    assert sorted(c for portion in found for c in portion.last) == list(range(len(built.params)))


def test_cuts_are_made_where_least_crosses() -> None:
    """Between blocks there is the residual stream alone; within them, that and the block's own."""
    built = deep(depth=6)
    for portion in plan(built, sum(param.numel() for param in built.params))[:-1]:
        assert len(portion.leaving) == 1


def test_plenty_of_memory_makes_one_portion() -> None:
    assert len(plan(deep(), 1e9)) == 1


@pytest.mark.parametrize("memory", [0.25, 1.0])
def test_no_more_is_kept_than_was_allowed(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    kept = []
    through = Descent.through

    def watched(self: Descent, portion: Portion, number: int) -> list[list[Tensor | None]]:
        rows = through(self, portion, number)
        kept.append(sum(g.numel() for row in rows for g in row if g is not None))
        return rows

    monkeypatch.setattr(Descent, "through", watched)
    built = deep()
    Streaming(memory=memory).linearize(built.problem()).gramian()
    total, layer = sum(param.numel() for param in built.params), 4 * 30
    assert max(kept) <= max(memory * total, layer) < 4 * total


def test_a_gramian_costs_a_pass_per_loss_and_the_gradient_one_more() -> None:
    built, trunk, heads = counted()
    linearization = Streaming(memory=1e-9).linearize(built.problem())
    linearization.gramian()
    assert (trunk, heads) == ([2], [[1], [1]])
    linearization.accumulate(torch.ones(2))
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
    measured = frozenset(map(id, built.params[:2]))
    problem = Problem(
        [str(k) for k in range(4)], built.losses, built.params, measured=measured,
        retain_graph=True,
    )  # fmt: skip
    expected = PerLoss().linearize(problem).gramian()
    torch.testing.assert_close(Streaming(memory=0.01).linearize(problem).gramian(), expected)


def test_a_loss_that_is_a_parameter() -> None:
    weight, other = parameter(), parameter(seed=1)
    built = Graph([weight, weight * other], [weight, other])
    gramian = Streaming().linearize(built.problem(retain_graph=True)).gramian()
    expected = PerLoss().linearize(built.problem()).gramian()
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
