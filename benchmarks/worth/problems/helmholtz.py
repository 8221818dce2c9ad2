"""Helmholtz' equation by a physics-informed network: residual and boundary condition.

u_xx + u_yy + u = q on [-1, 1]^2 with u = 0 on the boundary, and q such that
u = sin(pi x) sin(2 pi y). The benchmark of learning-rate annealing (Wang, Teng & Perdikaris 2021,
arXiv 2001.04536). Each loss is a mean square at fresh random points. That of the residual is large,
as q is.

Published: sin(4 pi y), up to 3 hidden layers of 50 units, 128 points inside and 128 on each edge,
40,000 steps. Here: sin(2 pi y), which trains in the few steps there are, 2 hidden layers of 32
units, 128 points inside and 32 on each edge, and a cosine schedule.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._pinn import Standardise, differentiate, relative_l2, tanh_network

WAVES = (1, 2)
INTERIOR = 128
EDGE = 32
WIDTH, DEPTH = 32, 2


class Batch(NamedTuple):
    """Rows (x, y): first the interior, then the four edges."""

    points: Tensor
    source: Tensor


def solution(points: Tensor) -> Tensor:
    return torch.sin(math.pi * torch.tensor(WAVES) * points).prod(1)


def draw() -> Batch:
    points = 2 * torch.rand(INTERIOR + 4 * EDGE, 2) - 1
    edges = points[INTERIOR:].view(4, EDGE, 2)
    edges[0, :, 0], edges[1, :, 0], edges[2, :, 1], edges[3, :, 1] = -1, 1, -1, 1
    laplacian = -(math.pi**2) * sum(n**2 for n in WAVES)
    return Batch(points, (laplacian + 1) * solution(points[:INTERIOR]))


def losses(network: nn.Sequential, batch: Batch) -> dict[str, Tensor]:
    u, _, (u_xx, u_yy) = differentiate(network, batch.points[:INTERIOR], twice=2)
    return {
        "pde": ((u_xx + u_yy + u)[:, 0] - batch.source).square().mean(),
        "boundary": network(batch.points[INTERIOR:]).square().mean(),
    }


@functools.cache
def grid() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, 101)
    points = torch.cartesian_prod(axis, axis)
    return points, solution(points)


def start(seed: int) -> Training:
    network = tanh_network(2, WIDTH, DEPTH, Standardise(-1, 1))
    points, exact = grid()
    return Training(
        list(network.parameters()),
        draw=draw,
        losses=lambda batch: losses(network, batch),
        validate=lambda: relative_l2(network, points[0::2], exact[0::2]),
        test=lambda: relative_l2(network, points[1::2], exact[1::2]),
    )


PROBLEM = Problem(
    title="A network for Helmholtz' equation",
    score="relative L2 error",
    start=start,
    loss_names=("pde", "boundary"),
    primary="pde",
    steps=480,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.95,
)
