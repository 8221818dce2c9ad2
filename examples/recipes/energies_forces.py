"""A small potential, fitted to energies and to the forces on each atom in their own units.

Clusters of five atoms, rattled at random, with the energies of a Morse potential. The network sees
the distances through Gaussians, adds up one energy for each atom, and gives forces as the negative
gradient. The losses are mean squared errors in eV² and (eV/Å)².

    python -m examples.recipes.energies_forces --figure potential.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.recipes import common
from moo_balance import BalancedOptimizer, FixedWeights, History, NashMTL, Sum, SumLog, diagnose
from moo_balance.weighting import Weighting

ATOMS, FUNCTIONS, BATCH = 5, 12, 32
DEPTH, STEEPNESS, DISTANCE = 0.5, 1.5, 2.5  # eV, 1/Å, Å
TRIALS = (0.001, 0.01, 0.1, 10.0)  # static weights of the energy; the plain sum is one more trial


class Clusters(NamedTuple):
    positions: Tensor  # Å, [N, ATOMS, 3]
    energy: Tensor  # eV, [N], counted from the mean of the training set
    forces: Tensor  # eV/Å, [N, ATOMS, 3]

    def take(self, index: Tensor | slice) -> Clusters:
        return Clusters(*(part[index] for part in self))


def distances(positions: Tensor) -> Tensor:
    """Of each atom to the others, shape [N, ATOMS, ATOMS - 1]."""
    others = torch.tensor([[j for j in range(ATOMS) if j != i] for i in range(ATOMS)])
    return (positions[:, others] - positions[:, :, None]).norm(dim=3)


def forces_of(energy: Tensor, positions: Tensor, create_graph: bool = False) -> Tensor:
    (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph)
    return -slope


def make_clusters(count: int = 600) -> Clusters:
    """Triangular bipyramids with atoms moved by 0.15 Å, and their energies and forces."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(3) * 2 * torch.pi / 3
    ring = torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1) / 3**0.5
    tips = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]) * (2 / 3) ** 0.5
    noise = torch.randn(count, ATOMS, 3, generator=generator)
    positions = (DISTANCE * torch.cat([ring, tips]) + 0.15 * noise).requires_grad_()
    decay = torch.exp(-STEEPNESS * (distances(positions) - DISTANCE))
    energy = 0.5 * DEPTH * (decay.square() - 2 * decay).sum((1, 2))
    forces = forces_of(energy, positions)
    return Clusters(positions.detach(), (energy - energy[:200].mean()).detach(), forces)


class Potential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.atom = nn.Sequential(nn.Linear(FUNCTIONS, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.energy = nn.Linear(32, 1)
        self.register_buffer("centres", torch.linspace(1.5, 5.0, FUNCTIONS))

    def forward(self, positions: Tensor, training: bool = True) -> tuple[Tensor, Tensor]:
        positions = positions.clone().requires_grad_()
        gaps = distances(positions).unsqueeze(3) - self.centres
        functions = torch.exp(-5.0 * gaps.square()).sum(2)
        energy = self.energy(self.atom(functions)).sum((1, 2))
        return energy, forces_of(energy, positions, create_graph=training)


def compute_losses(model: Potential, batch: Clusters) -> dict[str, Tensor]:
    energy, forces = model(batch.positions)
    return {
        "energy": (energy - batch.energy).square().mean(),
        "forces": (forces - batch.forces).square().mean(),
    }


def errors(model: Potential, clusters: Clusters) -> tuple[float, float]:
    """Mean absolute errors in meV and meV/Å."""
    energy, forces = model(clusters.positions, training=False)
    absolute = (energy - clusters.energy).abs().mean(), (forces - clusters.forces).abs().mean()
    return 1000 * absolute[0].item(), 1000 * absolute[1].item()


class Run(NamedTuple):
    model: Potential
    validation: float  # product of the two errors
    energy: float
    forces: float
    history: History


def start(weighting: Weighting, seed: int) -> tuple[Potential, BalancedOptimizer]:
    torch.manual_seed(seed)
    model = Potential()
    return model, BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), weighting)


def train(weighting: Weighting, clusters: Clusters, seed: int, steps: int) -> Run:
    model, optimizer = start(weighting, seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = History()
    for _ in range(steps):
        batch = clusters.take(torch.randint(200, (BATCH,)))
        optimizer.zero_grad()
        optimizer.backward(compute_losses(model, batch))
        optimizer.step()
        schedule.step()
        history.append(optimizer.metrics)
    validation = errors(model, clusters.take(slice(200, 400)))
    test = errors(model, clusters.take(slice(400, 600)))
    return Run(model, validation[0] * validation[1], *test, history)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, result),) = common.make_axes(1, 3)
    common.draw_history(runs["NashMTL"][0].history, losses, coefficients)
    for colour, (name, seeds) in zip(common.COLOURS, runs.items(), strict=False):
        points = [run.energy for run in seeds], [run.forces for run in seeds]
        result.scatter(*points, color=colour, s=18, label=name)
    result.set(xlabel="energy, meV", ylabel="forces, meV/Å", title="test error")
    result.legend()
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 10 if args.quick else 600
    clusters = make_clusters()
    static = {f"weight {w:g}": FixedWeights({"energy": w, "forces": 1.0}) for w in TRIALS}
    best = min(static, key=lambda name: train(static[name], clusters, args.seed, steps).validation)
    methods = {"Sum": Sum(), best: static[best], "SumLog": SumLog(), "NashMTL": NashMTL()}
    runs = {
        name: [train(rule, clusters, seed, steps) for seed in args.seeds]
        for name, rule in methods.items()
    }

    batches = [clusters.take(torch.randperm(200)[:BATCH]) for _ in range(12)]
    model, optimizer = start(Sum(), args.seed)
    for batch in batches * (1 if args.quick else 10):
        optimizer.step(partial(compute_losses, model, batch))
    print("Early in a run with the sum:")
    print(diagnose(partial(compute_losses, model), model, batches), end="\n\n")

    timed = {}
    for name, method in methods.items():
        model, optimizer = start(method, args.seed)
        timed[name] = partial(optimizer.step, partial(compute_losses, model, batches[0]))
    times = common.step_times(timed, rounds=5 if args.quick else 100)
    scores = {name: [(run.energy, run.forces) for run in each] for name, each in runs.items()}
    header = ["method", "energy, meV", "forces, meV/Å", "time of a step"]
    common.print_scores(header, scores, times)
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
