"""A reaction rate by a physics-informed network, from noisy data: an inverse problem.

.01 u'' - k(x) u = sin(2 pi x) for x in [0, 1] with u(0) = u(1) = 0, as in the paper on gPINN (Yu et
al. 2022, arXiv 2111.02801). The rate, k = .1 + exp(-.5 (x - .5)^2 / .15^2), is unknown and a second
output of the network. The concentration u is measured at 20 places with an error of .02. The score
is the relative L2 error of the rate. The losses are mean squares: of the residual at fresh random
points, of the misfit to the data and at the two ends.

The paper's code has separate hidden layers for u and k, 8 measurements without errors, the boundary
condition built in as well, and 200,000 steps. Here: shared hidden layers, 3 of 20 units, 64 points,
and a cosine schedule.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._pinn import Standardise, differentiate, tanh_network

DIFFUSION = 0.01
SENSORS = 20
NOISE = 0.02
POINTS = 64
CELLS = 1000
WIDTH, DEPTH = 20, 3


class Data(NamedTuple):
    """Places x, first of the sensors, then of the two ends, and the measurements."""

    known: Tensor
    measured: Tensor


def rate(x: np.ndarray) -> np.ndarray:
    return 0.1 + np.exp(-0.5 * (x - 0.5) ** 2 / 0.15**2)


@functools.cache
def solution() -> tuple[np.ndarray, np.ndarray]:
    """A grid and the concentration on it, by finite differences of the second order."""
    x = np.linspace(0, 1, CELLS + 1)
    bands = np.full((3, CELLS - 1), DIFFUSION * CELLS**2)
    bands[1] = -2 * DIFFUSION * CELLS**2 - rate(x[1:-1])
    u = np.zeros_like(x)
    u[1:-1] = solve_banded((1, 1), bands, np.sin(2 * np.pi * x[1:-1]))
    return x, u


def measure() -> Data:
    places = np.linspace(0, 1, SENSORS + 2)[1:-1]
    exact = torch.tensor(np.interp(places, *solution()), dtype=torch.float32)
    known = torch.tensor(np.append(places, (0, 1)), dtype=torch.float32)[:, None]
    return Data(known, exact + NOISE * torch.randn(SENSORS))


def losses(network: nn.Sequential, data: Data, x: Tensor) -> dict[str, Tensor]:
    value, _, (second,) = differentiate(network, x, twice=1)
    (u, k), u_xx = value.unbind(1), second[:, 0]
    known = network(data.known)[:, 0]
    source = torch.sin(2 * math.pi * x[:, 0])
    return {
        "pde": (DIFFUSION * u_xx - k * u - source).square().mean(),
        "data": (known[:-2] - data.measured).square().mean(),
        "boundary": known[-2:].square().mean(),
    }


@torch.no_grad()
def error_of_rate(network: nn.Module, x: np.ndarray) -> float:
    k = network(torch.tensor(x, dtype=torch.float32)[:, None])[:, 1].numpy()
    return float(np.linalg.norm(k - rate(x)) / np.linalg.norm(rate(x)))


def start(seed: int) -> Training:
    network = tanh_network(1, WIDTH, DEPTH, Standardise(0, 1), outputs=2)
    data = measure()
    x, _ = solution()
    return Training(
        list(network.parameters()),
        draw=lambda: torch.rand(POINTS, 1),
        losses=lambda points: losses(network, data, points),
        validate=lambda: error_of_rate(network, x[0::2]),
        test=lambda: error_of_rate(network, x[1::2]),
    )


PROBLEM = Problem(
    title="A network for a reaction rate, from noisy data",
    score="relative L2 error of the rate",
    start=start,
    loss_names=("pde", "data", "boundary"),
    primary="data",
    steps=550,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.95,
)
