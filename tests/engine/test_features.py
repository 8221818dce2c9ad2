"""Gramians at shared features: the naive figures, the number of passes, and odd graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moo_balance import MGDA, BalancedOptimizer, BalanceError, BalanceValueError, Sum
from tests.support.engine_graphs import (
    Counted,
    Graph,
    assert_same,
    drawn,
    gradient,
    naive_jacobian,
    parameter,
)
from tests.support.feature_graphs import Split, nested, over_splits, plain, trunk


def coefficients(built: Split) -> Tensor:
    return drawn(len(built.graph.losses), seed=9)


@over_splits
@pytest.mark.parametrize("scale", [None, torch.tensor(2.0**10)], ids=["", "scaled"])
def test_a_feature_gramian_is_that_of_gradients_at_the_features(
    build: Callable[[], Split], scale: Any
) -> None:
    built = build()
    jacobian = built.jacobian()
    if jacobian.is_complex():
        jacobian = torch.view_as_real(jacobian).flatten(1)
    gramian = built.linearize(scale=scale).gramian()
    assert_same(gramian, jacobian @ jacobian.T)
    assert all(param.grad is None for param in built.graph.params)


@over_splits
@pytest.mark.parametrize("form", ["add_to_grad", "combined", "without a gramian"])
def test_features_lead_to_the_weighted_gradient(build: Callable[[], Split], form: str) -> None:
    expected, built = naive_jacobian(build().graph), build()
    linearization = built.linearize()
    if form != "without a gramian":
        linearization.gramian()
    if form == "combined":
        linearization.combined(coefficients(built)).backward()
    else:
        linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built.graph), coefficients(built) @ expected)


@over_splits
def test_with_features_gradients_that_are_there_are_added_to(build: Callable[[], Split]) -> None:
    expected, built = naive_jacobian(build().graph), build()
    for _ in range(2):
        linearization = built.linearize(retain_graph=True)
        linearization.gramian()
        linearization.add_to_grad(coefficients(built))
    assert_same(gradient(built.graph), 2 * coefficients(built) @ expected)


def counted() -> tuple[Split, dict[str, list[int]]]:
    passes = {name: [0] for name in ("encoder", "first", "second")}
    below, heads = parameter(4), [parameter(4, seed=k) for k in (1, 2)]
    features = Counted.apply(below.exp(), passes["encoder"])
    losses = [
        (features * Counted.apply(head, passes[name])).sum()
        for name, head in zip(("first", "second"), heads, strict=True)
    ]
    return Split(Graph(losses, [below, *heads]), [features]), passes


def test_with_features_heads_and_trunk_are_passed_once() -> None:
    built, passes = counted()
    linearization = built.linearize()
    linearization.gramian()
    assert passes == {"encoder": [0], "first": [1], "second": [1]}
    linearization.add_to_grad(torch.ones(2))
    assert passes == {"encoder": [1], "first": [1], "second": [1]}


def test_hooks_that_block_gradients_are_removed() -> None:
    built = nested()
    linearization = built.linearize(retain_graph=True)
    linearization.gramian()
    assert_same(naive_jacobian(built.graph), naive_jacobian(nested().graph))


def test_with_features_a_graph_that_is_not_retained_is_freed() -> None:
    built = plain()
    linearization = built.linearize()
    linearization.gramian()
    for loss in built.graph.losses:  # each has a head to itself
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    linearization.add_to_grad(torch.ones(2))
    with pytest.raises(RuntimeError, match="second time"):
        built.features[0].sum().backward()


# ---------------------------------------------------------------------- through the optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(3, 1, dtype=torch.float64) for _ in "ab")

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        self.features = torch.tanh(self.trunk(batch))
        return {
            name: (head(self.features) - k).square().mean()
            for k, (name, head) in enumerate(zip("ab", self.heads, strict=True))
        }


def optimizer_of(net: Net, weighting: Any = None, **arguments: Any) -> BalancedOptimizer:
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    return BalancedOptimizer(sgd, MGDA() if weighting is None else weighting, **arguments)


def test_weights_come_from_features_and_gradients_reach_all_parameters() -> None:
    net = Net()
    losses = net.losses(drawn(6, 4))
    rows = [
        torch.autograd.grad(loss, net.features, retain_graph=True)[0] for loss in losses.values()
    ]
    at_features = torch.stack([row.reshape(-1) for row in rows])
    jacobian = naive_jacobian(Graph(list(losses.values()), list(net.parameters())))
    optimizer = optimizer_of(net)
    optimizer.backward(losses, features=net.features)
    assert_same(optimizer.metrics.gramian, at_features @ at_features.T)
    weights = torch.stack([*optimizer.metrics.coefficients.values()])
    assert_same(gradient(Graph([], list(net.parameters()))), weights @ jacobian)
    optimizer.step()


@pytest.mark.parametrize("form", ["tensor", "list", "closure", "combine"])
def test_features_may_be_a_tensor_a_list_or_a_closure(form: str) -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    batch = drawn(6, 4)
    optimizer, reference = optimizer_of(net), optimizer_of(twin)
    losses = twin.losses(batch)
    reference.backward(losses, features=twin.features)
    if form == "closure":
        optimizer.backward(lambda: net.losses(batch), features=lambda: net.features)
    else:
        losses = net.losses(batch)
        features = [net.features] if form == "list" else net.features
        if form == "combine":
            optimizer.combined_loss(losses, features=features).backward()
        else:
            optimizer.backward(losses, features=features)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)


@pytest.mark.parametrize("weighting", [Sum(), MGDA(every=2)], ids=["Sum", "every"])
def test_features_change_nothing_where_no_gramian_is_needed(weighting: Any) -> None:
    net = Net()
    optimizer = optimizer_of(net, weighting)
    for _ in range(2):
        optimizer.zero_grad()
        losses = net.losses(drawn(6, 4))
        optimizer.backward(losses, features=net.features)
        optimizer.step()
    assert optimizer.metrics.gramian is None


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (torch.ones(3), r"`features`.*shape \(3,\) that requires no gradient"),
        ([], r"`features`.*Found none"),
        (["trunk"], r"`features`.*Found str"),
        (torch.ones(3, requires_grad=True), r"`features`.*loss `a`"),
    ],
)
def test_what_cannot_be_features_is_refused(features: Any, match: str) -> None:
    net = Net()
    with pytest.raises(BalanceValueError, match=match):
        optimizer_of(net).backward(net.losses(drawn(6, 4)), features=features)
    assert all(param.grad is None for param in net.parameters())


def test_a_loss_that_does_not_depend_on_features_is_named() -> None:
    net = Net()
    losses = {**net.losses(drawn(6, 4)), "decay": net.heads[0].weight.square().sum()}
    with pytest.raises(BalanceValueError, match="loss `decay` depends on"):
        optimizer_of(net).backward(losses, features=net.features)


def test_features_and_shared_params_are_refused_together() -> None:
    net = Net()
    optimizer = optimizer_of(net, shared_params=net.trunk)
    losses = net.losses(drawn(6, 4))
    with pytest.raises(BalanceValueError, match=r"`features`.*`shared_params=`"):
        optimizer.backward(losses, features=net.features)


def test_features_are_refused_in_a_window_from_first_to_last() -> None:
    net = Net()
    optimizer = optimizer_of(net)
    with optimizer.accumulate(), pytest.raises(BalanceValueError, match="accumulate"):
        optimizer.backward(net.losses(drawn(6, 4)), features=lambda: net.features)
    with optimizer.accumulate():
        optimizer.backward(net.losses(drawn(6, 4)))
    with pytest.raises(BalanceValueError, match="accumulate"):
        optimizer.backward(net.losses(drawn(6, 4)), features=lambda: net.features)


def test_a_reentrant_checkpoint_in_a_head_is_refused() -> None:
    weight, features = trunk()
    head = parameter(3, seed=1)
    output = checkpoint(lambda x: x @ head, features, use_reentrant=True)
    built = Split(Graph([output.sum(), features.sum()], [weight, head]), [features])
    with pytest.raises(BalanceError, match="reentrant checkpoint"):
        built.linearize().gramian()


def test_a_hook_on_a_feature_is_refused() -> None:
    built = plain()
    built.features[0].register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(BalanceError, match="hook on a feature"):
        built.linearize().gramian()
