"""Unit vectors and the parts perpendicular to them, however long a vector is."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(vector: Tensor) -> tuple[Tensor, Tensor]:
    """A vector of length 1 in the same direction, and the length; zeros stay zeros."""
    largest = vector.abs().amax()
    relative = torch.where(largest > 0, vector / largest, vector)
    norm = relative.norm()
    return torch.where(norm > 0, relative / norm, relative), largest * norm


def perpendicular(unit: Tensor, other: Tensor, rounding: float) -> Tensor:
    """The part of a unit vector perpendicular to another one; zero where it is but rounding.

    Args:
        unit: Shape [K], of length 1 or 0.
        other: Likewise.
        rounding: Relative rounding unit of what they were computed from.
    """
    part = unit - unit.dot(other) * other
    part = part - part.dot(other) * other
    return torch.where(part.norm() > 8 * len(unit) * rounding, part, 0.0)
