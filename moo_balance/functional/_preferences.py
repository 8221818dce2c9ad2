"""Preferences as the solvers read them."""

from __future__ import annotations

import math

from torch import Tensor

from moo_balance.errors import BalanceValueError


def read_preference(preference: Tensor | None, gramian: Tensor) -> list[float] | None:
    """Preferences of mean 1, or None for equal ones; refuse what does not match the Gramian."""
    if preference is None:
        return None
    if preference.shape != gramian.shape[:1]:
        raise BalanceValueError(
            f"Parameter `preference` should have shape ({gramian.shape[0]},), as a row of "
            f"`gramian`. Found shape {tuple(preference.shape)}."
        )
    values: list[float] = preference.detach().double().tolist()
    if not all(0.0 < value < math.inf for value in values):
        raise BalanceValueError(
            f"Parameter `preference` should be positive and finite. Found {values}. "
            "Leave out a gradient that should not count."
        )
    largest = max(values)
    shares = [value / largest for value in values]
    mean = sum(shares) / len(shares)
    return [share / mean for share in shares]
