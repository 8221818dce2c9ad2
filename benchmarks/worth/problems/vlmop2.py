"""VLMOP2 in 20 dimensions: a concave front, on which no static weight ends between the tips.

Two losses, 1 - exp(-|x - 1/sqrt(n)|²) and 1 - exp(-|x + 1/sqrt(n)|²) (Van Veldhuizen & Lamont
1999). The Pareto set is the segment between the two centres. The point asked for is the one at
which the second loss is three times the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training

DIMENSIONS = 20
RATIO = 3.0


def losses_at(x: Tensor) -> tuple[Tensor, Tensor]:
    centre = 1 / math.sqrt(DIMENSIONS)
    first, second = (1 - torch.exp(-(x - c).square().sum()) for c in (centre, -centre))
    return first, second


def wanted_point() -> Tensor:
    """The losses at the point of the front at which the second is `RATIO` times the first."""
    along = torch.linspace(0, 1 / math.sqrt(DIMENSIONS), 100_001, dtype=torch.float64)
    squared = DIMENSIONS * (along - 1 / math.sqrt(DIMENSIONS)).square()
    first = 1 - torch.exp(-squared)
    second = 1 - torch.exp(-DIMENSIONS * (along + 1 / math.sqrt(DIMENSIONS)).square())
    best = (second - RATIO * first).abs().argmin()
    return torch.stack([first[best], second[best]])


def start(seed: int) -> Training:
    x = nn.Parameter(0.5 * torch.randn(DIMENSIONS))
    wanted = wanted_point()

    @torch.no_grad()
    def distance() -> float:
        return float((torch.stack(losses_at(x)).double() - wanted).norm())

    return Training(
        [x],
        draw=lambda: None,
        losses=lambda _: dict(zip(("first", "second"), losses_at(x), strict=True)),
        validate=distance,
        test=distance,
    )


PROBLEM = Problem(
    title="A given point of a concave front (VLMOP2, 20 dimensions)",
    score="distance to the point, in losses",
    start=start,
    loss_names=("first", "second"),
    primary="first",
    steps=300,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.3,  # the nearer tip is at 0.31
    preference={"first": 3.0, "second": 1.0},
)
