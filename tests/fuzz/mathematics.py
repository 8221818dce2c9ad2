"""Gradients, their inner products and weighted sums, and parts of states: all by name, in loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moo_balance.weighting import State

Row = dict[int, Tensor]
"""The gradient of one loss, by the position of the parameter."""

Repeat = Callable[[], dict[str, Tensor]]
"""Evaluates losses again."""


@dataclass
class Sums:
    """Losses and rows, summed over the micro-batches of a window.

    ``repeats`` says whether all of them can be evaluated again after the step.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    repeats: list[Repeat | None] = field(default_factory=list)
    at_features: dict[str, Row] | None = None
    scaled: bool = False
    coefficients: dict[str, float] | None = None
    is_kept: bool = False

    def plus(self, other: Sums) -> Sums:
        losses, rows = dict(self.losses), {name: dict(row) for name, row in self.rows.items()}
        for name, loss in other.losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
            row = rows.setdefault(name, {})
            for position, gradient in other.rows[name].items():
                row[position] = row[position] + gradient if position in row else gradient
        repeats = [*self.repeats, *other.repeats]
        return replace(self, losses=losses, rows=rows, repeats=repeats, scaled=other.scaled)

    def is_finite(self) -> bool:
        return all(bool(loss.isfinite()) for loss in self.losses.values())


def rows_of(losses: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> dict[str, Row]:
    """One ``autograd.grad`` per loss; entries that the loss does not reach are left out."""
    wanted = [(k, tensor) for k, tensor in enumerate(inputs) if tensor.requires_grad]
    rows = {}
    for name, loss in losses.items():
        found = torch.autograd.grad(
            loss, [tensor for _, tensor in wanted], retain_graph=True, allow_unused=True
        )
        rows[name] = {
            k: gradient
            for (k, _), gradient in zip(wanted, found, strict=True)
            if gradient is not None
        }
    return rows


def gramian_of(rows: Mapping[str, Row], names: Sequence[str], compared: set[int]) -> Tensor:
    """Inner products over the compared parameters."""

    def product(first: Row, second: Row) -> Tensor:
        shared = first.keys() & second.keys() & compared
        terms = [(first[k] * second[k]).sum() for k in shared]
        return sum(terms, torch.zeros((), dtype=torch.float64))

    return torch.stack([torch.stack([product(rows[a], rows[b]) for b in names]) for a in names])


def combine(rows: Mapping[str, Row], coefficients: Mapping[str, float]) -> Row:
    """The weighted sum, for every parameter that a loss reaches."""
    total: Row = {}
    for name, row in rows.items():
        for position, gradient in row.items():
            term = coefficients[name] * gradient
            total[position] = total[position] + term if position in total else term
    return total


def select(state: State, names: Sequence[str], present: Sequence[str]) -> State:
    """The entries of the present losses, along each dimension."""
    positions = [names.index(name) for name in present]
    return {
        key: value[positions] if value.ndim == 1 else value[positions][:, positions]
        if value.ndim == 2
        else value
        for key, value in state.items()
    }  # fmt: skip


def merge(state: State, part: State, names: Sequence[str], present: Sequence[str]) -> State:
    """The state with the entries of the present losses replaced."""
    merged = {}
    for key, value in part.items():
        merged[key] = value if not value.ndim else state[key].clone()
        for i, first in enumerate(present):
            if value.ndim == 1:
                merged[key][names.index(first)] = value[i]
            for j, second in enumerate(present if value.ndim == 2 else ()):
                merged[key][names.index(first), names.index(second)] = value[i, j]
    return merged
