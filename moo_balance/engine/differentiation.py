"""Gradients of one loss at a time, as autograd gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moo_balance.engine.base import Problem
from moo_balance.engine.factored import Factored, Inputs, factorable
from moo_balance.engine.graph import checkpoints_reentrantly, nodes_above
from moo_balance.engine.rows import Row
from moo_balance.engine.sharded import is_flattened, is_sharded
from moo_balance.errors import BalanceError

Seeds = Sequence[Tensor]


def local_rows(problem: Problem, layers: list[Factored] | None = None) -> Iterator[Row]:
    """The K rows, one after the other. The graph is freed with the last unless it shall be kept.

    Args:
        problem: What to differentiate.
        layers: To be filled with the layers whose weights' gradients stay factored; their places
            in the rows are None then. None for whole rows.
    """
    last = len(problem.losses) if is_hooked(problem.params) else len(problem.losses) - 1
    nodes = nodes_above(problem.losses)
    sharded, reentrant = is_sharded(problem.params), checkpoints_reentrantly(nodes)
    _check_wrapper(problem, sharded, reentrant)
    through_hooks = sharded or reentrant
    if layers is not None and not through_hooks:
        layers += factorable(problem, nodes)
    plan = Inputs(problem.params, layers or [])
    for k, (loss, seed) in enumerate(zip(problem.losses, problem.seeds(), strict=True)):
        keep = problem.retain_graph or k < last
        if through_hooks:
            row = by_backward([loss], [seed], problem.params, keep)
        else:
            with plan.arrivals:
                row = plan.sorted(by_grad([loss], [seed], plan.inputs, keep))
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


def is_hooked(params: Sequence[Tensor]) -> bool:
    """Would a delivered gradient meet hooks of a parameter that its rows have met already?"""
    return any(param._backward_hooks for param in params)


def by_grad(
    roots: Sequence[Any],
    seeds: Seeds,
    inputs: Sequence[Any],
    retain_graph: bool,
) -> Row:
    """A row from ``autograd.grad``, which disturbs neither ``.grad`` nor its hooks.

    Roots and inputs are tensors or ``GradientEdge``s.
    """
    if not inputs:  # all parameters are frozen
        return ()
    try:
        return torch.autograd.grad(
            roots, inputs, grad_outputs=seeds, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise BalanceError(
                "A compiled model should keep its buffers for more than one backward pass. Found "
                "donated buffers. Set `torch._functorch.config.donated_buffer = False` before the "
                "model is compiled."
            ) from error
        raise


def by_backward(
    roots: Sequence[Tensor], seeds: Seeds, params: Sequence[Tensor], retain_graph: bool
) -> Row:
    """A row from ``backward``, by way of ``.grad``, for graphs that work through hooks."""
    kept = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        torch.autograd.backward(roots, seeds, retain_graph=retain_graph)
        return [param.grad for param in params]
    finally:
        for param, gradient in zip(params, kept, strict=True):
            param.grad = gradient
