"""What an engine takes and gives: problems, linearizations, windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moo_balance.engine.autograd import explain_donated_buffers
from moo_balance.errors import BalanceError

if TYPE_CHECKING:
    from moo_balance.engine.distributed import RowAverager

Row: TypeAlias = Sequence[Tensor | None]
"""The gradient of one loss, parameter by parameter; None where the loss does not reach it."""


class Problem(NamedTuple):
    """K losses, and the parameters whose gradients are to be balanced.

    Args:
        names: What the losses are called.
        losses: K 0-d tensors, attached to a graph.
        params: The parameters that receive gradients; all require them.
        compared: Positions in `params` of those over which inner products are taken
            (``shared_params=`` of ``BalancedOptimizer``); None for all.
        scale: What every gradient is multiplied by on its way through the graph, as
            ``GradScaler`` does against underflow; None for 1. Gramians are free of it, gradients
            written to ``.grad`` carry it.
        retain_graph: Keep the graph for another pass.
        averager: Averages gradients over ranks; None for one process.
        features: Tensors through which all losses are computed; empty if none were named.
        stacked: The losses as one vector [K], as ``stack_losses`` gives it; None to stack them
            when they are needed.
    """

    names: Sequence[str]
    losses: Sequence[Tensor]
    params: Sequence[Tensor]
    compared: Collection[int] | None = None
    scale: Tensor | None = None
    retain_graph: bool = False
    averager: RowAverager | None = None
    features: Sequence[Tensor] = ()
    stacked: Tensor | None = None

    def grad_outputs(self) -> list[Tensor]:
        """What the backward pass of each single loss starts from: the scale."""
        outputs: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for loss in self.losses:
            kind = loss.device, loss.dtype
            if kind not in outputs:
                one = torch.ones((), device=loss.device, dtype=loss.dtype)
                outputs[kind] = one if self.scale is None else self.scale.to(one)
        return [outputs[loss.device, loss.dtype] for loss in self.losses]


def is_distributed() -> bool:
    """Whether ``torch.distributed`` is initialised."""
    return dist.is_available() and dist.is_initialized()


def stack_losses(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one vector [K], attached to their graph if they have one.

    It is a single root for a backward pass, which starts from the vector of coefficients. Losses
    of different kinds meet on the first one's device, in the widest of their precisions.
    """
    with torch.enable_grad():  # `backward` works under no_grad, as a plain one does
        if len({(loss.dtype, loss.device) for loss in losses}) > 1:
            dtype = reduce(torch.promote_types, [loss.dtype for loss in losses])
            losses = [loss.to(losses[0].device, dtype) for loss in losses]
        return torch.stack(tuple(losses))


class Linearization(ABC):
    """The losses to first order: their Gramian, and any combination of their gradients."""

    @abstractmethod
    def gramian(self) -> Tensor:
        """Inner products of the K gradients, shape [K, K], float32 or better, unscaled."""

    @abstractmethod
    def add_to_grad(self, coefficients: Tensor) -> None:
        r"""Add :math:`\sum_k c_k \nabla L_k` to ``.grad``. `coefficients` has shape [K]."""

    @abstractmethod
    def combined(self, coefficients: Tensor) -> Tensor:
        r"""The scalar :math:`\sum_k c_k L_k`, with a graph and without any scale."""


class Window(ABC):
    """Several micro-batches whose gradients add up."""

    @abstractmethod
    def add(self, problem: Problem) -> None:
        """Differentiate one more micro-batch."""

    @abstractmethod
    def close(self, problem: Problem) -> Linearization:
        """The window together with its last micro-batch, which is differentiated when needed."""


class Engine(ABC):
    """Computes gradients. It depends on autograd and memory, and on no method."""

    @abstractmethod
    def linearize(self, problem: Problem) -> Linearization:
        """Prepare to differentiate; nothing is computed before it is requested."""

    def window(self) -> Window:
        """An empty window of micro-batches, for gradient accumulation."""
        raise BalanceError(
            "Gradient accumulation should use an engine that keeps one gradient per loss. Found "
            f"{self}. Leave out `engine=` to have PerLoss()."
        )


def weighted_sum(problem: Problem, coefficients: Tensor) -> Tensor:
    """The weighted sum of the losses as one scalar."""
    losses = stack_losses(problem.losses) if problem.stacked is None else problem.stacked
    with torch.enable_grad():
        return (losses * coefficients.to(losses)).sum()


def weighted_backward(problem: Problem, coefficients: Tensor) -> None:
    """One ordinary backward pass of the weighted sum.

    It runs through ``torch.autograd.backward``, so hooks, data parallelism, sharding and sparse
    gradients behave as they do without balancing.
    """
    losses = stack_losses(problem.losses) if problem.stacked is None else problem.stacked
    if problem.scale is not None:
        # Not in the losses' own precision: a float16 does not hold a scaler's 65536.
        coefficients = coefficients * problem.scale.to(coefficients)
    torch.autograd.backward(losses, coefficients.to(losses), retain_graph=problem.retain_graph)


def gradients_of(
    roots: Sequence[Any], grad_outputs: Sequence[Tensor], inputs: Sequence[Any], retain_graph: bool
) -> Row:
    """``autograd.grad`` from tensors or edges to tensors or edges; None where nothing arrives.

    It writes no ``.grad`` and runs no post-accumulate hook.
    """
    if not inputs:  # all parameters are frozen
        return ()
    try:
        return torch.autograd.grad(
            roots, inputs, grad_outputs, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        explain_donated_buffers(error)
        raise


def gradients_through_hooks(
    roots: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    retain_graph: bool,
) -> Row:
    """As :func:`gradients_of`, by way of ``backward`` and ``.grad``, where hooks do the work."""
    before = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        torch.autograd.backward(roots, grad_outputs, retain_graph=retain_graph)
        return [param.grad for param in params]
    finally:
        for param, gradient in zip(params, before, strict=True):
            param.grad = gradient


def add_rows(left: Row, right: Row) -> Row:
    """Sum of two gradients, parameter by parameter."""
    return [_sum(a, b) for a, b in zip(left, right, strict=True)]


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return right + left if left.is_sparse else left + right


def add_to_grad(total: Row, params: Sequence[Tensor]) -> None:
    """Add a gradient to ``.grad`` of `params`, or store it there: it must not be used elsewhere."""
    for param, gradient in zip(params, total, strict=True):
        if gradient is None:
            continue
        if param.grad is None:
            param.grad = gradient
        elif param.grad.is_sparse and not gradient.is_sparse:
            param.grad = gradient.add_(param.grad)  # a sparse tensor cannot take in a dense one
        else:
            param.grad.add_(gradient)


def remove_loss_scale(gramian: Tensor, scale: Tensor | None) -> Tensor:
    """The Gramian of the unscaled gradients: the scale enters both sides of every product."""
    return gramian if scale is None else gramian / (factor := scale.to(gramian)) / factor


def precomputed_gradient(value: Tensor, gradients: Row, params: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose backward pass returns `gradients` to `params`.

    They arrive as any gradient does: scaled by what the backward pass starts from, added to
    ``.grad``, seen by hooks. So a training loop calls ``backward`` on it as on any loss.
    """
    reached = [(g, p) for g, p in zip(gradients, params, strict=True) if g is not None]
    return _Precomputed.apply(value, [g for g, _ in reached], *(p for _, p in reached))  # type: ignore[no-any-return, no-untyped-call]


class _Precomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, None, *(g * grad_output.to(g.device, g.dtype) for g in ctx.gradients)
