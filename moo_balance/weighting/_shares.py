"""Weights on the simplex of all losses, some of which are absent or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moo_balance.weighting._arguments import constant_state, renormalize, values_by_name
from moo_balance.weighting.base import State, Statistics


def initial_weights(
    preference: Mapping[str, float] | None, names: Sequence[str], device: torch.device
) -> Tensor:
    """The preference as weights [K] that sum to 1, in a state's dtype."""
    weights = constant_state(1.0 / len(names), len(names), device)
    if preference is None:
        return weights
    values = values_by_name(preference, names)
    total = sum(values)
    return weights.new_tensor([value / total for value in values])


def start_from_shares(state: State, shares: Sequence[float]) -> State:
    """The state whose weights, if it has any, are these.

    A loss that appears between two refreshes gets them.
    """
    if "weights" not in state:
        return state
    return {**state, "weights": state["weights"].new_tensor(shares)}


def present_weights(weights: Tensor, left_out: Tensor | None) -> tuple[Tensor, float | Tensor]:
    """Weights that sum to 1 over the losses that are present and not left out; their sum before.

    They are equal where that sum is 0. What follows from them, times the sum, is to be kept: the
    rest is that of the other losses.
    """
    if left_out is None and weights.is_cpu:  # in floats, which takes less time
        values = weights.tolist()
        total = sum(values)
        shares = [v / total for v in values] if total > 0.0 else [1.0 / len(values)] * len(values)
        return torch.tensor(shares, dtype=weights.dtype, device="cpu"), total
    if left_out is None:
        return renormalize(weights), weights.sum()
    return renormalize(weights, left_out), weights.masked_fill(left_out, 0.0).sum()


def count_others(statistics: Statistics) -> Tensor | int:
    """The number of losses, those not counted that are to be left out."""
    count = len(statistics.names)
    return count if statistics.satisfied is None else count - statistics.satisfied.sum()
