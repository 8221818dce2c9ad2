"""Losses that count as satisfied: at their lower bound, or with a gradient of zero.

A method is called without them, as without an absent loss: their coefficients are 0, their entries
of the state stay, and the others are balanced among themselves. On an accelerator, where the host
does not know which they are, there always is a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moo_balance import _nonfinite
from moo_balance._record import loss_positions, merge_losses, select_losses
from moo_balance.functional._checks import constant_vector
from moo_balance.weighting.base import Needs, State, Statistics, Weighting, WeightingOutput


def weigh(
    weighting: Weighting,
    statistics: Statistics,
    satisfied: Tensor | None,
    names: Sequence[str],
    state: State,
    needs: Needs,
) -> WeightingOutput:
    """Weights and coefficients [K] of the losses of a batch, and the state that follows.

    Args:
        weighting: The method.
        statistics: Of all K losses of the batch.
        satisfied: Those that count as satisfied, as booleans [K]; None for none.
        names: All declared losses.
        state: Of all of them.
        needs: Of the method in the step.
    """
    vectors, following = _call_without(
        weighting.weights, statistics, satisfied, names, state, needs
    )
    weights, coefficients = vectors or [torch.zeros_like(statistics.losses)] * 2
    return WeightingOutput(weights, coefficients, following)


def observe(
    weighting: Weighting,
    statistics: Statistics,
    satisfied: Tensor | None,
    names: Sequence[str],
    state: State,
    needs: Needs,
) -> State:
    """The state that follows from the losses after a step; arguments as :func:`weigh`."""

    def call(statistics: Statistics, state: State) -> tuple[State]:
        return (weighting.observe(statistics, state),)

    return _call_without(call, statistics, satisfied, names, state, needs)[1]


def _call_without(
    call: Callable[[Statistics, State], tuple[Any, ...]],
    statistics: Statistics,
    satisfied: Tensor | None,
    names: Sequence[str],
    state: State,
    needs: Needs,
) -> tuple[Sequence[Tensor], State]:
    """Call a method without the losses that count as satisfied.

    `call` takes statistics and the state of their losses, and returns vectors with an entry for
    each of these, if any, and last the state that follows. All others are as for :func:`weigh`.

    Returns:
        The vectors, shape [K], zero for the satisfied losses; none if all are satisfied. And the
        state of all declared losses.
    """
    device = statistics.losses.device
    if satisfied is None:
        positions = loss_positions(names, statistics.names, device)
        part = state if positions is None else select_losses(state, positions)
        *vectors, following = call(statistics, part)
        return vectors, merge_losses(state, following, positions)
    if needs.method.leaves_out_satisfied and not _nonfinite.is_on_cpu(satisfied):
        present = loss_positions(names, statistics.names, device)
        part = select_losses(state, present)
        marked = _mark(statistics, satisfied, needs.method.lower_bounds(statistics.names))
        *vectors, following = call(marked, part)
        hidden = [values.masked_fill(satisfied, 0.0) for values in vectors]
        return hidden, merge_losses(state, _keep(satisfied, following, part), present)
    others = _positions_of_others(satisfied)
    if not others:
        return (), state
    rest, positions = _select(statistics, others), torch.tensor(others, device=device)
    declared = loss_positions(names, rest.names, device)
    *vectors, following = call(rest, select_losses(state, declared))
    scattered = [
        values.new_zeros(len(satisfied)).index_copy(0, positions, values) for values in vectors
    ]
    return scattered, merge_losses(state, following, declared)


def among_declared(
    satisfied: Tensor | None,
    before: Tensor | None,
    names: Sequence[str],
    present: Sequence[str],
) -> Tensor | None:
    """The declared losses that are satisfied after a step; a loss that was absent stays as it was.

    Args:
        satisfied: Those of the present losses; None for none.
        before: Those of the declared losses, as of the step before; None for none.
        names: The declared losses.
        present: The present ones.
    """
    if satisfied is None and before is None:
        return None
    like = before if satisfied is None else satisfied
    assert like is not None
    positions = loss_positions(names, present, like.device)
    if satisfied is None:
        satisfied = torch.zeros(len(present), dtype=torch.bool, device=like.device)
    if positions is None:
        return satisfied
    if before is None:
        before = torch.zeros(len(names), dtype=torch.bool, device=like.device)
    return before.index_copy(0, positions, satisfied)


def among_present(
    satisfied: Tensor, names: Sequence[str], present: Sequence[str], device: torch.device
) -> Tensor:
    """A mask over the declared losses as one over the present ones."""
    satisfied = satisfied.to(device)
    positions = loss_positions(names, present, device)
    return satisfied if positions is None else satisfied.index_select(0, positions)


def count_satisfied(
    method: Weighting,
    names: Sequence[str],
    satisfied: Tensor | None,
    at_bound: Tensor | None,
) -> Tensor | None:
    """Those of the losses whose gradient counts as zero, or which are at their bound, that count.

    Args:
        method: In use.
        names: The K losses.
        satisfied: Losses at their bound, or whose gradient counts as zero, as booleans [K].
        at_bound: The former; None for none.
    """
    if not method.uses_gramian:
        # A method that only measures the length of its step has use for any loss.
        return at_bound
    constant = method.constant_losses
    if satisfied is None or not any(name in constant for name in names):
        return satisfied
    balanced = tuple(float(name not in constant) for name in names)
    satisfied = satisfied & constant_vector(balanced, torch.bool, satisfied.device)
    return satisfied if not _nonfinite.is_on_cpu(satisfied) or satisfied.any() else None


# ------------------------------------------------------------ on the host


def _positions_of_others(satisfied: Tensor) -> list[int]:
    return [position for position, mark in enumerate(satisfied.tolist()) if not mark]


def _select(statistics: Statistics, others: Sequence[int]) -> Statistics:
    """The statistics of some of the losses."""
    if len(others) == len(statistics.names):
        return statistics
    names = tuple(statistics.names[position] for position in others)
    rows, gramian = statistics.rows, _select_entries(statistics.gramian, others)
    if rows is not None:
        rows = type(rows)(*(_select_entries(entry, others) for entry in rows))
    return statistics._replace(
        names=names, losses=statistics.losses[others], gramian=gramian, rows=rows
    )


def _select_entries(values: Tensor | None, others: Sequence[int]) -> Tensor | None:
    """The entries of some losses in a vector or a matrix."""
    if values is None:
        return None
    return values[others] if values.ndim == 1 else values[others][:, others]


# ------------------------------------------------------------ on the device


def _mark(statistics: Statistics, satisfied: Tensor, bounds: Sequence[float]) -> Statistics:
    """Statistics that say which losses are satisfied, with harmless values for these."""
    losses, gramian = statistics.losses, statistics.gramian
    if max(bounds) > -math.inf:
        harmless = tuple(bound + 1.0 if math.isfinite(bound) else 1.0 for bound in bounds)
        filling = constant_vector(harmless, losses.dtype, losses.device)
        losses = torch.where(satisfied, filling, losses)
    if gramian is not None:
        gramian = gramian.masked_fill(_either(satisfied), 0.0)
    return statistics._replace(losses=losses, gramian=gramian, satisfied=satisfied)


def _keep(satisfied: Tensor, following: State, before: State) -> State:
    """The following state, but for the entries of the satisfied losses."""
    kept: State = {}
    for key, value in following.items():
        mask = (satisfied.all, lambda: satisfied, lambda: _either(satisfied))[value.ndim]()
        kept[key] = torch.where(mask, before[key], value.to(before[key].dtype))
    return kept


def _either(satisfied: Tensor) -> Tensor:
    """The pairs [K, K] with a loss that is satisfied."""
    return satisfied.unsqueeze(1) | satisfied
