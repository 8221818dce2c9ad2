"""Rates of change of losses, and shares of the losses by them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moo_balance.weighting._arguments import constant_state, normalize_preference
from moo_balance.weighting.base import State, Statistics


def init_window_means(count: int, device: torch.device) -> State:
    """The state before the first step: no window has begun."""
    return {
        "window": constant_state(-1.0, count, device),
        "mean": constant_state(0.0, count, device),
        "count": constant_state(0.0, count, device),
        "newer": constant_state(math.nan, count, device),
        "older": constant_state(math.nan, count, device),
    }


def update_window_means(statistics: Statistics, window: int, state: State) -> State:
    """Add the losses of a step to the means of their windows of `window` steps.

    ``newer`` and ``older`` are the means of the last two windows that are complete, NaN before
    there are such. Each loss has windows of its own, as it may be absent: those of its steps that
    fall into the same window of the run. A window without the loss does not count.
    """
    index = float(statistics.step // window)
    begins = state["window"] != index
    complete = begins & (state["count"] > 0)
    count = torch.where(begins, 0.0, state["count"]) + 1.0
    mean = torch.where(begins, 0.0, state["mean"])
    return {
        "window": torch.full_like(state["window"], index),
        "mean": mean + (statistics.losses.to(mean) - mean) / count,
        "count": count,
        "newer": torch.where(complete, state["mean"], state["newer"]),
        "older": torch.where(complete, state["newer"], state["older"]),
    }


def share(logits: Tensor, preference: Mapping[str, float] | None, statistics: Statistics) -> Tensor:
    r"""The shares :math:`p_i e^{x_i} / \sum_j p_j e^{x_j}` of the losses, shape [K].

    A logit that has overflowed counts as the largest number. The share of a loss that is to be left
    out is 0.
    """
    largest = torch.finfo(logits.dtype).max
    logits = logits.clamp(-largest, largest)
    if statistics.satisfied is not None:
        logits = logits.masked_fill(statistics.satisfied, -math.inf)
    if preference is not None:
        # The maximum goes first: next to a huge one a preference would be rounded off.
        weights = normalize_preference(preference, statistics).to(logits)
        logits = (logits - logits.amax()) + weights.log()
    return torch.softmax(logits, 0)
