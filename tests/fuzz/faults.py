"""What can be wrong with a loss: its value, or its gradient."""

from __future__ import annotations

import math

from torch import Tensor

from tests.support.problems import change_value, spoil_gradient

GRADIENT_FAULTS = ("nan gradient", "inf gradient")
FAULTS = ("nan", "inf", "low", *GRADIENT_FAULTS)


def add_fault(losses: dict[str, Tensor], fault: str | None) -> dict[str, Tensor]:
    """The losses, the first of them with a fault."""
    name = next(iter(losses))
    if fault is None:
        return losses
    if fault.endswith("gradient"):
        return spoil_gradient(losses, math.nan if fault.startswith("nan") else math.inf, name)
    value = {"nan": math.nan, "inf": math.inf, "low": -5.0}[fault]
    return change_value(losses, value, name)
