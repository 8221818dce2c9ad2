"""The roundings that SGA+ is compared with: its other probabilities, and plain rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from examples.lic.hyperprior import round_straight_through
from examples.lic.rounding import (
    SGA,
    SGA_PLUS,
    TINY,
    Rounding,
    ScaledLogit,
)


@dataclass(frozen=True)
class Linear:
    r""":math:`n \log(1 - r d)`; with the defaults the probability is the distance to the other end.

    Args:
        slope: r; below 1 it leaves integers further than 1 a chance.
        power: n.
    """

    slope: float = 1.0
    power: float = 1.0

    def __call__(self, distance: Tensor) -> Tensor:
        return self.power * (1 - self.slope * distance).clamp(min=TINY).log()


@dataclass(frozen=True)
class Cosine:
    r""":math:`\log \cos^n(\tfrac{\pi}{2} \min(r d, 1))`, with `slope` r and `power` n."""

    slope: float = 1.0
    power: float = 2.0

    def __call__(self, distance: Tensor) -> Tensor:
        # In float32 the cosine of a right angle is a little below zero, and has no real power.
        cosine = (math.pi / 2 * (self.slope * distance).clamp(max=1)).cos().clamp(min=0)
        return (cosine**self.power + 1e-7).log()


TWO_CLASS = {
    "atanh": SGA,
    "linear": Rounding(Linear()),
    "cosine": Rounding(Cosine()),
    "SSL": SGA_PLUS,
}
"""The probabilities of the paper, with the a = 2.3 of its tables."""

THREE_CLASS = {
    "linear": Rounding(Linear(slope=0.98, power=1.5), classes=3),
    "cosine": Rounding(Cosine(slope=0.98, power=1.5), classes=3),
    "SSL": Rounding(ScaledLogit(a=1.4, slope=0.98, power=1.5, width=1.5), classes=3),
}
"""Their extensions to three integers, with the paper's r, n and a."""


@dataclass(frozen=True)
class StraightThrough:
    """Plain rounding with the gradient of the identity, at every step."""

    def __call__(self, values: Tensor, step: int) -> Tensor:
        return round_straight_through(values)
