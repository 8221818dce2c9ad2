"""The entries of a state that belong to some of the losses."""

from __future__ import annotations

from torch import Tensor

from moo_balance.weighting.base import State


def select_along(value: Tensor, positions: Tensor) -> Tensor:
    """The entries of some losses, along each dimension."""
    for dim in range(value.ndim):
        value = value.index_select(dim, positions)
    return value


def select_entries(state: State, positions: Tensor) -> State:
    """The part of a state that belongs to some losses: [K] and [K, K] are indexed along each K."""
    return {key: select_along(value, positions) for key, value in state.items()}


def replace_entries(state: State, part: State, positions: Tensor) -> State:
    """`part`, with the entries of the other losses from `state`, whose dtypes are kept."""
    merged = {}
    for key, value in part.items():
        value = value.to(state[key].dtype) if key in state else value
        if value.ndim == 1:
            value = state[key].index_copy(0, positions, value)
        elif value.ndim == 2:
            value = state[key].index_put((positions[:, None], positions), value)
        merged[key] = value
    return merged
