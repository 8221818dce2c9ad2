"""Hooks of parameters see the balanced gradient, once, in every form of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from moo_balance import MGDA, BalancedOptimizer, BalanceError, Sum, SumLog
from moo_balance.engine import Streaming
from tests.support.engines import CutAt, everywhere
from tests.support.problems import jacobian, rows_of_batch

Losses = dict[str, Tensor]
Run = Callable[["Net", BalancedOptimizer, int], None]


class Edited(torch.autograd.Function):
    """The identity, whose backward pass writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output.mul_(0.5)


class Net(nn.Module):
    """A trunk, wide enough to be kept in factors, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 16, dtype=torch.float64)
        self.middle = nn.Linear(16, 16, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(16, 1, dtype=torch.float64) for _ in "ab")
        self.wrap: Callable[[Tensor], Tensor] = lambda loss: loss
        self.reentrant = False

    def losses(self, batch: int) -> Losses:
        rows = rows_of_batch(batch)[:2]
        inner = torch.tanh(self.trunk(rows[:, :3]))
        if self.reentrant:
            self.features = checkpoint(self.middle, inner, use_reentrant=True)
        else:
            self.features = self.middle(inner)
        return {
            name: self.wrap((head(self.features)[:, 0] - rows[:, 3]).square().mean() * (1 + 9 * k))
            for k, (name, head) in enumerate(zip("ab", self.heads, strict=True))
        }


def by_backward(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    optimizer.backward(net.losses(batch))


def by_closure(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    optimizer.backward(lambda: net.losses(batch))


def by_window(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    for number in range(2):
        with optimizer.accumulate():
            optimizer.backward(net.losses(batch + 10 * number))
    optimizer.backward(net.losses(batch + 20))


def by_combined_loss(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    optimizer.combined_loss(net.losses(batch)).backward()


def by_features(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    losses = net.losses(batch)
    optimizer.backward(losses, features=net.features)


def by_combined_features(net: Net, optimizer: BalancedOptimizer, batch: int) -> None:
    losses = net.losses(batch)
    optimizer.combined_loss(losses, features=net.features).backward()


# Each with a method, an engine, and the number of the step that is looked at.
FORMS: dict[str, tuple[Run, Any, Any, int]] = {
    "backward": (by_backward, MGDA(), None, 0),
    "closure": (by_closure, MGDA(), None, 0),
    "window": (by_window, MGDA(), None, 0),
    "window of losses": (by_window, SumLog(), None, 0),
    "window of known coefficients": (by_window, Sum(), None, 0),
    "combined": (by_combined_loss, MGDA(), None, 0),
    "combined, losses only": (by_combined_loss, SumLog(), None, 0),
    "combined, between": (by_combined_loss, MGDA(every=2), None, 1),
    "features": (by_features, MGDA(), None, 0),
    "features, combined": (by_combined_features, MGDA(), None, 0),
    "streaming": (by_backward, MGDA(), Streaming(), 0),
    "streaming, cut": (by_backward, MGDA(), CutAt(everywhere), 0),
    "streaming, combined": (by_combined_loss, MGDA(), CutAt(everywhere), 0),
    "between": (by_backward, MGDA(every=2), None, 1),
    "window, between": (by_window, MGDA(every=2), None, 1),
    "losses only": (by_backward, SumLog(), None, 0),
}
over_forms = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def prepared(form: Any) -> tuple[Net, BalancedOptimizer, Callable[[], None]]:
    """Ready for the step that is looked at."""
    run, method, engine, before = form
    net = Net()
    optimizer = BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), method, engine=engine)
    for batch in range(before):
        optimizer.zero_grad()
        run(net, optimizer, batch)
        optimizer.step()
    optimizer.zero_grad()
    return net, optimizer, lambda: run(net, optimizer, before)


def gradients_without_hooks(form: Any) -> list[Tensor]:
    """The weighted gradient, from the coefficients and the slow obvious Jacobian."""
    net, optimizer, take = prepared(form)
    run, _, _, batch = form
    params = list(net.parameters())
    batches = [batch, batch + 10, batch + 20] if run is by_window else [batch]
    rows = torch.stack([jacobian(net.losses(number), params) for number in batches]).sum(0)
    take()
    total = torch.stack([*optimizer.metrics.coefficients.values()]).to(rows) @ rows
    pieces = torch.split(total, [param.numel() for param in params])
    return [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]


@over_forms
def test_a_hook_on_a_parameter_sees_the_balanced_gradient_once(form: Any) -> None:
    expected = gradients_without_hooks(form)
    net, _, take = prepared(form)
    seen: dict[str, list[Tensor]] = {}
    limit = 0.3 * max(float(gradient.abs().max()) for gradient in expected)
    for name, param in net.named_parameters():
        seen[name] = []

        def clamp(gradient: Tensor, name: str = name) -> Tensor:
            seen[name].append(gradient.clone())
            return gradient.clamp(-limit, limit)

        param.register_hook(clamp)
    take()
    for (name, param), gradient in zip(net.named_parameters(), expected, strict=True):
        (found,) = seen[name]
        torch.testing.assert_close(found, gradient)
        torch.testing.assert_close(param.grad, gradient.clamp(-limit, limit))


def register(kind: str, param: Tensor, hook: Callable[..., None]) -> Any:
    """Register a hook of this kind; the result keeps it."""
    if kind == "post-accumulate":
        return param.register_post_accumulate_grad_hook(hook)
    node = get_gradient_edge(param).node
    return node, (node.register_hook if kind == "node" else node.register_prehook)(hook)


@over_forms
@pytest.mark.parametrize("kind", ["post-accumulate", "node", "before the node"])
def test_hooks_behind_the_gradient_run_once(form: Any, kind: str) -> None:
    """Those of parameters, and those of the nodes that accumulate their gradients."""
    expected = gradients_without_hooks(form)
    net, optimizer, take = prepared(form)
    optimizer._balancer.inspected.clear()  # hooks of nodes are looked for once
    optimizer._balancer.last_params = ()
    params, seen = list(net.parameters()), list[tuple[int, Any]]()
    kept = [
        register(kind, param, lambda *gradients, k=k: seen.append((k, gradients)))
        for k, param in enumerate(params)
    ]
    take()
    assert sorted(k for k, _ in seen) == list(range(len(kept)))
    for k, gradients in seen:
        if kind != "post-accumulate":  # which is given the parameter, cleared in the end or not
            torch.testing.assert_close(gradients[-1][0], expected[k])
        torch.testing.assert_close(params[k].grad, expected[k])


@over_forms
def test_an_optimizer_fused_into_the_backward_pass_trains_as_the_plain_loop(form: Any) -> None:
    run, method, engine, _ = form
    (net, fused), (twin, plain) = (
        (net, BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), method, engine=engine))
        for net in (Net(), Net())
    )
    for param in net.parameters():
        own = torch.optim.SGD([param], lr=0.01)

        def step(param: Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        param.register_post_accumulate_grad_hook(step)
    for batch in range(3):
        plain.zero_grad()
        for each in ((net, fused), (twin, plain)):
            run(*each, batch)
            each[1].step()
        assert all(param.grad is None for param in net.parameters())
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other)


@over_forms
def test_a_function_may_write_into_the_gradient_that_it_is_given(form: Any) -> None:
    """Nothing that is used again is handed to it: no start of a pass, no coefficients."""
    net, optimizer, take = prepared(form)
    net.wrap = Edited.apply
    take()
    run, _, _, batch = form
    params = list(net.parameters())
    batches = [batch, batch + 10, batch + 20] if run is by_window else [batch]
    coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
    twin, _, take_again = prepared(form)
    twin.wrap = lambda loss: 0.5 * loss + 0.5 * loss.detach()
    take_again()
    torch.testing.assert_close(optimizer.metrics.as_floats(), _.metrics.as_floats())
    rows = torch.stack(
        [jacobian(twin.losses(number), list(twin.parameters())) for number in batches]
    )
    total = coefficients.to(rows) @ rows.sum(0)
    found = torch.cat([param.grad.reshape(-1) for param in params])
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize("run", [by_backward, by_window, by_combined_loss])
def test_hooks_of_parameters_run_once_with_a_reentrant_checkpoint(run: Run) -> None:
    form = (run, MGDA(), None, 0)
    expected = gradients_without_hooks(form)
    net, _, take = prepared(form)
    net.reentrant = True
    seen: list[str] = []
    net.middle.weight.register_hook(lambda gradient: seen.append("tensor"))
    net.middle.weight.register_post_accumulate_grad_hook(lambda param: seen.append("post"))
    take()
    assert seen == ["tensor", "post"]
    for param, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


@pytest.mark.parametrize("run", [by_backward, by_window, by_combined_loss, by_features])
def test_hooks_of_nodes_are_refused_with_a_reentrant_checkpoint(run: Run) -> None:
    net, optimizer, take = prepared((run, MGDA(), None, 0))
    net.reentrant = True
    node = get_gradient_edge(net.middle.weight).node
    node.register_hook(lambda *gradients: None)
    with pytest.raises(BalanceError, match="AccumulateGrad nodes, and a reentrant checkpoint"):
        take()
    assert all(param.grad is None for param in net.parameters())
    assert optimizer.metrics.losses == {}


def test_hooks_are_there_again_after_an_error_within_a_pass() -> None:
    net, optimizer, _ = prepared((by_backward, MGDA(), None, 0))
    seen: list[Tensor] = []
    net.middle.weight.register_hook(seen.append)

    def fail(gradient: Tensor) -> None:
        raise KeyError

    losses = net.losses(0)
    net.features.register_hook(fail)
    with pytest.raises(KeyError):
        optimizer.backward(losses)
    optimizer.backward(net.losses(0))
    assert len(seen) == 1


def test_a_gradient_that_is_retained_at_an_activation_is_that_of_the_weighted_sum() -> None:
    """For a method without a Gramian; with one, it is the sum over separate passes."""
    for run in (by_backward, by_combined_loss):
        net, optimizer, _ = prepared((run, SumLog(), None, 0))
        losses = net.losses(0)
        net.features.retain_grad()
        rows = torch.stack(
            [
                torch.autograd.grad(each, net.features, retain_graph=True)[0]
                for each in losses.values()
            ]
        )
        net.features.grad = None
        if run is by_backward:
            optimizer.backward(losses)
        else:
            optimizer.combined_loss(losses).backward()
        coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
        torch.testing.assert_close(net.features.grad, torch.einsum("k,kij->ij", coefficients, rows))


@pytest.mark.parametrize("features", [False, True])
def test_a_graph_of_a_precomputed_gradient_is_refused(features: bool) -> None:
    net, optimizer, _ = prepared((by_backward, MGDA(), None, 0))
    losses = net.losses(0)
    combined = optimizer.combined_loss(losses, features=net.features if features else None)
    with pytest.raises(BalanceError, match="create_graph=True"):
        torch.autograd.grad(combined, [*net.parameters()], create_graph=True)
    combined.backward()  # still there


def test_without_a_gramian_a_combined_loss_can_be_differentiated_twice() -> None:
    net, optimizer, _ = prepared((by_backward, SumLog(), None, 0))
    combined = optimizer.combined_loss(net.losses(0))
    (gradient,) = torch.autograd.grad(combined, net.middle.weight, create_graph=True)
    gradient.square().sum().backward()
    assert bool(net.middle.weight.grad.abs().sum() > 0)


def test_nodes_of_a_parameter_are_inspected_once_and_forgotten_with_it() -> None:
    net, optimizer, _ = prepared((by_backward, MGDA(), None, 0))
    node, seen = get_gradient_edge(net.middle.weight).node, list[int]()
    node.register_hook(lambda *gradients: seen.append(1))
    for frozen in (net.trunk, net.middle, net.trunk):
        net.requires_grad_(True)
        frozen.requires_grad_(False)
        optimizer.backward(net.losses(0))
    assert len(seen) == 2
    assert set(optimizer._balancer.inspected) == set(net.parameters())
    optimizer.param_groups[0]["params"] = [*net.middle.parameters()]
    net.requires_grad_(True)
    optimizer.add_param_group({"params": [*net.trunk.parameters()]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.backward(net.losses(0))
    assert net.heads[0].weight not in optimizer._balancer.inspected
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["tensor", "post-accumulate"])
def test_sparse_gradients_reach_hooks(kind: str) -> None:
    table, seen = nn.Embedding(4, 2, sparse=True), list[Tensor]()
    optimizer = BalancedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), MGDA())
    if kind == "tensor":
        table.weight.register_hook(seen.append)
    else:
        table.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    rows = table(torch.tensor([0, 1]))
    optimizer.backward({"a": rows.sum(), "b": rows.square().sum()})
    (gradient,) = seen
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense(), table.weight.grad.to_dense())
