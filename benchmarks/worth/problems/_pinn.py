"""What the physics-informed problems share: a network, derivatives and the score."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """Moves points of a uniform distribution on [low, high] to mean 0 and variance 1."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.mean = (low + high) / 2
        self.deviation = (high - low) / math.sqrt(12)

    def forward(self, points: Tensor) -> Tensor:
        return (points - self.mean) / self.deviation


def tanh_network(
    inputs: int, width: int, depth: int, *first: nn.Module, outputs: int = 1
) -> nn.Sequential:
    """A network of `depth` hidden layers with Xavier's initial weights."""
    sizes = [inputs] + [width] * depth
    layers = list(first)
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    layers.append(nn.Linear(width, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Derivatives(NamedTuple):
    """Outputs at N points, and derivatives by the coordinates of each point.

    Args:
        value: Shape [N, outputs].
        first: By each coordinate, shape [coordinates, N, outputs].
        second: By each of the first coordinates, twice, shape [`twice`, N, outputs].
    """

    value: Tensor
    first: Tensor
    second: Tensor


def differentiate(network: nn.Sequential, points: Tensor, twice: int) -> Derivatives:
    """Carry values and derivatives through the layers together.

    Two calls of `torch.autograd.grad` would give the same, and take longer.

    Args:
        network: As of `tanh_network`.
        points: Shape [N, coordinates].
        twice: Of how many coordinates, from the first on, second derivatives are asked for.
    """
    coordinates = points.shape[1]
    value = points
    first, second = torch.eye(coordinates).unsqueeze(1), torch.zeros(twice, 1, coordinates)
    for layer in network:
        if isinstance(layer, Standardise):
            value, first = layer(value), first / layer.deviation
        elif isinstance(layer, nn.Linear):
            value = layer(value)
            derivatives = torch.cat([first, second]) @ layer.weight.T
            first, second = derivatives.split([coordinates, twice])
        else:
            value = value.tanh()
            slope = 1 - value.square()
            before, first = first, slope * first
            curved = value * first[:twice]
            second = torch.addcmul(slope * second, curved, before[:twice], value=-2.0)
    return Derivatives(value, first, second)


@torch.no_grad()
def relative_l2(network: nn.Module, points: Tensor, exact: Tensor) -> float:
    error = network(points)[:, 0] - exact
    return float(error.norm() / exact.norm())
