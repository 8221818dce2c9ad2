"""Rows of gradients whose single coordinates a method looks at: statistics, and what is kept.

Used only with a :class:`~moo_balance.weighting.rows.RowWeighting`; its module shows how the parts
fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from moo_balance import _nonfinite
from moo_balance.engine import Linearization
from moo_balance.engine.base import Row
from moo_balance.engine.distributed import local_part, slice_as
from moo_balance.engine.jacobian import as_scalars
from moo_balance.engine.rows import WholeRows
from moo_balance.functional._checks import widest_dtype
from moo_balance.weighting._random import draw_coordinates
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowStatistics, RowWeighting

RowState: TypeAlias = dict[Tensor, dict[str, State]]
"""What is kept of rows: by parameter and loss, tensors by name."""


def look_at_rows(
    method: RowWeighting,
    linearization: Linearization | None,
    statistics: Statistics,
    state: RowState,
    valid: Tensor | None,
    satisfied: Tensor | None,
) -> tuple[Statistics, RowState]:
    """Statistics with those of the rows, and what is kept of rows after this step.

    Args:
        method: Says what is wanted.
        linearization: Of the batch, whose Gramian has been requested.
        statistics: The present losses, and the Gramian.
        state: What is kept of rows so far; it does not change.
        valid: Whether the rows are finite, on the device; None where the host has checked.
        satisfied: Which losses count as satisfied, as booleans [K]: what is kept of them stays.
            None for none.
    """
    rows = cast(WholeRows, linearization)
    told = RowStatistics()
    if method.uses_magnitudes:
        told = _read_magnitudes(rows, valid)
    if method.keeps:
        kept = _track(method, rows, statistics, state, valid, satisfied)
        if method.uses_total:
            told = told._replace(total=_add_up(method, rows, kept, valid))
        if method.combines == "kept":
            rows.others = kept
            told = told._replace(gramian=rows.products(kept))
        state = _following(method.keeps, rows.problem.params, statistics.names, kept, state)
    if method.combines == "coordinates":
        draw = partial(draw_coordinates, method.seed, statistics.step)
        rows.combination = partial(_combine, method, draw)
    return statistics._replace(rows=told), state


class SeparateRows(NamedTuple):
    """The gradients of the losses of a step, unscaled, each for a step of its own.

    Args:
        names: The losses.
        params: The parameters.
        rows: By loss, a gradient for each parameter.
        shares: What each loss's step counts, shape [K].
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    rows: Sequence[Row]
    shares: Tensor


def separate_rows(
    linearization: Linearization | None,
    names: Sequence[str],
    shares: Tensor,
    valid: Tensor | None,
    satisfied: Tensor | None,
) -> SeparateRows:
    """The gradients of single losses, as they are given to an optimizer; zeros if not `valid`.

    Losses that count as satisfied take no step. Which they are is read from a device: what an
    optimizer counts on the host cannot be masked.
    """
    rows = cast(WholeRows, linearization)
    params, idle = rows.problem.params, _positions(satisfied)

    def part(loss: int, param_index: int) -> Tensor | None:
        gradient = rows.part(loss, param_index)
        if gradient is None:
            return None
        gradient = gradient.to(params[param_index].dtype)
        return gradient if valid is None else torch.where(valid, gradient, 0.0)

    taking = [k for k in range(len(names)) if k not in idle]
    parts = rows.map(part)
    if idle:
        parts, shares = [parts[k] for k in taking], shares[taking]
    return SeparateRows([names[k] for k in taking], params, parts, shares)


def _combine(
    method: RowWeighting,
    draw: Callable[[int, torch.Size, Tensor], Tensor],
    parts: Sequence[Tensor],
    param_index: int,
    param: Tensor,
) -> Tensor:
    """What a method makes of the gradients of one parameter."""

    def draw_part() -> Tensor:
        # Drawn whole, so that it does not matter how the parameter is sharded.
        return slice_as(param, draw(param_index, param.shape, parts[0]))

    return method.combine(parts, draw_part)


def _read_magnitudes(rows: WholeRows, valid: Tensor | None) -> RowStatistics:
    def largest(loss: int, param_index: int) -> Tensor | None:
        part = rows.part(loss, param_index)
        return part.abs().amax() if part is not None and part.numel() else None

    def total(loss: int, param_index: int) -> Tensor | None:
        part = rows.part(loss, param_index)
        return None if part is None else part.abs().sum(dtype=widest_dtype(part.device))

    mean = rows.reduce(total) / max(rows.count_elements(), 1)
    return RowStatistics(
        _harmless(rows.reduce(largest, largest=True), valid), _harmless(mean, valid)
    )


def _harmless(values: Tensor, valid: Tensor | None) -> Tensor:
    """Ones in a masked step, which runs through the method, too."""
    return values if valid is None else torch.where(valid, values, 1.0)


def _track(
    method: RowWeighting,
    rows: WholeRows,
    statistics: Statistics,
    state: RowState,
    valid: Tensor | None,
    satisfied: Tensor | None,
) -> list[list[Tensor | None]]:
    """What is kept of the rows of this step."""
    idle, changes = positions_of_idle(satisfied), _changes(len(rows.rows), valid, satisfied)
    names, params = statistics.names, rows.problem.params
    factors = method.row_factors(statistics)
    scalars = None if factors is None else as_scalars(factors)

    def track(loss: int, param_index: int) -> Tensor | None:
        gradient = rows.part(loss, param_index)
        kept = state.get(params[param_index], {}).get(names[loss])
        before = None if kept is None else local_part(kept[method.keeps])
        if (gradient is None and before is None) or loss in idle:
            return before
        if gradient is None:  # the loss no longer reaches the parameter
            gradient = torch.zeros_like(cast(Tensor, before))
        elif scalars is not None:
            gradient = gradient * scalars[loss]
        before = torch.zeros_like(gradient) if before is None else before
        after = method.track(before, gradient)
        return after if changes is None else torch.where(changes[loss], after, before)

    return rows.map(track)


def positions_of_idle(satisfied: Tensor | None) -> Sequence[int]:
    """The losses of which the host knows that they count as satisfied."""
    if satisfied is None or not _nonfinite.is_on_cpu(satisfied):
        return ()
    return _positions(satisfied)


def _positions(marks: Tensor | None) -> Sequence[int]:
    """Which losses are marked; none without marks. Synchronizes."""
    return () if marks is None else [k for k, mark in enumerate(marks.tolist()) if mark]


def _changes(count: int, valid: Tensor | None, satisfied: Tensor | None) -> Sequence[Tensor] | None:
    """For each loss, whether what is kept of it changes, on the device; None if all does."""
    if satisfied is None:
        return None if valid is None else [valid] * count
    return (~satisfied if valid is None else valid & ~satisfied).unbind()


def _add_up(
    method: RowWeighting, rows: WholeRows, kept: Sequence[Row], valid: Tensor | None
) -> Tensor:
    def total(loss: int, param_index: int) -> Tensor | None:
        gradient, after = rows.part(loss, param_index), kept[loss][param_index]
        if gradient is None or after is None:
            return None
        return method.summand(local_part(after), gradient).sum(dtype=widest_dtype(gradient.device))

    return _harmless(rows.reduce(total), valid)


def _following(
    key: str,
    params: Sequence[Tensor],
    names: Sequence[str],
    kept: Sequence[Row],
    state: RowState,
) -> RowState:
    """The state with what is kept of these rows in place of what was."""
    following = dict(state)
    for p, param in enumerate(params):
        entries = {
            name: {key: part}
            for name, row in zip(names, kept, strict=True)
            if (part := row[p]) is not None
        }
        if entries:
            following[param] = {**state.get(param, {}), **entries}
    return following
