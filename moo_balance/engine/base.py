"""What an engine takes and gives: problems, linearizations, windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import reduce
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.autograd import (
    explain_second_pass,
    hooked_positions,
    hooks_of_parameter,
)
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
        node_hooks: Positions of the parameters at whose graph nodes hooks are registered. Other
            hooks are found without it.
        whole_rows: The method looks at single coordinates of the gradients, which are kept whole.
        measured: Whether inner products may be requested. A window that takes those of its
            micro-batches one by one spares them otherwise.
        independent: The method that asks for inner products of gradients of different batches only,
            by its name; empty if none does.
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
    node_hooks: Collection[int] = ()
    whole_rows: bool = False
    measured: bool = True
    independent: str = ""

    def grad_outputs(self) -> list[Tensor]:
        """What the backward pass of each single loss starts from: the scale.

        Each is a tensor of its own: a function of the user's may write into what it is given.
        """
        if self.scale is None:
            return [torch.ones((), device=each.device, dtype=each.dtype) for each in self.losses]
        return [self.scale.to(each.device, each.dtype, copy=True) for each in self.losses]


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
    """The losses to first order: their Gramian, and any combination of their gradients.

    Attributes:
        projected: How much a projection has removed from the Gramian, compared with its norm, as a
            0-d tensor; None if it is none that is projected.
    """

    projected: Tensor | None = None

    @abstractmethod
    def gramian(self) -> Tensor:
        """Inner products of the K gradients, shape [K, K], float32 or better, unscaled.

        Where the problem asks for independent batches, an unbiased estimate of the inner products
        of expected gradients.
        """

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

    @property
    def separates_batches(self) -> bool:
        """Whether it can take inner products of gradients of different batches only."""
        return False

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
    """The weighted sum of the losses as one scalar, in float32 or better."""
    losses = stack_losses(problem.losses) if problem.stacked is None else problem.stacked
    with torch.enable_grad():
        return weigh_losses(losses, coefficients).sum()


def weigh_losses(losses: Tensor, coefficients: Tensor) -> Tensor:
    """Losses times coefficients, in float32 or better: these may be too large for float16."""
    return losses * coefficients.to(torch.promote_types(losses.dtype, torch.float32))


def weighted_backward(problem: Problem, coefficients: Tensor) -> None:
    """One ordinary backward pass of the weighted sum.

    It runs through ``torch.autograd.backward``, so hooks, data parallelism, sharding and sparse
    gradients behave as they do without balancing.
    """
    losses, grad_outputs = weighted_root(problem, coefficients)
    torch.autograd.backward(losses, grad_outputs, retain_graph=problem.retain_graph)


def weighted_root(problem: Problem, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The losses as one vector, and what a backward pass of their weighted sum starts from."""
    losses = stack_losses(problem.losses) if problem.stacked is None else problem.stacked
    if problem.scale is not None:
        # Not in the losses' own precision: a float16 does not hold a scaler's 65536.
        coefficients = coefficients * problem.scale.to(coefficients)
    # A copy, since a function of the user's may write into it.
    return losses, coefficients.to(losses, copy=True)


def gradients_of(
    roots: Sequence[Any], grad_outputs: Sequence[Tensor], inputs: Sequence[Any], retain_graph: bool
) -> Row:
    """``autograd.grad`` from tensors or edges to tensors or edges; None where nothing arrives.

    It writes no ``.grad`` and runs no hook of a parameter but those on its gradient, which callers
    silence.
    """
    if not inputs:  # all parameters are frozen
        return ()
    try:
        return torch.autograd.grad(
            roots, inputs, grad_outputs, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        explain_second_pass(error)
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
    return [add_gradients(a, b) for a, b in zip(left, right, strict=True)]


def add_gradients(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of two gradients of one parameter."""
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


def deliver(total: Row, problem: Problem) -> None:
    """Add the balanced gradient to ``.grad``, where hooks of parameters see it, once.

    `total` must not be used elsewhere.
    """
    params = problem.params
    hooked = {*hooked_positions(params), *problem.node_hooks}
    if not hooked:
        add_to_grad(total, params)
        return
    add_to_grad([None if k in hooked else g for k, g in enumerate(total)], params)
    reached = [(params[k], g) for k in sorted(hooked) if (g := total[k]) is not None]
    # On several ranks a pass through autograd would start the averaging of a data-parallel model.
    # And it takes no parameter that was frozen within a window.
    passes = [problem.averager is None and param.requires_grad for param, _ in reached]
    if any(passes):
        roots, grads = zip(*compress(reached, passes), strict=True)
        torch.autograd.backward(roots, grads)
    for (param, gradient), passed in zip(reached, passes, strict=True):
        if not passed:
            _accumulate(param, gradient)


def node_hooks_error(obstacle: str) -> BalanceError:
    """The error where hooks of graph nodes cannot be run once, on the balanced gradient."""
    return BalanceError(
        "Hooks should be registered on the parameters themselves here. Found some on their "
        f"AccumulateGrad nodes, and {obstacle}. Use `register_hook` or "
        "`register_post_accumulate_grad_hook` of the parameter, or a method without a Gramian."
    )


@torch.no_grad()
def _accumulate(param: Tensor, gradient: Tensor) -> None:
    """Add to ``.grad`` of one parameter, and run its hooks as autograd does."""
    hooks = hooks_of_parameter(param)
    for hook in list(hooks.of_tensor.values()):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    add_to_grad([gradient], [param])
    for hook in list(hooks.post_accumulate.values()):
        hook(param)


def remove_loss_scale(gramian: Tensor, scale: Tensor | None) -> Tensor:
    """The Gramian of the unscaled gradients: the scale enters both sides of every product."""
    return gramian if scale is None else gramian / (factor := scale.to(gramian)) / factor


def precomputed_gradient(value: Tensor, gradients: Row, problem: Problem) -> Tensor:
    """A scalar equal to `value` whose backward pass returns `gradients` to the parameters.

    They arrive as any gradient does: scaled by what the backward pass starts from, added to
    ``.grad``, seen by hooks. So a training loop calls ``backward`` on it as on any loss.

    On several ranks, which have averaged the gradients, they are written to ``.grad`` directly:
    returned to the parameters, they would start the averaging of a data-parallel model.
    """
    # An input that requires a gradient in any case: the losses may reach no parameter.
    start = torch.zeros((), device=value.device, requires_grad=True)
    if problem.averager is not None:
        return _Precomputed.apply(value, gradients, problem, start)  # type: ignore[no-any-return, no-untyped-call]
    reached = [(g, p) for g, p in zip(gradients, problem.params, strict=True) if g is not None]
    params = [p for _, p in reached]
    return _Precomputed.apply(value, [g for g, _ in reached], None, start, *params)  # type: ignore[no-any-return, no-untyped-call]


class _Precomputed(torch.autograd.Function):
    """The value, whose gradient goes to the inputs, or, given a problem, into ``.grad``."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Row, problem: Problem | None, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.problem = gradients, problem
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise BalanceError(
                "The gradient of a `combined_loss` whose weights come from a Gramian has no graph: "
                "it is computed before. Found `create_graph=True`. Differentiate the losses "
                "themselves, or use a method without a Gramian."
            )
        scaled = [
            None if gradient is None else gradient * grad_output.to(gradient.device, gradient.dtype)
            for gradient in ctx.gradients
        ]
        if ctx.problem is None:
            return None, None, None, None, *scaled
        deliver(scaled, ctx.problem)
        return None, None, None, None
