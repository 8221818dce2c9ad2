"""Burgers' equation by a physics-informed network: residual, boundary and initial condition.

u_t + u u_x = (.01 / pi) u_xx for x in [-1, 1] and t in [0, 1], with u(x, 0) = -sin(pi x) and
u(-1, t) = u(1, t) = 0. This is the example notebook of ConFIG (Liu et al. 2024, arXiv 2408.11104;
tum-pbs/ConFIG, docs/examples/pinn_burgers.ipynb). Each loss is a mean square at fresh points of a
Latin hypercube.

The notebook has 5 hidden layers of 50 units, 2,000 + 50 + 50 points and 5,000 steps of Adam at 1e-4
(`benchmarks.worth.published` runs that). Here: 3 hidden layers of 24 units, 192 + 32 + 32 points,
fewer steps, a larger rate and a cosine schedule. The score is taken at the end of the training.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._pinn import differentiate, relative_l2, tanh_network

VISCOSITY = 0.01 / math.pi
WIDTH, DEPTH = 24, 3


class Batch(NamedTuple):
    """Rows (x, t): first the interior, then the boundary, then the initial time."""

    points: Tensor
    interior: int
    boundary: int


def latin_hypercube(count: int, dimensions: int) -> Tensor:
    """Points of the unit cube, of which each of `count` slices holds one, along every axis."""
    slices = torch.rand(count, dimensions).argsort(0)
    return (slices + torch.rand(count, dimensions)) / count


def draw(interior: int, boundary: int, initial: int) -> Batch:
    points = torch.zeros(interior + boundary + initial, 2)
    inside, walls, beginning = torch.split(points, [interior, boundary, initial])
    inside[:] = latin_hypercube(interior, 2)
    inside[:, 0].mul_(2).sub_(1)
    walls[:, 0] = torch.arange(boundary) % 2 * 2 - 1
    walls[:, 1:] = latin_hypercube(boundary, 1)
    beginning[:, :1] = 2 * latin_hypercube(initial, 1) - 1
    return Batch(points, interior, boundary)


def losses(network: nn.Sequential, batch: Batch) -> dict[str, Tensor]:
    inside, edges = batch.points[: batch.interior], batch.points[batch.interior :]
    u, (u_x, u_t), (u_xx,) = differentiate(network, inside, twice=1)
    walls, beginning = network(edges)[:, 0].tensor_split([batch.boundary])
    wanted = -torch.sin(math.pi * edges[batch.boundary :, 0])
    return {
        "pde": (u_t + u * u_x - VISCOSITY * u_xx).square().mean(),
        "boundary": walls.square().mean(),
        "initial": (beginning - wanted).square().mean(),
    }


@functools.cache
def solution() -> tuple[Tensor, Tensor]:
    """Points (x, t) on a grid of 100 times and 256 places, and the solution there.

    By the Cole-Hopf transformation, with a Gauss-Hermite quadrature of its integrals.
    """
    x = np.linspace(-1 + 1 / 256, 1 - 1 / 256, 256)
    t = np.linspace(0, 1, 100)
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    origin = x[:, None] - nodes * np.sqrt(4 * VISCOSITY * t)[:, None, None]
    mass = weights * np.exp((1 - np.cos(np.pi * origin)) / (2 * math.pi * VISCOSITY) - 100)
    u = -(np.sin(np.pi * origin) * mass).sum(-1) / mass.sum(-1)
    grid = np.stack([np.tile(x, 100), np.repeat(t, 256)], axis=1)
    return torch.tensor(grid, dtype=torch.float32), torch.tensor(u.ravel(), dtype=torch.float32)


def start(seed: int) -> Training:
    network = tanh_network(2, WIDTH, DEPTH)
    points, exact = solution()
    return Training(
        list(network.parameters()),
        draw=lambda: draw(interior=192, boundary=32, initial=32),
        losses=lambda batch: losses(network, batch),
        validate=lambda: relative_l2(network, points[0::2], exact[0::2]),
        test=lambda: relative_l2(network, points[1::2], exact[1::2]),
    )


PROBLEM = Problem(
    title="A network for Burgers' equation",
    score="relative L2 error",
    start=start,
    loss_names=("pde", "boundary", "initial"),
    primary="pde",
    steps=450,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.95,
)
