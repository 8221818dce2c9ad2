"""A physics-informed network for the viscous Burgers equation: Adam with balance, then L-BFGS.

u_t + u u_x = ν u_xx for x in [-1, 1] and t in [0, 1], with u(x, 0) = -sin(πx) and u(±1, t) = 0.
Compared are the plain sum, static weights, and two methods, by the relative L2 error against a
reference solution. Each run ends with L-BFGS, whose line search needs a fixed function: there the
coefficients of the last balanced step stay as they are.

    python -m examples.recipes.pinn_burgers --figure burgers.svg
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.recipes import common
from moo_balance import (
    BalancedOptimizer,
    FixedWeights,
    GradientNorms,
    History,
    NashMTL,
    Sum,
    diagnose,
)
from moo_balance.weighting import Weighting

VISCOSITY = 0.03 / math.pi
TRIALS = (10.0, 100.0)  # static weights of the two conditions; the plain sum is the third trial


class Points(NamedTuple):
    """Coordinates (x, t), shape [N, 2]."""

    inside: Tensor
    walls: Tensor
    start: Tensor


def draw_points(inside: int = 500, edge: int = 50) -> Points:
    square = torch.quasirandom.SobolEngine(2, scramble=True).draw(inside)
    walls = torch.stack([torch.arange(edge) % 2 * 2.0 - 1, torch.rand(edge)], dim=1)
    start = torch.stack([torch.linspace(-1, 1, edge), torch.zeros(edge)], dim=1)
    return Points(square * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0]), walls, start)


def reference(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The exact solution for t > 0, by the Cole-Hopf transformation.

    u = -E[sin(πy) f(y)] / E[f(y)] with y = x - z, f(y) = exp(-cos(πy) / 2πν) and z normal with the
    variance 2νt, by Gauss-Hermite quadrature.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    y = x[..., None] - nodes * np.sqrt(4 * VISCOSITY * t)[..., None]
    mass = weights * np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * VISCOSITY))
    return -(np.sin(np.pi * y) * mass).sum(-1) / mass.sum(-1)


def compute_losses(network: nn.Module, points: Points) -> dict[str, Tensor]:
    inside = points.inside.clone().requires_grad_()
    u = network(inside)
    u_x, u_t = torch.autograd.grad(u.sum(), inside, create_graph=True)[0].unbind(1)
    u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 0]
    start = network(points.start)[:, 0] + torch.sin(math.pi * points.start[:, 0])
    return {
        "residual": (u_t + u[:, 0] * u_x - VISCOSITY * u_xx).square().mean(),
        "initial": start.square().mean(),
        "boundary": network(points.walls).square().mean(),
    }


class Run(NamedTuple):
    network: nn.Module
    after_adam: float
    error: float
    history: History


def start(weighting: Weighting, seed: int) -> tuple[nn.Module, Points, BalancedOptimizer]:
    torch.manual_seed(seed)
    layers = [m for n in (2, 24, 24) for m in (nn.Linear(n, 24), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Linear(24, 1))
    adam = torch.optim.Adam(network.parameters(), lr=5e-3)
    return network, draw_points(), BalancedOptimizer(adam, weighting)


def train(weighting: Weighting, seed: int, steps: int, finish: int) -> Run:
    network, points, optimizer = start(weighting, seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=5e-4)
    history = History()
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(compute_losses(network, points))
        optimizer.step()
        schedule.step()
        history.append(optimizer.metrics)
    after_adam = relative_error(network)

    frozen = {name: float(c) for name, c in optimizer.metrics.coefficients.items()}
    frozen = {name: c / sum(frozen.values()) for name, c in frozen.items()}
    lbfgs = torch.optim.LBFGS(
        network.parameters(), max_iter=finish, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = sum(frozen[name] * loss for name, loss in compute_losses(network, points).items())
        loss.backward()
        return loss

    lbfgs.step(closure)
    return Run(network, after_adam, relative_error(network), history)


def solution_on_grid() -> tuple[Tensor, Tensor]:
    x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0.01, 1, 100))
    grid = torch.tensor(np.stack([x, t], axis=-1), dtype=torch.float32)
    return grid, torch.tensor(reference(x, t), dtype=torch.float32)


@torch.no_grad()
def relative_error(network: nn.Module) -> float:
    grid, exact = solution_on_grid()
    return float((network(grid)[..., 0] - exact).norm() / exact.norm())


def weigh_conditions(weight: float) -> FixedWeights:
    return FixedWeights({"residual": 1.0, "initial": weight, "boundary": weight})


def draw(run: Run, runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, solution),) = common.make_axes(1, 3)
    common.draw_history(run.history, losses, coefficients)
    x = np.linspace(-1, 1, 201)
    exact = reference(x, np.ones(201))
    solution.plot(x, exact, color=common.INK, linestyle="--", zorder=3, label="reference")
    inputs = torch.tensor(np.stack([x, np.ones(201)], axis=1), dtype=torch.float32)
    for colour, (name, (first, *_)) in zip(common.COLOURS, runs.items(), strict=False):
        solution.plot(x, first.network(inputs).detach(), color=colour, linewidth=1, label=name)
    solution.set(title="u(x, 1)", xlabel="x")
    solution.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps, finish = (10, 5) if args.quick else (400, 400)
    static = {f"weight {weight:g}": weigh_conditions(weight) for weight in TRIALS}
    # By the error, which the other methods do not see.
    best = min(static, key=lambda name: train(static[name], args.seed, steps, finish).error)
    methods = {
        "Sum": Sum(),
        best: static[best],
        "GradientNorms": GradientNorms(every=10),
        "NashMTL": NashMTL(),
    }
    runs = {
        name: [train(m, seed, steps, finish) for seed in args.seeds] for name, m in methods.items()
    }

    network, points, optimizer = start(Sum(), args.seed)
    for _ in range(steps // 4):
        optimizer.step(partial(compute_losses, network, points))
    batches = [draw_points() for _ in range(8)]
    print(f"After {steps // 4} steps with the sum:")
    print(diagnose(partial(compute_losses, network), network, batches), end="\n\n")

    timed = {}
    for name, method in methods.items():
        network, points, optimizer = start(method, args.seed)
        timed[name] = partial(optimizer.step, partial(compute_losses, network, points))
    times = common.step_times(timed, rounds=5 if args.quick else 60)
    scores = {name: [(run.after_adam, run.error) for run in each] for name, each in runs.items()}
    header = ["method", "error after Adam", "error after L-BFGS", "time of a step"]
    common.print_scores(header, scores, times)
    if args.figure:
        draw(runs["NashMTL"][0], runs, args.figure)


if __name__ == "__main__":
    main()
