"""A regression from few noisy data, with the squared norm of the weights as a second loss.

The data are Friedman's first function (Annals of Statistics 19, 1991): five of ten uniform inputs
matter, and the noise has a standard deviation of 1. His samples have 50 to 200 points; here they
have 100. The network is wide for so few. Zero weights minimise the penalty, so it is no objective
of its own, and some small weight on it is best. The score is the root mean square error, relative
to that of the mean.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training

POINTS = 100
HIDDEN = 64


def friedman(x: Tensor) -> Tensor:
    """Friedman's function, less its mean and in units of its standard deviation."""
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5).square()
    return (y + 10 * x[:, 3] + 5 * x[:, 4] - 14.4) / 4.9


@functools.cache
def noiseless(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(2000, 10, generator=torch.Generator().manual_seed(seed))
    return x, friedman(x)


def start(seed: int) -> Training:
    x = torch.rand(POINTS, 10)
    y = friedman(x) + torch.randn(POINTS) / 4.9
    model = nn.Sequential(
        nn.Linear(10, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
    )
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]

    def losses(_: None) -> dict[str, Tensor]:
        return {
            "data": (model(2 * x - 1).squeeze(1) - y).square().mean(),
            "penalty": sum(weight.square().sum() for weight in weights),
        }

    @torch.no_grad()
    def error(data: tuple[Tensor, Tensor]) -> float:
        inputs, values = data
        residual = model(2 * inputs - 1).squeeze(1) - values
        return float((residual.square().mean() / values.var()).sqrt())

    return Training(
        list(model.parameters()),
        draw=lambda: None,
        losses=losses,
        validate=lambda: error(noiseless(1)),
        test=lambda: error(noiseless(2)),
    )


PROBLEM = Problem(
    title="Regression from few data, with the norm of the weights as a loss",
    score="root mean square error relative to that of the mean",
    start=start,
    loss_names=("data", "penalty"),
    primary="data",
    steps=300,
    rates=(3e-3, 1e-2, 3e-2),
    trivial=0.95,
    expected_to_lose=True,
)
