"""The reference engine: one ``autograd.grad`` per loss, unreachable parameters skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.engine.base import (
    Engine,
    Linearization,
    Problem,
    Window,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.delivery import delivered
from moo_balance.engine.rows import Row, add_rows, combination, combine, inner_products
from moo_balance.engine.sharded import is_flattened, is_sharded, sharded_inner_products
from moo_balance.errors import BalanceError


@dataclass(frozen=True)
class PerLoss(Engine):
    """Differentiate each loss once and keep the K gradients until they are combined.

    Time: K backward passes, each through the part of the graph its loss reaches. Memory: the
    gradients themselves, at most K·P numbers; a parameter that a loss does not reach takes none.
    A method that needs no Gramian costs one ordinary backward pass.

    On several ranks each row is averaged over them while the next one is differentiated, so that
    the Gramian is that of the averaged gradients. Rows of sharded parameters (``fully_shard``)
    stay sharded, and their inner products are summed over the shards.

    Gradients are written to the wrapped optimizer's parameters.

    Args:
        dtype: Precision of the Gramian, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own.
    """

    dtype: torch.dtype = torch.float32

    def linearize(self, problem: Problem) -> Linearization:
        return _Rows(problem, self.dtype)

    def window(self) -> Window:
        return _RowWindow(self.dtype)


class _Rows(Linearization):
    """One batch: rows only if somebody asks for their Gramian."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.dtype = dtype
        self.rows: list[list[Tensor | None]] | None = None

    def gramian(self) -> Tensor:
        self.rows = [list(row) for row in self.differentiate()]
        return _gramian(self.rows, self.problem, self.dtype)

    def differentiate(self) -> Sequence[Row]:
        """Rows averaged over the ranks, each on its way while the next is computed."""
        parallel, params = self.problem.parallel, self.problem.params
        rows = _local_rows(self.problem)
        if parallel is None or is_sharded(params):
            return list(rows)
        named = zip(self.problem.names, rows, strict=True)
        return parallel.finish([parallel.start(n, row, params) for n, row in named], params)

    def accumulate(self, coefficients: Tensor) -> None:
        if self.rows is None:
            weighted_backward(self.problem, coefficients)
        else:
            combine(self.rows, coefficients, self.problem.params)

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if self.rows is None or _hooked(problem.params):
            return weighted_sum(problem, coefficients)
        unscaled = coefficients if problem.scale is None else coefficients / problem.scale
        gradients = combination(self.rows, unscaled)
        value = weighted_sum(problem, coefficients).detach()
        return delivered(value, gradients, problem.params)


class _RowWindow(Window):
    """Several micro-batches: K rows that grow."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows: dict[str, Row] = {}

    def add(self, problem: Problem) -> None:
        self.rows = self.joined(problem)

    def close(self, problem: Problem) -> Linearization:
        return _ClosedWindow(self, problem)

    def joined(self, problem: Problem) -> dict[str, Row]:
        """The rows so far and those of one more micro-batch; this rank's own."""
        rows = dict(self.rows)
        for name, row in zip(problem.names, _local_rows(problem), strict=True):
            rows[name] = add_rows(rows[name], row) if name in rows else row
        return rows


class _ClosedWindow(_Rows):
    """A window and its last micro-batch."""

    def __init__(self, window: _RowWindow, problem: Problem) -> None:
        super().__init__(problem, window.dtype)
        self.window = window

    def differentiate(self) -> Sequence[Row]:
        rows = self.window.joined(self.problem)
        parallel, params = self.problem.parallel, self.problem.params
        if parallel is None or is_sharded(params):
            return list(rows.values())
        return parallel.finish([parallel.start(n, row, params) for n, row in rows.items()], params)

    def accumulate(self, coefficients: Tensor) -> None:
        if self.rows is None:
            self.rows = [list(row) for row in self.differentiate()]
        super().accumulate(coefficients)


def _gramian(rows: Sequence[Row], problem: Problem, dtype: torch.dtype) -> Tensor:
    """Inner products over the measured parameters, free of the loss scale."""
    columns = [
        column
        for column, param in enumerate(problem.params)
        if problem.measured is None or id(param) in problem.measured
    ]
    products = sharded_inner_products if is_sharded(problem.params) else inner_products
    gramian = products(rows, columns, dtype)
    # The scale is a power of two, and enters both sides of every product.
    return gramian if problem.scale is None else gramian / problem.scale.to(gramian) ** 2


def _local_rows(problem: Problem) -> Iterator[Row]:
    """The K rows, one after the other. The graph is freed with the last unless it shall be kept."""
    last = len(problem.losses) if _hooked(problem.params) else len(problem.losses) - 1
    sharded, reentrant = is_sharded(problem.params), _checkpoints_reentrantly(problem.losses)
    _check_wrapper(problem, sharded, reentrant)
    differentiate = _by_backward if sharded or reentrant else _by_grad
    for k, (loss, seed) in enumerate(zip(problem.losses, problem.seeds(), strict=True)):
        row = differentiate(loss, seed, problem.params, problem.retain_graph or k < last)
        if sharded and all(gradient is None for gradient in row):
            raise BalanceError(
                f"The gradient of loss `{problem.names[k]}` should reach a sharded parameter. "
                "Found none. Leave `set_requires_gradient_sync(True)`, and gather micro-batches "
                "within `accumulate()`, which sums the shards."
            )
        yield row


def _check_wrapper(problem: Problem, sharded: bool, reentrant: bool) -> None:
    """Refuse wrappers that go wrong at the second of K backward passes."""
    if is_flattened(problem.params):
        raise BalanceError(
            "One gradient per loss can be taken of a model in `fully_shard` (FSDP2). Found "
            "parameters of FullyShardedDataParallel (FSDP1), which lets go of them after one "
            "backward pass. Use `fully_shard`, or a method without a Gramian and no `accumulate`."
        )
    if reentrant and problem.parallel is not None and not sharded:
        raise BalanceError(
            "Activation checkpointing should be `use_reentrant=False` where ranks average one "
            "gradient per loss. Found a reentrant checkpoint, whose backward passes would each set "
            "off those of DistributedDataParallel."
        )


def _hooked(params: Sequence[Tensor]) -> bool:
    """Would a delivered gradient meet hooks of a parameter that its rows have met already?"""
    return any(param._backward_hooks for param in params)


def _checkpoints_reentrantly(losses: Sequence[Tensor]) -> bool:
    """Is there a reentrant checkpoint in the graph?

    ``autograd.grad`` does not see the parameters inside: it raises, or, where the checkpoint lies
    on no other parameter's path, silently passes over them.
    """
    nodes = {loss.grad_fn for loss in losses if loss.grad_fn is not None}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            return True
        fresh = {before for before, _ in node.next_functions if before is not None} - nodes
        nodes |= fresh
        stack.extend(fresh)
    return False


def _by_grad(loss: Tensor, seed: Tensor, params: Sequence[Tensor], retain_graph: bool) -> Row:
    """A row from ``autograd.grad``, which disturbs neither ``.grad`` nor its hooks."""
    try:
        return torch.autograd.grad(
            loss, params, grad_outputs=seed, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise BalanceError(
                "A compiled model should keep its buffers for more than one backward pass. Found "
                "donated buffers. Set `torch._functorch.config.donated_buffer = False` before the "
                "model is compiled."
            ) from error
        raise


def _by_backward(loss: Tensor, seed: Tensor, params: Sequence[Tensor], retain_graph: bool) -> Row:
    """A row from ``backward``, by way of ``.grad``, for graphs that work through hooks."""
    kept = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        torch.autograd.backward(loss, seed, retain_graph=retain_graph)
        return [param.grad for param in params]
    finally:
        for param, gradient in zip(params, kept, strict=True):
            param.grad = gradient
