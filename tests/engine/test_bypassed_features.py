"""Losses that reach parameters around the features, through wide layers on few samples.

There the factors of a weight's gradient would be cheaper than the gradient; and what passes by the
features must count once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moo_balance import MGDA, BalancedOptimizer
from tests.support.engine_graphs import (
    Graph,
    assert_same,
    drawn,
    gradient,
    naive_jacobian,
    parameter,
)
from tests.support.feature_graphs import Split

SAMPLES, WIDTH = 2, 20


def linear(value: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(value, weight)


def losses_of(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Each loss takes all of the values, in its own proportions."""
    terms = [[value.square().mean(), value.sin().sum(), value.exp().mean()] for value in values]
    return [
        sum(
            ((k + 3 * j) % 5 + 1.0) * term for j, each in enumerate(terms) for term in each[k % 3 :]
        )
        for k in range(count)
    ]


def trunk() -> tuple[list[nn.Parameter], Tensor, Tensor]:
    """Two wide layers: their weights, what lies between them, and the features."""
    weights = [parameter(WIDTH, WIDTH, seed=k) for k in range(2)]
    hidden = torch.tanh(linear(drawn(SAMPLES, WIDTH, seed=9), weights[0]))
    return weights, hidden, torch.tanh(linear(hidden, weights[1]))


def skip(count: int) -> Split:
    """The hidden layer goes into the losses, too."""
    weights, hidden, features = trunk()
    return Split(Graph(losses_of([features, hidden], count), weights), [features])


def layer_around(count: int) -> Split:
    """A layer of its own leads from the hidden layer to the losses."""
    weights, hidden, features = trunk()
    around = parameter(WIDTH, WIDTH, seed=4)
    values = [features, linear(hidden, around)]
    return Split(Graph(losses_of(values, count), [*weights, around]), [features])


def layer_around_for_one(count: int) -> Split:
    """Only the last loss takes that way."""
    weights, hidden, features = trunk()
    around = parameter(WIDTH, WIDTH, seed=4)
    losses = losses_of([features], count)
    losses[-1] = losses[-1] + linear(hidden, around).square().sum()
    return Split(Graph(losses, [*weights, around]), [features])


def layer_from_the_start(count: int) -> Split:
    """The way around shares no node with the trunk, but its inputs."""
    weights, _, features = trunk()
    around = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    values = [features, around(drawn(SAMPLES, WIDTH, seed=9))]
    params = [*weights, *around.parameters()]
    return Split(Graph(losses_of(values, count), params), [features])


def tied(count: int) -> Split:
    """The second weight of the trunk is that of the head."""
    weights, _, features = trunk()
    return Split(Graph(losses_of([linear(features, weights[1])], count), weights), [features])


def tied_and_skipped(count: int) -> Split:
    """The same, with a way around through a weight that the trunk uses once more."""
    weights, hidden, features = trunk()
    values = [linear(features, weights[1]), linear(hidden, weights[0].T)]
    return Split(Graph(losses_of(values, count), weights), [features])


def output_of_a_layer(count: int) -> Split:
    """The features are what a factored layer returns, and another loss takes its input."""
    weights, hidden, _ = trunk()
    features = linear(hidden, weights[1])
    values = [features, linear(hidden, weights[1]), hidden]
    return Split(Graph(losses_of(values, count), weights), [features])


def two_features(count: int) -> Split:
    """One is computed from the other, and there is a way around both."""
    weights, hidden, second = trunk()
    around, head = (parameter(WIDTH, WIDTH, seed=k) for k in (4, 5))
    first = torch.tanh(linear(hidden, head))
    outer = torch.tanh(linear(first, weights[1])) + second
    values = [outer, linear(first, head), linear(hidden, around)]
    return Split(Graph(losses_of(values, count), [*weights, around, head]), [first, outer])


def edited_in_place(count: int) -> Split:
    weights, hidden, features = trunk()
    around = linear(hidden, weights[1]) * 1.0
    around[:, :3] = features[:, 3:6]
    around.mul_(2.0)
    return Split(Graph(losses_of([features, around], count), weights), [features])


def checkpointed(count: int) -> Split:
    weights, hidden, features = trunk()
    around = parameter(WIDTH, WIDTH, seed=4)
    passed = checkpoint(lambda value: linear(value, around).tanh(), hidden, use_reentrant=False)
    losses = losses_of([features, passed], count)
    return Split(Graph(losses, [*weights, around]), [features])


BUILDS = [
    skip,
    layer_around,
    layer_around_for_one,
    layer_from_the_start,
    tied,
    tied_and_skipped,
    output_of_a_layer,
    two_features,
    edited_in_place,
    checkpointed,
]
over_builds = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
over_counts = pytest.mark.parametrize("count", [2, 8])


def seeded(build: Callable[[int], Split], count: int) -> Split:
    torch.manual_seed(0)
    return build(count)


def assert_right(build: Callable[[], Split]) -> None:
    """The Gramian is that of gradients at the features; the gradient is that of the losses."""
    jacobian = naive_jacobian(build().graph)
    coefficients = drawn(len(jacobian), seed=7)
    for form in ("add_to_grad", "combined"):
        built = build()
        at_features = built.jacobian()
        linearization = built.linearize()
        gramian = linearization.gramian()
        if len(built.features) == 1:
            assert_same(gramian, at_features @ at_features.T)
        if form == "combined":
            linearization.combined(coefficients).backward()
        else:
            linearization.add_to_grad(coefficients)
        assert_same(gradient(built.graph), coefficients @ jacobian)


@over_builds
@over_counts
def test_what_passes_by_the_features_counts_once(build: Callable[[int], Split], count: int) -> None:
    assert_right(lambda: seeded(build, count))


@over_builds
def test_an_optimizer_writes_the_weighted_gradient(build: Callable[[int], Split]) -> None:
    jacobian, built = naive_jacobian(seeded(build, 3).graph), seeded(build, 3)
    sgd = torch.optim.SGD(built.graph.params, lr=0.1)
    optimizer = BalancedOptimizer(sgd, MGDA())
    losses = {str(k): loss for k, loss in enumerate(built.graph.losses)}
    optimizer.backward(losses, features=list(built.features))
    weights = torch.stack([*optimizer.metrics.coefficients.values()])
    assert_same(gradient(built.graph), weights @ jacobian)


def random_split(seed: int) -> Split:
    """Wide layers in any order, some tied, with features anywhere among them."""
    draw = random.Random(seed)
    weights = [parameter(WIDTH, WIDTH, seed=k) for k in range(4)]
    values = [torch.tanh(linear(drawn(SAMPLES, WIDTH, seed=9), weights[0]))]
    for _ in range(draw.randint(1, 7)):
        value, weight = draw.choice(values[-3:]), draw.choice(weights)
        kinds: list[Callable[[], Any]] = [
            lambda value=value, weight=weight: linear(value, weight),
            lambda value=value, weight=weight: linear(value, weight.T).tanh(),
            lambda value=value: value + draw.choice(values),
            lambda value=value: value.sin() * draw.choice(values),
        ]
        values.append(draw.choice(kinds)())
    features = draw.sample(values, draw.randint(1, min(2, len(values))))
    taken = [*features, *draw.sample(values, draw.randint(1, min(3, len(values))))]
    return Split(Graph(losses_of(taken, draw.randint(2, 5)), weights), features)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_random_graphs_with_features_have_the_naive_gradient(seed: int) -> None:
    built = random_split(seed)
    jacobian, coefficients = naive_jacobian(built.graph), drawn(len(built.graph.losses), seed=7)
    linearization = built.linearize(retain_graph=True)
    linearization.gramian()
    linearization.add_to_grad(coefficients)
    torch.testing.assert_close(gradient(built.graph), coefficients @ jacobian, rtol=1e-9, atol=1e-9)
