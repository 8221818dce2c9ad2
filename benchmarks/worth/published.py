"""Burgers' equation at the size of the notebook of ConFIG: the plain sum and ConFIG.

python -m benchmarks.worth.published [--seeds 3] [--steps 5000] [--every 10]

The notebook (tum-pbs/ConFIG, docs/examples/pinn_burgers.ipynb) has one seed. It reports the least
mean squared error on the grid of the reference over the whole training, so that its choice of the
step sees the test data. Here the error is taken every few steps only, for the cost of it. The
reference is the Cole-Hopf solution.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn
from torch.optim import Adam

from benchmarks.worth.problems import burgers
from benchmarks.worth.problems._pinn import tanh_network
from moo_balance import BalancedOptimizer, ConFIG, Sum, Weighting

PUBLISHED = {"Sum": 0.03095, "ConFIG": 0.00638}


@torch.no_grad()
def squared_error(network: nn.Module) -> float:
    points, exact = burgers.solution()
    return float((network(points)[:, 0] - exact).square().mean())


def best_error(weighting: Weighting, seed: int, steps: int, every: int) -> float:
    """Train as the notebook does and return the least error on the grid."""
    torch.manual_seed(seed)
    network = tanh_network(inputs=2, width=50, depth=5)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, 0.001)
    optimizer = BalancedOptimizer(Adam(network.parameters(), lr=1e-4), weighting)
    best = math.inf
    for step in range(1, steps + 1):
        batch = burgers.draw(interior=2000, boundary=50, initial=50)
        optimizer.zero_grad()
        optimizer.backward(burgers.losses(network, batch))
        optimizer.step()
        if step % every == 0 or step == steps:
            best = min(best, squared_error(network))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=10, help="steps from one error to the next")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for make in (Sum, ConFIG):
        for seed in range(arguments.seeds):
            error = best_error(make(), seed, arguments.steps, arguments.every)
            published = PUBLISHED[make.__name__]
            print(
                f"{make.__name__}, seed {seed}: best MSE {error:.5f} (published {published:.5f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
