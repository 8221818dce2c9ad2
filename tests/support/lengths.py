"""Graphs whose gradients have lengths far from one another, and far from 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.support.engine_graphs import Graph, drawn, parameter

Build = Callable[[Sequence[float]], Graph]


def small(scales: Sequence[float]) -> Graph:
    """Small parameters, copied into one vector for each loss."""
    weights = [parameter(4, 3, dtype=torch.float32), parameter(3, seed=1, dtype=torch.float32)]
    output = drawn(5, 4, seed=2).float() @ weights[0] * weights[1]
    return scale_losses(output, scales, weights)


def large(scales: Sequence[float]) -> Graph:
    weight = parameter(2**16, dtype=torch.float32)
    return scale_losses(weight * drawn(2**16, seed=1).float(), scales, [weight])


def factored(scales: Sequence[float]) -> Graph:
    """Wide layers on few samples, whose gradients stay factored."""
    layers = [nn.Linear(24, 24) for _ in range(2)]
    with torch.no_grad():
        params = [p for layer in layers for p in layer.parameters()]
        for k, param in enumerate(params):
            param.copy_(drawn(*param.shape, seed=k))
    return scale_losses(
        layers[1](torch.tanh(layers[0](drawn(2, 24, seed=9).float()))), scales, params
    )


def sparse(scales: Sequence[float]) -> Graph:
    table = nn.Embedding(6, 3, sparse=True)
    with torch.no_grad():
        table.weight.copy_(drawn(6, 3))
    return scale_losses(table(torch.tensor([0, 2, 2, 5])), scales, [table.weight])


def complex_valued(scales: Sequence[float]) -> Graph:
    weight = parameter(3, dtype=torch.complex64)
    return scale_losses((weight * drawn(3, dtype=torch.complex64)).abs(), scales, [weight])


def scale_losses(output: Tensor, scales: Sequence[float], params: Sequence[Tensor]) -> Graph:
    bases = [output.sum(), output.square().mean(), output.sin().sum()]
    losses = [base * scale for base, scale in zip(bases, scales, strict=True)]
    return Graph(losses, params)


over_builds = pytest.mark.parametrize(
    "build", [small, large, factored, sparse, complex_valued], ids=lambda build: build.__name__
)
SCALES = {
    "long": (1e22, 1e22, 1e22),
    "short": (1e-25, 1e-25, 1e-25),
    "long and short": (1e25, 1.0, 1e-30),
    "one long": (1.0, 1e25, 1.0),
    "zero and short": (0.0, 1.0, 1e-28),
}
over_scales = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


def assert_close(found: Tensor, jacobian: Tensor) -> None:
    """Each entry agrees, compared with the lengths of its two gradients."""
    norms = jacobian.norm(dim=1)
    lengths = torch.where(norms > 0, norms, 1.0)
    cosines = found.double() / lengths[:, None] / lengths
    expected = (jacobian / lengths[:, None]) @ (jacobian / lengths[:, None]).T
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)
