"""The two-objective toy of CAGrad, Nash-MTL and FAMO: cusps, plateaus and conflicting gradients.

In closed form, so that a test can take tens of thousands of steps without autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.weighting import Statistics, Weighting

NAMES = ("first", "second")
SCALE = 0.1  # of the first loss (Nash-MTL's and FAMO's code; CAGrad has 1)
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
# Strict lower bounds, those of FAMO's run script: the minima are about -20.
BOUNDS = (-21.0 * SCALE, -21.0)

Point = tuple[float, float]


def losses(theta: Tensor) -> dict[str, Tensor]:
    """The definition, for autograd. `theta` has shape [2]."""
    x, y = theta
    u1 = 0.5 * (-x - 7) - torch.tanh(-y)
    u2 = 0.5 * (-x + 3) + torch.tanh(-y) + 2
    f1, f2 = (torch.log(u.abs().clamp(min=5e-6)) + 6 for u in (u1, u2))
    q1, q2 = (((x + a) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20 for a in (-7, 7))
    c1, c2 = torch.tanh(y / 2).clamp(min=0), torch.tanh(-y / 2).clamp(min=0)
    return {"first": SCALE * (c1 * f1 + c2 * q1), "second": c1 * f2 + c2 * q2}


def linearized(point: Point) -> tuple[list[float], list[list[float]]]:
    """Losses and their gradients, in closed form."""
    x, y = point
    tanh, half = math.tanh(y), math.tanh(y / 2)
    slope, half_slope = 1 - tanh**2, 0.5 * (1 - half**2)
    c1, dc1 = max(half, 0.0), half_slope if y >= 0 else 0.0
    c2, dc2 = max(-half, 0.0), -half_slope if y <= 0 else 0.0
    values, rows = [], []
    for u, du_dy, a, scale in (
        (0.5 * (-x - 7) + tanh, slope, -7.0, SCALE),
        (0.5 * (-x + 3) - tanh + 2, -slope, 7.0, 1.0),
    ):
        f = math.log(max(abs(u), 5e-6)) + 6
        df = 1 / u if abs(u) >= 5e-6 else 0.0
        q = ((x + a) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
        values.append(scale * (c1 * f + c2 * q))
        rows.append(
            [
                scale * (c1 * df * -0.5 + c2 * (x + a) / 5),
                scale * (c1 * df * du_dy + dc1 * f + c2 * (y + 8) / 50 + dc2 * q),
            ]
        )
    return values, rows


def distance_to_front(point: Point) -> float:
    """Distance to the Pareto set, an arc over [-7, 7] near y = -8.4, measured straight up."""
    x = min(max(point[0], -7.0), 7.0)
    return math.hypot(point[0] - x, point[1] - front(x))


def front(x: float) -> float:
    """The y of the Pareto set at x: where a convex combination of the gradients vanishes.

    Its share is (x + 7) / 14, from the x components; the y component is then result by bisection.
    """
    share = (x + 7) / 14
    low, high = -9.0, -8.0
    for _ in range(60):
        y = (low + high) / 2
        _, (first, second) = linearized((x, y))
        if share * first[1] / SCALE + (1 - share) * second[1] > 0:
            high = y
        else:
            low = y
    return (low + high) / 2


@dataclass
class Adam:
    """Adam with the defaults of torch on two plain numbers."""

    lr: float = 1e-3
    steps: int = 0
    means: list[float] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def step(self, point: Point, gradient: list[float]) -> Point:
        self.steps += 1
        rate = self.lr / (1 - 0.9**self.steps)
        unbias = math.sqrt(1 - 0.999**self.steps)
        moved = []
        for i, (value, g) in enumerate(zip(point, gradient, strict=True)):
            self.means[i] += 0.1 * (g - self.means[i])
            self.squares[i] = 0.999 * self.squares[i] + 0.001 * g * g
            denominator = math.sqrt(self.squares[i]) / unbias + 1e-8
            moved.append(value - rate * self.means[i] / denominator)
        return moved[0], moved[1]


def descend(
    weighting: Weighting,
    start: Point,
    steps: int,
    positive: bool = False,
    stop: Callable[[Point], bool] | None = None,
) -> Point:
    """Where Adam ends from `start` under a weighting, in float64.

    With `positive` the weighting gets the losses above their lower bounds, which leaves the
    gradients as they are.
    """
    adam, state = Adam(), weighting.init(NAMES, torch.device("cpu"))
    offset = torch.tensor(BOUNDS if positive else (0.0, 0.0), dtype=torch.float64)
    point, (values, rows) = start, linearized(start)
    for step in range(steps):
        values_above = torch.tensor(values, dtype=torch.float64) - offset
        answer = weighting.weights(
            Statistics(NAMES, values_above, _gramian(weighting, rows), step), state
        )
        first, second = answer.coefficients.tolist()
        state = answer.state
        direction = [first * a + second * b for a, b in zip(*rows, strict=True)]
        point = adam.step(point, direction)
        values, rows = linearized(point)
        if weighting.observes_step:
            values_above = torch.tensor(values, dtype=torch.float64) - offset
            state = weighting.observe(Statistics(NAMES, values_above, step=step + 1), state)
        if stop is not None and step % 100 == 0 and stop(point):
            break
    return point


def _gramian(weighting: Weighting, rows: list[list[float]]) -> Tensor | None:
    if not weighting.uses_gramian:
        return None
    (a, b), (c, d) = rows
    cross = a * c + b * d
    return torch.tensor([[a * a + b * b, cross], [cross, c * c + d * d]], dtype=torch.float64)
