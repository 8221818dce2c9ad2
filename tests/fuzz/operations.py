"""The operations and reductions of random programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTHS = (1, 3, 8, 12, 16)


class Run(Protocol):
    """What an operation may ask of the run that it belongs to."""

    rows: int

    def param(self, *shape: int, seed: int, dtype: torch.dtype = ...) -> nn.Parameter: ...

    def weight(self, inputs: int, seed: int) -> tuple[Tensor, bool]: ...


def fit(value: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """The value with another width, by slicing or repeating it."""
    while value.shape[1] < width:
        value = torch.cat([value, value], dim=1)
    return value[:, :width].to(dtype or value.dtype)


# ------------------------------------------------------------ operations

Operation = Callable[[Run, Tensor, Tensor, int], Any]
OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


def _linear(weight: Tensor, transposed: bool, value: Tensor, bias: Tensor | None = None) -> Tensor:
    value = value.to(weight.dtype)
    if not transposed:
        return value @ weight if bias is None else torch.addmm(bias, value, weight)
    return F.linear(value, weight, bias)


@operation
def linear(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    weight, transposed = run.weight(a.shape[1], seed)
    outputs = weight.shape[0 if transposed else 1]
    bias = run.param(outputs, seed=seed + 1, dtype=weight.dtype) if seed % 4 < 2 else None
    return torch.tanh(_linear(weight, transposed, a, bias))


@operation
def linear_alone(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    return _linear(*run.weight(a.shape[1], seed), a) / 3


@operation
def linear_on_sequences(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    weight, transposed = run.weight(a.shape[1], seed)
    output = F.linear(a[None].to(weight.dtype), weight if transposed else weight.T)
    return torch.tanh(output)[0]


@operation
def tied(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    weight, transposed = run.weight(a.shape[1], seed)
    once = torch.tanh(_linear(weight, transposed, a))
    return torch.tanh(_linear(weight, not transposed, once))


@operation
def checkpointed(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    weight, transposed = run.weight(a.shape[1], seed)
    second = run.weight(weight.shape[0 if transposed else 1], seed + 1)

    def block(value: Tensor) -> Tensor:
        return torch.tanh(_linear(*second, torch.tanh(_linear(weight, transposed, value))))

    return checkpoint(block, a, use_reentrant=False)


@operation
def packed(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return linear(run, a, b, seed)


@operation
def skip(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    return (a + fit(b, a.shape[1])) / 2


@operation
def product(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    return torch.tanh(a * fit(b, a.shape[1]))


@operation
def in_place(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    whole = a * 1.0
    part = whole[:, : 1 + seed % a.shape[1]]
    part.mul_(0.5).add_(fit(b, part.shape[1]))
    whole[0] = fit(b, a.shape[1], a.dtype)[-1]
    return whole


@operation
def views(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    return a.T.reshape(a.shape[0], -1).flip(0).expand_as(a)


@operation
def pieces(run: Run, a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, ...]:
    cut = seed % a.shape[1]
    return tuple(piece for piece in a.split([cut, a.shape[1] - cut], dim=1) if piece.shape[1])


@operation
def moments(run: Run, a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, ...]:
    variance, mean = torch.var_mean(a, dim=1, keepdim=True, correction=0)
    return torch.tanh(variance), mean, a.max(dim=1, keepdim=True).values


@operation
def attention(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    other = fit(b, a.shape[1], a.dtype)
    return F.scaled_dot_product_attention(a[None], other[None], a[None])[0]


@operation
def normalised(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    weight = run.param(a.shape[1], seed=seed, dtype=a.dtype)
    if seed % 2 and len(a) > 1:
        mean, variance = torch.zeros_like(a[0]).detach(), torch.ones_like(a[0]).detach()
        return torch.tanh(F.batch_norm(a, mean, variance, weight, training=True, eps=0.1))
    return torch.tanh(F.layer_norm(a, a.shape[1:], weight, eps=0.1))


@operation
def embedding(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    table = run.param(5, WIDTHS[seed % len(WIDTHS)], seed=seed)
    indices = torch.arange(run.rows) * seed % 5
    # Halved, as PyTorch 2.13 loses a sparse gradient whose only value has a stride of zero.
    return F.embedding(indices, table, sparse=seed % 3 > 0) / 2


@operation
def narrow(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    # A copy: a value that is another one, too, could not be cut by itself.
    return a.float().sin().double() if seed % 2 else a.to(torch.float32, copy=True)


@operation
def detached(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    return a.detach() - fit(b, a.shape[1])


@operation
def hooked(run: Run, a: Tensor, b: Tensor, seed: int) -> Tensor:
    result = a * 1.0
    if result.requires_grad:
        result.register_hook(twice)
    return result


def twice(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else 2 * gradient


@operation
def several_outputs(run: Run, a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return TwoOutputs.apply(a, fit(b, a.shape[1], a.dtype))


class TwoOutputs(torch.autograd.Function):
    """Sum and sine of the first, with gradients that may be undefined."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a)
        return (a + b) / 2, a.sin()

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor | None, of_sine: Tensor | None) -> Any:
        (a,) = ctx.saved_tensors
        first = None if of_sum is None else of_sum / 2
        if of_sine is None:
            return first, first
        through_sine = of_sine * a.cos()
        return (through_sine if first is None else first + through_sine), first


# ------------------------------------------------------------ losses


class EditedGradient(torch.autograd.Function):
    """Twice the value; its backward pass works in the memory that it is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(2)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a.sum(),
    "square": lambda a, b: a.square().mean(),
    "entry": lambda a, b: a[0, 0],
    "exp": lambda a, b: a.exp().sum(),
    "both": lambda a, b: a.mean() * b.sin().sum(),
    "edited": lambda a, b: EditedGradient.apply(a.cos().mean()),
    "narrow": lambda a, b: a.float().square().sum(),
}
