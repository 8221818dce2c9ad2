"""What the physics-informed problems share: a network, derivatives and the score."""

from __future__ import annotations

import itertools
import math

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


def gradient(outputs: Tensor, points: Tensor) -> Tensor:
    """The derivatives of each output by the coordinates of its point."""
    return torch.autograd.grad(outputs.sum(), points, create_graph=True)[0]


@torch.no_grad()
def relative_l2(network: nn.Module, points: Tensor, exact: Tensor) -> float:
    error = network(points)[:, 0] - exact
    return float(error.norm() / exact.norm())
