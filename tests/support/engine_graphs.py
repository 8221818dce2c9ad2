"""Graphs that an engine may meet, one function each, and the naive way to differentiate them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moo_balance.engine import Problem
from moo_balance.engine.autograd import silence_hooks


@dataclass
class Graph:
    """Losses, parameters, and memory that belongs to the user, with a copy of it."""

    losses: Sequence[Tensor]
    params: Sequence[Tensor]
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def problem(self, **arguments: Any) -> Problem:
        names = [f"loss {k}" for k in range(len(self.losses))]
        return Problem(names=names, losses=self.losses, params=self.params, **arguments)


GRAPHS: dict[str, Callable[[], Graph]] = {}


def graph(build: Callable[[], Graph]) -> Callable[[], Graph]:
    GRAPHS[build.__name__] = build
    return build


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-12, atol=1e-12 * (1 + float(expected.abs().max()))
    )


def naive_jacobian(built: Graph) -> Tensor:
    """Row after row by ``loss.backward()``, shape [K, P]; ends with no gradients."""
    rows = []
    for loss in built.losses:
        clear(built)
        loss.backward(retain_graph=True)
        rows.append(gradient(built))
    clear(built)
    return torch.stack(rows)


def unhooked_jacobian(built: Graph) -> Tensor:
    """The same without the hooks of parameters, which are for the balanced gradient alone."""
    with silence_hooks(built.params):
        return naive_jacobian(built)


def clear(built: Graph) -> None:
    for param in built.params:
        param.grad = None


def gradient(built: Graph) -> Tensor:
    """``.grad`` of all parameters as one real vector."""
    return torch.cat([_flat(param, param.grad) for param in built.params])


def _flat(param: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        grad = torch.zeros_like(param)
    if grad.is_sparse:
        grad = grad.to_dense()
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.detach().double().reshape(-1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed, dtype=dtype))


@graph
def shared() -> Graph:
    first, second = parameter(4, 5), parameter(5, 3, seed=1)
    output = torch.tanh(drawn(6, 4, seed=2) @ first) @ second
    return Graph([output.square().mean(), output.abs().sum(), output[0, 0]], [first, second])


@graph
def unshared() -> Graph:
    params = [parameter(3, seed=k) for k in range(3)]
    return Graph([p.exp().sum() for p in params], params)


@graph
def partly_shared() -> Graph:
    trunk, heads = parameter(4, 3), [parameter(3, seed=k) for k in (1, 2)]
    features = drawn(5, 4, seed=3) @ trunk
    return Graph([(features @ head).square().mean() for head in heads], [trunk, *heads])


@graph
def tied() -> Graph:
    weight = parameter(4, 3)
    code = torch.tanh(drawn(5, 4, seed=1) @ weight)
    return Graph([(code @ weight.T).square().sum(), code.sum()], [weight])


@graph
def unused() -> Graph:
    used, idle = parameter(3), parameter(2, seed=1)
    return Graph([used.sum(), used.square().sum()], [idle, used])


@graph
def in_place() -> Graph:
    first, second = parameter(4), parameter(4, seed=1)
    hidden = first * 2.0
    hidden.mul_(second).add_(first.sin())
    hidden[1] = second[0] * first[3]
    return Graph([hidden.sum(), hidden.relu_().square().sum()], [first, second])


@graph
def used_twice() -> Graph:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(drawn(3, 3))
        layer.bias.copy_(drawn(3, seed=1))
    once = torch.tanh(layer(drawn(4, 3, seed=2)))
    twice = torch.tanh(layer(once))
    return Graph([once.sum(), twice.square().sum()], list(layer.parameters()))


@graph
def control_flow() -> Graph:
    weight, gate = parameter(4), parameter(4, seed=1)
    value = weight
    while value.detach().norm() < 30:
        value = value * 1.7 if value.detach().sum() > 0 else value + gate.square()
    return Graph(
        [value.sum(), (weight if gate.detach()[0] > 0 else gate).square().sum()], [weight, gate]
    )


@graph
def expanded() -> Graph:
    """Gradients with stride zero, and one tensor handed out for two parameters."""
    a, b = parameter(3, 2), parameter(3, 2, seed=1)
    return Graph([(a + b).sum(), a.sum(), b.mean(), (a - b).square().sum()], [a, b])


@graph
def handed_out() -> Graph:
    """A function that keeps a reference to the gradient that it returns."""
    weight, held = parameter(4), []

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
            ctx.factor = factor
            return (value * factor).sum()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
            result = ctx.factor * upstream
            held.append((result, result.clone()))
            return result, None

    factor = drawn(4, seed=1)
    held.append((factor, factor.clone()))
    one = Keeping.apply(weight, factor)
    return Graph([one, Keeping.apply(weight, factor.flip(0)) + one], [weight], held)


@graph
def saved() -> Graph:
    """Gradients that are the user's own tensors, as the backward of a product returns them."""
    weight, x = parameter(4), drawn(4, seed=1)
    seen = [(x, x.clone()), (weight, weight.detach().clone())]
    return Graph([weight @ x, (weight * x)[2:].sum(), weight @ weight.detach()], [weight], seen)


@graph
def sparse() -> Graph:
    table = nn.Embedding(6, 3, sparse=True, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(drawn(6, 3))
    first, second = table(torch.tensor([0, 2, 2, 5])), table(torch.tensor([2, 3]))
    return Graph([first.square().sum(), second.exp().sum(), first.sum()], [table.weight])


@graph
def sparse_and_dense() -> Graph:
    table, layer = nn.Embedding(6, 3, sparse=True, dtype=torch.float64), parameter(3, seed=1)
    with torch.no_grad():
        table.weight.copy_(drawn(6, 3))
    looked_up = table(torch.tensor([0, 2, 2]))
    return Graph(
        [(looked_up @ layer).sum(), (table.weight @ layer).square().sum(), looked_up.sum()],
        [table.weight, layer],
    )


@graph
def dense_and_sparse() -> Graph:
    built = sparse_and_dense()
    return Graph(list(built.losses)[::-1][1:], built.params)


@graph
def many() -> Graph:
    """More losses than one would multiply pair by pair, each with parameters of its own choice."""
    params = [parameter(3, seed=k) for k in range(7)]
    losses = [
        sum((p * (k + 1)).sin().sum() for j, p in enumerate(params) if (j + k) % 3)
        for k in range(9)
    ]
    return Graph(losses, params)


@graph
def many_sparse_and_dense() -> Graph:
    table, other = nn.Embedding(6, 3, sparse=True, dtype=torch.float64), parameter(3, seed=1)
    with torch.no_grad():
        table.weight.copy_(drawn(6, 3))
    rows = [table(torch.tensor([k % 6, 2])) @ other for k in range(6)]
    losses = [table.weight.square().sum(), *(row.exp().sum() for row in rows)]
    return Graph(losses, [table.weight, other])


@graph
def complex_valued() -> Graph:
    weight = parameter(3, dtype=torch.complex128)
    x = drawn(3, seed=1, dtype=torch.complex128)
    product = weight * x
    return Graph(
        [product.real.sum(), product.abs().square().sum(), weight.conj().imag.sum()], [weight]
    )


@graph
def channels_last() -> Graph:
    layer = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(drawn(3, 2, 3, 3))
        layer.bias.copy_(drawn(3, seed=2))
    layer = layer.to(memory_format=torch.channels_last)
    image = drawn(2, 2, 5, 5, seed=1).to(memory_format=torch.channels_last)
    output = layer(image)
    return Graph([output.square().mean(), output[:, 0].sum()], list(layer.parameters()))


@graph
def transposed() -> Graph:
    weight = nn.Parameter(drawn(4, 3).T)
    output = weight @ drawn(4, 2, seed=1)
    return Graph([output.square().sum(), output[0].sum()], [weight])


@graph
def normalised() -> Graph:
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    weight = parameter(4, 3)
    output = layer(drawn(6, 4, seed=1) @ weight)
    return Graph([output.exp().mean(), output[:2].square().sum()], [weight, *layer.parameters()])


@graph
def checkpointed() -> Graph:
    return _checkpointed(use_reentrant=False)


@graph
def checkpointed_reentrant() -> Graph:
    return _checkpointed(use_reentrant=True)


def _checkpointed(use_reentrant: bool) -> Graph:
    first, second = parameter(4, 4), parameter(4, seed=1)
    x = drawn(3, 4, seed=2).requires_grad_()
    hidden = checkpoint(lambda x: torch.tanh(x @ first), x, use_reentrant=use_reentrant)
    return Graph([(hidden @ second).square().sum(), hidden.exp().mean()], [first, second])


@graph
def hooked() -> Graph:
    """A hook on a parameter, as one uses to clip or to freeze a part of it."""
    weight = parameter(4)
    weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0, 2.0, 1.0]))
    return Graph([weight.square().sum(), weight.sum()], [weight])


Hook = Callable[[Tensor], Tensor]


def doubled(gradient: Tensor) -> Tensor:
    return 2 * gradient


@graph
def hooked_and_tied(hook: Hook = doubled) -> Graph:
    """A hook on a parameter that is used in several places."""
    weight = parameter(4, 4)
    weight.register_hook(hook)
    once = torch.tanh(drawn(3, 4, seed=1) @ weight)
    twice = torch.tanh(once @ weight)
    return Graph([twice.square().sum(), twice.sum(), once.sum()], [weight])


@graph
def hooked_in_between(hook: Hook = doubled) -> Graph:
    """Hooks on what is passed on to two places, and to one; one that keeps its gradient."""
    weights = [parameter(4, 4, seed=k) for k in range(4)]
    stream = drawn(3, 4, seed=4) @ weights[0]
    stream.register_hook(hook)
    inner = torch.tanh(stream @ weights[1])
    inner.register_hook(hook)
    outer = stream + inner @ weights[2]
    outer.retain_grad()
    out = torch.tanh(outer @ weights[3])
    return Graph([out.square().sum(), out.sum(), stream.exp().mean()], weights)


@graph
def bare() -> Graph:
    """Losses that are parameters themselves."""
    a, b = parameter(), parameter(seed=1)
    return Graph([a, b, a], [a, b])


class Halves(torch.autograd.Function):
    """Two outputs, of whose gradients one may be missing, but not both."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, weight)
        return value * weight, value + weight

    @staticmethod
    def backward(ctx: Any, product: Tensor | None, total: Tensor | None) -> tuple[Tensor, Tensor]:
        value, weight = ctx.saved_tensors
        if product is None:
            assert total is not None
            return total, total
        rest = 0.0 if total is None else total
        return product * weight + rest, product * value + rest


@graph
def undefined() -> Graph:
    """A function whose outputs are used in different places, the second further down."""
    weights = [parameter(4, seed=k) for k in range(4)]
    product, total = Halves.apply(weights[0].exp(), weights[1])
    lower = torch.tanh(total * weights[2])
    upper = lower.sin() * weights[3] + product
    return Graph([upper.square().sum(), lower.exp().sum(), upper.sum() + total.sum()], weights)


@graph
def duplicated() -> Graph:
    weight = parameter(3)
    loss = weight.exp().sum()
    return Graph([loss, loss, weight.sum(), loss], [weight])


@graph
def single() -> Graph:
    weight = parameter(3)
    return Graph([weight.exp().sum()], [weight])


@graph
def elsewhere() -> Graph:
    """A loss that reaches none of the parameters, only those of another optimizer."""
    mine, theirs = parameter(3), parameter(3, seed=1)
    return Graph([(mine * theirs.detach()).sum(), theirs.sum(), mine.square().sum()], [mine])


@graph
def orthogonal() -> Graph:
    """Gradients that vanish somewhere, or everywhere."""
    weight = parameter(4)
    return Graph([weight[:2].sum(), weight[2:].sum(), (weight * 0).sum()], [weight])


def _wide(*losses: Callable[[Tensor], Tensor]) -> Graph:
    """Few samples and wide layers, where factors are cheaper than gradients."""
    first, second = nn.Linear(9, 8, dtype=torch.float64), nn.Linear(8, 7, dtype=torch.float64)
    heads = [parameter(7, 3, seed=k) for k in range(len(losses))]
    with torch.no_grad():
        for k, param in enumerate([*first.parameters(), *second.parameters()]):
            param.copy_(drawn(*param.shape, seed=10 + k))
    features = second(torch.tanh(first(drawn(2, 9, seed=3))))
    values = [loss(features @ head) for loss, head in zip(losses, heads, strict=True)]
    return Graph(values, [*first.parameters(), *second.parameters(), *heads])


@graph
def wide() -> Graph:
    return _wide(Tensor.sum, lambda out: out.square().sum(), lambda out: out.exp().mean())


@graph
def hooked_beside_a_way_around(hook: Hook = doubled) -> Graph:
    """Hooks, of a tensor and of a module, within a block that the stream also passes by."""
    weights = [parameter(4, 4, seed=k) for k in range(4)]
    module = nn.Tanh()
    module.register_full_backward_hook(lambda module, entering, leaving: (hook(entering[0]),))
    stream = torch.tanh(drawn(3, 4, seed=4) @ weights[0])
    inner = torch.tanh(stream @ weights[1])
    inner.register_hook(hook)
    outer = stream + torch.tanh(inner @ weights[2])
    out = outer + module(module(outer) @ weights[3])
    return Graph([out.square().sum(), out.sum(), stream.exp().mean()], weights)


@graph
def wide_and_hooked(hook: Hook = doubled) -> Graph:
    """Hooks on the outputs of wide layers, the first of which has nothing but its weight."""
    weights = [parameter(8, 9), parameter(8, 8, seed=1), parameter(8, 7, seed=2)]
    value = drawn(2, 9, seed=3) @ weights[0].T
    for weight in weights[1:]:
        value.register_hook(hook)
        value = torch.tanh(value) @ weight
    value.register_hook(hook)
    return Graph([value.sum(), value.square().sum(), value.exp().mean()], weights)


@graph
def wide_on_an_empty_batch() -> Graph:
    """An expert that gets no samples."""
    weight, expert = parameter(4, 3), parameter(4, 5, seed=1)
    samples = drawn(2, 4, seed=2)
    common, special = samples @ weight, samples[samples.sum(1) > 1e9] @ expert
    return Graph(
        [common.sum() + special.sum(), common.square().sum() - special.sum()], [weight, expert]
    )


@graph
def wide_without_samples_for_one() -> Graph:
    """A loss that reaches nothing but a head, and one whose gradient is zero."""
    built = _wide(lambda out: out.square().sum(), lambda out: 0.0 * out.sum(), Tensor.sum)
    return Graph([*built.losses, built.params[-1].square().sum()], built.params)


@graph
def wide_and_tied() -> Graph:
    """A wide weight that a second product uses, and one that is used outside of any."""
    weight, other = parameter(8, 9), parameter(9, 8, seed=1)
    hidden = torch.tanh(drawn(2, 9, seed=3) @ weight.T)
    out = torch.tanh(hidden @ weight) @ other
    return Graph([out.sum(), out.square().sum(), hidden.sum() + other.sum()], [weight, other])


@graph
def wide_sequences() -> Graph:
    """Linear layers on more than two dimensions, with and without bias."""
    first, second = (
        nn.Linear(12, 12, dtype=torch.float64),
        nn.Linear(12, 12, False, dtype=torch.float64),
    )
    with torch.no_grad():
        for k, param in enumerate([*first.parameters(), *second.parameters()]):
            param.copy_(drawn(*param.shape, seed=k))
    out = second(first(drawn(1, 3, 12, seed=5)).sin())
    return Graph(
        [out.sum(), out[:, 1:].square().sum(), out[..., 0].exp().sum()],
        [*first.parameters(), *second.parameters()],
    )


# ---------------------------------------------------------------------- counting passes


class Counted(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, passes: list[int]) -> Tensor:
        ctx.passes = passes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.passes[0] += 1
        return upstream, None


def counted() -> tuple[Graph, list[int], list[list[int]]]:
    """Two heads on a trunk, and how often each was passed."""
    trunk_passes, head_passes = [0], [[0], [0]]
    trunk, heads = parameter(4), [parameter(4, seed=k) for k in (1, 2)]
    features = Counted.apply(trunk.exp(), trunk_passes)
    losses = [
        (features * Counted.apply(head, passes)).sum()
        for head, passes in zip(heads, head_passes, strict=True)
    ]
    return Graph(losses, [trunk, *heads]), trunk_passes, head_passes
