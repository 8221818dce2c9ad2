"""Losses that share features: their Gramian there, and one pass through what comes before them.

parameters --trunk--> features --heads--> K losses

gramian():      loss_k --autograd.grad--> gradient at the features, row of the heads' parameters
K gradients at the features --> [K, K]
add_to_grad(c): c_1 gradient_1 + ... at the features --one pass--> .grad of the trunk
c_1 row_1 + ...                      ------------> .grad of the heads
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

from moo_balance.engine.autograd import (
    Edge,
    count_uses,
    edge_of,
    has_hooks,
    has_reentrant_checkpoint,
    is_flattened,
    leaf_positions,
    nodes_above,
    silence_hooks,
)
from moo_balance.engine.base import (
    Linearization,
    Problem,
    Row,
    add_rows,
    deliver,
    gradients_of,
    gradients_through_hooks,
    node_hooks_error,
    precomputed_gradient,
    remove_loss_scale,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.distributed import (
    add_weighted_sum,
    average_over_ranks,
    combined_sum,
    is_sharded,
)
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.products import products_in_range
from moo_balance.errors import BalanceError, BalanceValueError


class FeatureGramian(Linearization):
    """The Gramian of gradients at the features, and a single pass through the trunk."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.dtype = dtype
        self.at_features: Jacobian | None = None
        self.of_heads: Jacobian | None = None

    def gramian(self) -> Tensor:
        cotangents, rows = differentiate_heads(self.problem)
        self.at_features = Jacobian(cotangents)
        self.of_heads = Jacobian(rows, ())
        # A gradient may be zero on one rank only, and ranks must decide alike.
        is_zero = self.at_features.is_zero if self.problem.averager is None else None
        return products_in_range(partial(self._products, self.at_features), self.dtype, is_zero)

    def _products(self, at_features: Jacobian, dtype: torch.dtype) -> Tensor:
        """Inner products at the features, over all ranks, without the loss scale."""
        problem = self.problem
        gramian = at_features.gramian(dtype, problem.losses[0].device)
        if problem.averager is not None:
            # Of the mean loss, each rank holds the gradient at its own samples' features.
            gramian = gramian / problem.averager.size**2
            dist.all_reduce(gramian, group=problem.averager.group)
        return remove_loss_scale(gramian, problem.scale)

    def add_to_grad(self, coefficients: Tensor) -> None:
        problem = self.problem
        if self.at_features is None or self.of_heads is None:
            add = weighted_backward if problem.averager is None else add_weighted_sum
            add(problem, coefficients)
        else:
            total = self._combine(self.at_features, self.of_heads, coefficients)
            deliver(total, problem)

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if self.at_features is None or self.of_heads is None:
            combine = weighted_sum if problem.averager is None else combined_sum
            return combine(problem, coefficients)
        unscaled = coefficients if problem.scale is None else coefficients / problem.scale
        total = self._combine(self.at_features, self.of_heads, unscaled)
        value = weighted_sum(problem, coefficients).detach()
        return precomputed_gradient(value, total, problem)

    def _combine(self, at_features: Jacobian, of_heads: Jacobian, coefficients: Tensor) -> Row:
        """The weighted gradient of all parameters."""
        problem = self.problem
        roots, cotangents = self._roots(at_features, coefficients)
        reentrant = has_reentrant_checkpoint(nodes_above(roots))
        take = gradients_through_hooks if reentrant else gradients_of
        with silence_hooks(problem.params):
            row = take(roots, cotangents, problem.params, problem.retain_graph)
        row = add_rows(of_heads.combine(coefficients), row)
        if problem.averager is None:
            return row
        (total,) = average_over_ranks([("all of them", row)], problem.averager, problem.params)
        return total

    def _roots(
        self, at_features: Jacobian, coefficients: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The features that a loss reaches, and the weighted gradients there."""
        cotangents = at_features.combine(coefficients)
        pairs = zip(self.problem.features, cotangents, strict=True)
        reached = [(feature, gradient) for feature, gradient in pairs if gradient is not None]
        return [feature for feature, _ in reached], [gradient for _, gradient in reached]


class HeadGradients(NamedTuple):
    """The losses differentiated down to the features.

    Args:
        cotangents: [K][F] gradients with respect to the features.
        rows: [K][P] gradients with respect to parameters, along paths without any feature.
    """

    cotangents: list[list[Tensor | None]]
    rows: list[list[Tensor | None]]


def differentiate_heads(problem: Problem) -> HeadGradients:
    """One pass for each loss, which ends at the features."""
    parts = [nodes_above([loss], cut=problem.features) for loss in problem.losses]
    heads, trunk = set().union(*parts), nodes_above(problem.features)
    _check_surroundings(problem, has_reentrant_checkpoint(heads), has_reentrant_checkpoint(trunk))
    positions = leaf_positions(heads, problem.params)
    inputs = [*problem.features, *(problem.params[k] for k in positions)]
    # A path around the features leads every pass through nodes of the trunk, needed once more.
    bypassed = bool(heads & trunk) or _is_nested(problem.features, trunk)
    retain = _need_graph_later(parts, bypassed or problem.retain_graph)
    heads_gradients = HeadGradients([], [])
    # Usually nothing that is requested comes before the features. But a parameter may be used on
    # both sides, and one feature may be computed from another.
    with silence_hooks(problem.params), _block_gradients(map(edge_of, problem.features)):
        for k, (loss, output) in enumerate(
            zip(problem.losses, problem.grad_outputs(), strict=True)
        ):
            each = list(gradients_of([loss], [output], inputs, retain[k]))
            cotangents = each[: len(problem.features)]
            if all(cotangent is None for cotangent in cotangents):
                raise _not_between(problem.names[k])
            row: list[Tensor | None] = [None] * len(problem.params)
            for position, gradient in zip(positions, each[len(cotangents) :], strict=True):
                row[position] = gradient
            heads_gradients.cotangents.append(cotangents)
            heads_gradients.rows.append(row)
    return heads_gradients


@contextmanager
def _block_gradients(edges: Iterable[Edge]) -> Iterator[None]:
    """Let no gradient pass through these edges.

    Gradients *at* the edges are still returned. Nodes after them receive only what arrives by
    other paths.
    """
    handles = [node.register_prehook(_drop(output)) for node, output in edges]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(output: int) -> Any:
    def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if k == output else g for k, g in enumerate(gradients))

    return hook


def _need_graph_later(parts: Sequence[set[Node]], always: bool) -> list[bool]:
    """For each pass, whether a later one goes through some of its nodes.

    Where each loss has a head of its own none does: each head's graph is freed by its own pass, and
    the next works in its memory.
    """
    used, later = [], set[Node]()
    for part in reversed(parts):
        used.append(always or not part.isdisjoint(later))
        later |= part
    return used[::-1]


def _is_nested(features: Sequence[Tensor], trunk: Iterable[Node]) -> bool:
    """Whether one of the features is computed from another."""
    uses = count_uses(trunk)
    return any(edge_of(feature)[0] in uses for feature in features)


def _not_between(name: str) -> BalanceError:
    return BalanceValueError(
        "Parameter `features` should be what every loss is computed from. Found none that loss "
        f"`{name}` depends on. Pass the very tensors that went into the heads, not copies or "
        "detached ones."
    )


def _check_surroundings(problem: Problem, in_heads: bool, in_trunk: bool) -> None:
    """Refuse what a pass in two halves cannot get right: checkpoints in heads or trunk among it."""
    obstacle = None
    if is_sharded(problem.params) or is_flattened(problem.params):
        obstacle = "sharded parameters, which are gathered for whole backward passes"
    elif in_heads:
        obstacle = "a reentrant checkpoint between features and losses (pass `use_reentrant=False`)"
    elif in_trunk and problem.averager is not None:
        obstacle = "a reentrant checkpoint in a data-parallel model (pass `use_reentrant=False`)"
    elif has_hooks(problem.features):
        obstacle = "a hook on a feature, which would see its gradient in parts"
    if obstacle is not None:
        raise BalanceError(f"Parameter `features` should be left out here. Found {obstacle}.")
    if in_trunk and problem.node_hooks:
        raise node_hooks_error("a reentrant checkpoint")
