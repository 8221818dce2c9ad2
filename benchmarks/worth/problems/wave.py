"""The wave equation by a physics-informed network: residual, position at the edge, first velocity.

u_tt = u_xx for x and t in [0, 1], with u(0, t) = u(1, t) = 0, u_t(x, 0) = 0 and u(x, 0) such that
u = sin(pi x) cos(pi t) + .5 sin(2 pi x) cos(2 pi t). The benchmark of the paper on the neural
tangent kernel (Wang, Yu & Perdikaris 2022, arXiv 2007.14527). Each loss is a mean square at fresh
random points: of the residual, of the position at the first time and at both walls, and of the
first velocity.

Published: u_tt = 4 u_xx and a second mode .5 sin(4 pi x) cos(8 pi t). That stays above a score of
.5 in the few steps there are, hence the slower waves. Here: 2 hidden layers of 32 units, 128 + 64 +
64 points, and a cosine schedule.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._pinn import Standardise, differentiate, relative_l2, tanh_network

SPEED = 1.0
MODE = 2  # Waves of the second mode.
INTERIOR = 128
START = 64
WALLS = 64
WIDTH, DEPTH = 32, 2


class Batch(NamedTuple):
    """Rows (x, t): first the interior, then the first time, then the two walls."""

    points: Tensor
    position: Tensor


def solution(points: Tensor) -> Tensor:
    x, t = points.unbind(1)
    modes = [
        height * torch.sin(n * math.pi * x) * torch.cos(n * SPEED * math.pi * t)
        for n, height in ((1, 1.0), (MODE, 0.5))
    ]
    return modes[0] + modes[1]


def draw() -> Batch:
    points = torch.rand(INTERIOR + START + WALLS, 2)
    points[INTERIOR:-WALLS, 1] = 0
    points[-WALLS:, 0] = points[-WALLS:, 0].round()
    return Batch(points, solution(points[INTERIOR:]))


def losses(network: nn.Sequential, batch: Batch) -> dict[str, Tensor]:
    u, (_, u_t), (u_xx, u_tt) = differentiate(network, batch.points, twice=2)
    return {
        "pde": (u_tt - SPEED**2 * u_xx)[:INTERIOR].square().mean(),
        "position": (u[INTERIOR:, 0] - batch.position).square().mean(),
        "velocity": u_t[INTERIOR:-WALLS].square().mean(),
    }


@functools.cache
def grid() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(0, 1, 101)
    points = torch.cartesian_prod(axis, axis)
    return points, solution(points)


def start(seed: int) -> Training:
    network = tanh_network(2, WIDTH, DEPTH, Standardise(0, 1))
    points, exact = grid()
    return Training(
        list(network.parameters()),
        draw=draw,
        losses=lambda batch: losses(network, batch),
        validate=lambda: relative_l2(network, points[0::2], exact[0::2]),
        test=lambda: relative_l2(network, points[1::2], exact[1::2]),
    )


PROBLEM = Problem(
    title="A network for the wave equation",
    score="relative L2 error",
    start=start,
    loss_names=("pde", "position", "velocity"),
    primary="pde",
    steps=440,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.95,
)
