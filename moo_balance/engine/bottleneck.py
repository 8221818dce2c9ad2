"""Losses that share features: their Gramian there, and one pass through what lies below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

from moo_balance.engine.base import Linearization, Problem, weighted_backward, weighted_sum
from moo_balance.engine.delivery import delivered
from moo_balance.engine.differentiation import by_backward, by_grad, is_hooked
from moo_balance.engine.graph import (
    checkpoints_reentrantly,
    closed,
    edge_of,
    leaves_among,
    nodes_above,
)
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.kept_rows import averaged, unscaled
from moo_balance.engine.rows import Row, add_rows, add_to_grads
from moo_balance.engine.sharded import is_flattened, is_sharded
from moo_balance.errors import BalanceError, BalanceValueError

Rows = list[list[Tensor | None]]


class Heads(NamedTuple):
    """The losses differentiated down to the features.

    ``cotangents`` [K][F] are their gradients with respect to the features, ``rows`` [K][P] with
    respect to parameters, along the ways that do not lead through a feature.
    """

    cotangents: Rows
    rows: Rows


class AtFeatures(Linearization):
    """The Gramian of gradients at the features, and a single pass through the encoder."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.dtype = dtype
        self.at_features: Jacobian | None = None
        self.above: Jacobian | None = None

    def gramian(self) -> Tensor:
        problem = self.problem
        cotangents, rows = differentiated_heads(problem)
        self.at_features = Jacobian(cotangents)
        self.above = Jacobian(rows, ())
        gramian = self.at_features.gramian(self.dtype, problem.losses[0].device)
        if problem.parallel is not None:
            # Of the mean loss, each rank holds the gradient at its own samples' features.
            gramian = gramian / problem.parallel.size**2
            dist.all_reduce(gramian, group=problem.parallel.group)
        return unscaled(gramian, problem)

    def accumulate(self, coefficients: Tensor) -> None:
        if self.at_features is None or self.above is None:
            weighted_backward(self.problem, coefficients)
        elif self.problem.parallel is not None:
            add_to_grads(
                self._total(self.at_features, self.above, coefficients), self.problem.params
            )
        else:
            roots, seeds = self._seeds(self.at_features, coefficients)
            torch.autograd.backward(roots, seeds, retain_graph=self.problem.retain_graph)
            add_to_grads(self.above.combination(coefficients), self.problem.params)

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if self.at_features is None or self.above is None or is_hooked(problem.params):
            return weighted_sum(problem, coefficients)
        free = coefficients if problem.scale is None else coefficients / problem.scale
        total = self._total(self.at_features, self.above, free)
        return delivered(weighted_sum(problem, coefficients).detach(), total, problem.params)

    def _total(self, at_features: Jacobian, above: Jacobian, coefficients: Tensor) -> Row:
        """The balanced gradient of all parameters."""
        roots, seeds = self._seeds(at_features, coefficients)
        row = _below(self.problem, roots, seeds, _keeps_graph(self.problem))
        row = add_rows(above.combination(coefficients), row)
        (total,) = averaged([("all of them", row)], self.problem)
        return total

    def _seeds(
        self, at_features: Jacobian, coefficients: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        return _reached(self.problem.features, at_features.combination(coefficients))


def differentiated_heads(problem: Problem) -> Heads:
    """One pass for each loss, which ends at the features."""
    parts = [nodes_above([loss], cut=problem.features) for loss in problem.losses]
    above, below = set().union(*parts), nodes_above(problem.features)
    _check_surroundings(problem, checkpoints_reentrantly(above), checkpoints_reentrantly(below))
    columns = leaves_among(above, problem.params)
    inputs = [*problem.features, *(problem.params[column] for column in columns)]
    # A way around the features leads every pass through nodes below, which are needed once more.
    around = bool(above & below) or _is_nested(problem.features, below)
    keeps = _later_used(parts, around or _keeps_graph(problem))
    heads = Heads([], [])
    # Usually nothing that is asked for lies behind the features. But a parameter may be used on
    # both sides, and one feature may be computed from another.
    with closed(map(edge_of, problem.features)):
        for k, (loss, seed) in enumerate(zip(problem.losses, problem.seeds(), strict=True)):
            found = list(by_grad([loss], [seed], inputs, keeps[k]))
            cotangents = found[: len(problem.features)]
            if all(cotangent is None for cotangent in cotangents):
                raise _not_between(problem.names[k])
            row: list[Tensor | None] = [None] * len(problem.params)
            for column, gradient in zip(columns, found[len(cotangents) :], strict=True):
                row[column] = gradient
            heads.cotangents.append(cotangents)
            heads.rows.append(row)
    return heads


def _later_used(parts: Sequence[set[Node]], always: bool) -> list[bool]:
    """Does a later pass go through nodes of this one?

    Where each loss has a head to itself none does: each is freed as soon as it has been passed,
    and the next works in its memory.
    """
    keeps, later = [], set[Node]()
    for part in reversed(parts):
        keeps.append(always or not part.isdisjoint(later))
        later |= part
    return keeps[::-1]


def _is_nested(features: Sequence[Tensor], below: Iterable[Node]) -> bool:
    """Is one of the features computed from another?"""
    followers = {node for parent in below for node, _ in parent.next_functions}
    return any(edge_of(feature)[0] in followers for feature in features)


def _below(problem: Problem, roots: Sequence[Tensor], seeds: Sequence[Tensor], keep: bool) -> Row:
    """A row from the features down."""
    reentrant = checkpoints_reentrantly(nodes_above(roots))
    return (by_backward if reentrant else by_grad)(roots, seeds, problem.params, keep)


def _reached(features: Sequence[Tensor], cotangents: Row) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [(f, c) for f, c in zip(features, cotangents, strict=True) if c is not None]
    return [f for f, _ in pairs], [c for _, c in pairs]


def _keeps_graph(problem: Problem) -> bool:
    return problem.retain_graph or is_hooked(problem.params)


def _not_between(name: str) -> BalanceError:
    return BalanceValueError(
        "Parameter `features` should be what every loss is computed from. Found none that loss "
        f"`{name}` depends on. Pass the very tensors that went into the heads, not copies or "
        "detached ones."
    )


def _check_surroundings(problem: Problem, above: bool, below: bool) -> None:
    """Refuse what a pass in two halves cannot get right."""
    found = None
    if is_sharded(problem.params) or is_flattened(problem.params):
        found = "sharded parameters, which are gathered for whole backward passes"
    elif above:
        found = "a reentrant checkpoint between features and losses (pass `use_reentrant=False`)"
    elif below and problem.parallel is not None:
        found = "a reentrant checkpoint in a data-parallel model (pass `use_reentrant=False`)"
    elif any(feature._backward_hooks for feature in problem.features):
        found = "a hook on a feature, which would see its gradient in parts"
    if found is not None:
        raise BalanceError(f"Parameter `features` should be left out here. Found {found}.")
