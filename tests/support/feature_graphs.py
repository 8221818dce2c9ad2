"""Graphs with shared features, one function each, and the naive gradients at the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moo_balance.engine import Linearization, PerLoss
from tests.support.engine_graphs import Graph, drawn, parameter


@dataclass
class Split:
    """A graph with features, and what the Gramian at them should be."""

    graph: Graph
    features: Sequence[Tensor]
    partial: Callable[[], Sequence[Tensor]] | None = None
    """The gradients at the features [K, sum of sizes] where autograd's total ones differ."""

    def linearize(self, **arguments: Any) -> Linearization:
        return PerLoss().linearize(self.graph.problem(features=self.features, **arguments))

    def jacobian(self) -> Tensor:
        """Gradients at the features, one loss after the other."""
        if self.partial is not None:
            return torch.stack(list(self.partial()))
        rows = []
        for loss in self.graph.losses:
            found = torch.autograd.grad(loss, self.features, retain_graph=True, allow_unused=True)
            pairs = zip(self.features, found, strict=True)
            whole = [torch.zeros_like(f) if g is None else g for f, g in pairs]
            rows.append(torch.cat([g.reshape(-1) for g in whole]))
        return torch.stack(rows)


SPLITS: dict[str, Callable[[], Split]] = {}


def split(build: Callable[[], Split]) -> Callable[[], Split]:
    SPLITS[build.__name__] = build
    return build


def trunk() -> tuple[Tensor, Tensor]:
    weight = parameter(4, 3)
    return weight, torch.tanh(drawn(5, 4, seed=1) @ weight)


@split
def plain() -> Split:
    weight, features = trunk()
    heads = [parameter(3, seed=k) for k in (2, 3)]
    losses = [(features @ head).square().mean() for head in heads]
    return Split(Graph(losses, [weight, *heads]), [features])


@split
def wide() -> Split:
    """Few samples on a wide trunk, whose weight's gradients stay factored."""
    first, second = parameter(9, 8), parameter(7, 9, seed=1)
    hidden = torch.tanh(drawn(2, 9, seed=3) @ first)
    features = torch.tanh(hidden[:, :7] @ second)
    heads = [parameter(9, seed=k) for k in (4, 5)]
    losses = [
        (features @ heads[0]).square().sum(),
        (features @ heads[1]).exp().sum(),
        (features[:, :7] @ second).sum(),
    ]
    return Split(Graph(losses, [first, second, *heads]), [features])


@split
def several() -> Split:
    weight, first = trunk()
    second, head = drawn(2, 4, seed=5) @ weight, parameter(3, seed=2)
    losses = [(first @ head).sum() + second.exp().sum(), (first * 2).square().sum(), second.sum()]
    return Split(Graph(losses, [head, weight]), [first, second])


@split
def pieces_of_one_node() -> Split:
    weight, whole = trunk()
    left, right = whole.split([1, 2], dim=1)
    losses = [left.square().sum() + right.sum(), (right**3).sum(), left.exp().sum()]
    return Split(Graph(losses, [weight]), [left, right])


@split
def one_piece_and_a_way_around() -> Split:
    """The second loss reaches the trunk also through a sibling of the feature."""
    weight, whole = trunk()
    left, right = whole.split([1, 2], dim=1)
    losses = [left.square().sum(), (left.sum() * right.square().sum())]
    return Split(Graph(losses, [weight]), [left])


@split
def tied() -> Split:
    """The weight of the trunk is that of a head, too."""
    weight, features = trunk()
    losses = [(features @ weight.T).square().sum(), features.exp().sum()]
    return Split(Graph(losses, [weight]), [features])


@split
def nested() -> Split:
    """One feature is computed from another: its share is taken at itself alone."""
    weight, first = trunk()
    second = first.sin()
    losses = [(first * 2).sum() + second.square().sum(), (second * first.detach()).sum()]

    def partial() -> list[Tensor]:
        at_second = [2 * second, first]
        at_first = [torch.full_like(first, 2.0), torch.zeros_like(first)]
        pairs = zip(at_first, at_second, strict=True)
        return [torch.cat([a.reshape(-1), b.reshape(-1)]).detach() for a, b in pairs]

    return Split(Graph(losses, [weight]), [first, second], partial)


@split
def leaf() -> Split:
    """The features are a parameter, as a table of codes may be."""
    codes, head = parameter(4, 3), parameter(3, seed=1)
    losses = [(codes @ head).sum(), codes.square().sum()]
    return Split(Graph(losses, [codes, head]), [codes])


@split
def changed_in_place() -> Split:
    weight, features = trunk()
    features = (features * 1.0).mul_(2.0)
    return Split(Graph([features.sum(), features.square().sum()], [weight]), [features])


@split
def sparse() -> Split:
    table, head = nn.Embedding(6, 3, sparse=True, dtype=torch.float64), parameter(3, seed=1)
    with torch.no_grad():
        table.weight.copy_(drawn(6, 3))
    features = table(torch.tensor([0, 2, 2, 5]))
    losses = [(features @ head).square().sum(), features.exp().sum()]
    return Split(Graph(losses, [table.weight, head]), [features])


@split
def complex_valued() -> Split:
    weight = parameter(3, dtype=torch.complex128)
    features = weight * drawn(3, seed=1, dtype=torch.complex128)
    losses = [features.real.sum(), features.abs().square().sum()]

    def partial() -> list[Tensor]:
        at = [torch.ones_like(features), 2 * features]
        return [torch.view_as_real(value.detach()).reshape(-1) for value in at]

    return Split(Graph(losses, [weight]), [features], partial)


@split
def hooked() -> Split:
    weight, features = trunk()
    head = parameter(3, seed=2)
    mask = torch.tensor([1.0, 0.0, 2.0])
    head.register_hook(lambda gradient: gradient * mask)
    weight.register_hook(lambda gradient: gradient * mask)
    losses = [(features @ head).square().sum(), features.exp().sum()]
    return Split(Graph(losses, [weight, head]), [features])


@split
def reentrant_below() -> Split:
    weight, x = parameter(4, 3), drawn(5, 4, seed=1).requires_grad_()
    features = checkpoint(lambda x: torch.tanh(x @ weight), x, use_reentrant=True)

    def partial() -> list[Tensor]:
        at = features.detach()
        return [torch.ones_like(at).reshape(-1), 2 * at.reshape(-1)]

    losses = [features.sum(), features.square().sum()]
    return Split(Graph(losses, [weight]), [features], partial)


over_splits = pytest.mark.parametrize("build", list(SPLITS.values()), ids=list(SPLITS))
