"""Sum or mean: the convention of length of methods that combine K corrected gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from moo_balance.weighting._arguments import check_choice, values_by_name
from moo_balance.weighting.base import State, Statistics, Weighting

Reduction: TypeAlias = Literal["sum", "mean"]


def check_reduction(weighting: Weighting) -> None:
    """Refuse a ``reduction`` that is none."""
    check_choice(weighting, "reduction", ("sum", "mean"))


def reduction_shares(
    reduction: Reduction, preference: Mapping[str, float] | None, statistics: Statistics
) -> list[float]:
    """What each of the present gradients is multiplied by: 1 or 1/K, or in proportion.

    They sum to K ("sum") or to 1 ("mean").
    """
    return shares_by_name(reduction, preference, statistics.names)


def shares_by_name(
    reduction: Reduction, preference: Mapping[str, float] | None, names: Sequence[str]
) -> list[float]:
    """:func:`reduction_shares` of the losses of these names."""
    count = len(names)
    whole = float(count) if reduction == "sum" else 1.0
    if preference is None:
        return [1.0 if reduction == "sum" else 1.0 / count] * count
    values = values_by_name(preference, names)
    total = sum(values)
    return [whole * (value / total) for value in values]


def start_from_shares(state: State, shares: list[float]) -> State:
    """The state whose weights, if it has any, are those of a plain sum or mean.

    A loss that appears between two refreshes gets them.
    """
    if "weights" not in state:
        return state
    return {**state, "weights": state["weights"].new_tensor(shares)}
