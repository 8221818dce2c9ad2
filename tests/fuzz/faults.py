"""What can be wrong with a loss: its value, or its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.support.problems import change_value, spoil_gradient

FAULTS = ("nan", "inf", "low", "nan gradient", "inf gradient")
MISHAPS = ("error", "interrupt", "nothing", "another loss")
"""What can go wrong when a closure is evaluated again."""


def add_fault(losses: dict[str, Tensor], fault: str | None) -> dict[str, Tensor]:
    """The losses, the first of them with a fault."""
    name = next(iter(losses))
    if fault is None:
        return losses
    if fault.endswith("gradient"):
        return spoil_gradient(losses, math.nan if fault.startswith("nan") else math.inf, name)
    value = {"nan": math.nan, "inf": math.inf, "low": -5.0}[fault]
    return change_value(losses, value, name)


def add_mishap(closure: Callable[[], Any], mishap: str | None) -> Callable[[], Any]:
    """A closure that goes wrong when it is called for the second time."""
    calls: list[None] = []

    def run() -> Any:
        calls.append(None)
        losses = closure()
        if mishap is None or len(calls) == 1:
            return losses
        if mishap == "error":
            raise ValueError("the user's own")
        if mishap == "interrupt":
            raise KeyboardInterrupt
        return None if mishap == "nothing" else {**losses, "zzz": next(iter(losses.values()))}

    return run
