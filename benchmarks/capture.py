"""Losses that can be driven to their bound cheaply, and capture the methods on log losses.

    python -m benchmarks.capture --seeds 3

Three small problems: the KL term of a beta-VAE, which is zero once nothing is encoded; the boundary
loss of a Poisson equation, which the function zero satisfies; the size loss of a detector, which is
learned in a few steps. Each is trained with the plain sum, with log methods as published, and with
remedies: a shift of 1, which depends on the units of the losses, and floors relative to what a
loss has been, which do not.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moo_balance import FAMO, AnalyticQP, BalancedOptimizer, Sum, SumLog, Weighting
from moo_balance.weighting import State, Statistics, WeightingOutput

Losses = dict[str, Tensor]


class Problem(NamedTuple):
    """Parameters, losses of the next batch, the score at the end, learning rate and steps."""

    params: Sequence[nn.Parameter]
    losses: Callable[[], Losses]
    score: Callable[[], float]
    lr: float
    steps: int


@dataclass(frozen=True)
class Floored(Weighting):
    """`SumLog` with `ratio` times a reference added to each loss, to compare references.

    ``"first"`` is the first loss, ``"max"`` the largest, ``"ema"`` a moving average, and
    ``"mean"`` the geometric mean of the losses relative to their first ones.
    """

    reference: Literal["first", "max", "ema", "mean"]
    ratio: float

    def init(self, names: Sequence[str], device: torch.device) -> State:
        return {"reference": torch.full((len(names),), math.nan, dtype=torch.float64)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        losses, before = statistics.losses, state["reference"]
        reference = torch.where(before.isnan(), losses, before)
        if self.reference == "max":
            reference = torch.maximum(reference, losses)
        if self.reference == "ema":
            reference = reference.lerp(losses, 0.01)
        floor = self.ratio * reference
        if self.reference == "mean":
            floor = floor * (losses / reference).clamp(min=1e-12).log().mean().exp()
        coefficients = 1.0 / (losses + floor)
        coefficients = coefficients / coefficients.sum()
        return WeightingOutput(coefficients, coefficients, {"reference": reference})


RATIOS = (1e-3, 1e-2, 1e-1, 1.0)


def prefer(ratio: float) -> Callable[[str, str], dict[str, float]]:
    """The preference that makes the second loss count `ratio` times as much as the cheap one."""
    return lambda cheap, other: {cheap: 1.0, other: ratio}


Make = Callable[[str, str], Weighting]
METHODS: dict[str, Make] = {
    "Sum": lambda *names: Sum(),
    "SumLog": lambda *names: SumLog(floor=0),
    "FAMO": lambda *names: FAMO(lagged=True),
    "AnalyticQP, shift 0": lambda *names: AnalyticQP(shift=0.0),
    "SumLog, shift 1": lambda *names: SumLog(shift=1.0, floor=0),
    "SumLog, floor 0.01": lambda *names: SumLog(floor=0.01),
    "SumLog, floor 0.1": lambda *names: SumLog(floor=0.1),
    "SumLog, floor 1": lambda *names: SumLog(floor=1.0),
    "SumLog, preference 1:10": lambda *names: SumLog(floor=0, preference=prefer(10)(*names)),
    "SumLog, preference 1:100": lambda *names: SumLog(floor=0, preference=prefer(100)(*names)),
    "SumLog, floor 0.1 and 1:10": lambda *names: SumLog(floor=0.1, preference=prefer(10)(*names)),
    "SumLog, floor 0.1 and 1:100": lambda *names: SumLog(floor=0.1, preference=prefer(100)(*names)),
    "SumLog, floor 1 and 1:10": lambda *names: SumLog(floor=1.0, preference=prefer(10)(*names)),
}


def _floored(reference: Literal["first", "max", "ema", "mean"], ratio: float) -> Make:
    return lambda *names: Floored(reference, ratio)


REFERENCES: dict[str, Make] = {
    **{f"{ratio:g} of first": _floored("first", ratio) for ratio in RATIOS},
    **{f"{ratio:g} of ema": _floored("ema", ratio) for ratio in RATIOS},
    **{f"{ratio:g} of mean": _floored("mean", ratio) for ratio in RATIOS},
}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def autoencoder(seed: int) -> Problem:
    """A VAE on eight clusters; the score is the accuracy of a linear probe (chance: 0.125)."""
    generator = torch.Generator().manual_seed(100 + seed)
    centres = torch.randn(8, 16, generator=generator)
    labels = torch.randint(0, 8, (512,), generator=generator)
    data = centres[labels] + 0.3 * torch.randn(512, 16, generator=generator)
    encoder, decoder = mlp(16, 32, 8), mlp(4, 32, 16)

    def losses() -> Losses:
        batch = data[torch.randint(0, 512, (64,))]
        mean, log_std = encoder(batch).chunk(2, 1)
        codes = mean + log_std.exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1).mean()
        return {"kl": kl, "reconstruction": (decoder(codes) - batch).square().sum(1).mean()}

    @torch.no_grad()
    def score() -> float:
        mean = encoder(data).chunk(2, 1)[0]
        codes = torch.cat([mean, torch.ones(512, 1)], 1)
        train, targets = codes[:256], functional.one_hot(labels[:256], 8).float()
        probe = torch.linalg.solve(train.T @ train + 1e-2 * torch.eye(5), train.T @ targets)
        return float(((codes[256:] @ probe).argmax(1) == labels[256:]).float().mean())

    return Problem([*encoder.parameters(), *decoder.parameters()], losses, score, 3e-3, 400)


def poisson(seed: int) -> Problem:
    """Poisson's equation, zero at both ends; the score is the relative error (of zero: 1)."""
    network, wave = mlp(1, 24, 24, 1), 3 * math.pi
    points, ends = torch.linspace(0, 1, 41)[:, None], torch.tensor([[0.0], [1.0]])
    solution = torch.sin(wave * points)

    def losses() -> Losses:
        inputs = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), inputs, create_graph=True)
        residual = (curvature + wave**2 * solution).square().mean()
        return {"boundary": network(ends).square().mean(), "residual": residual}

    @torch.no_grad()
    def score() -> float:
        return float((network(points) - solution).norm() / solution.norm())

    return Problem([*network.parameters()], losses, score, 5e-3, 800)


def detector(seed: int) -> Problem:
    """Bumps in noise and their size, always 1; the score is the average precision."""
    layers = [nn.Conv1d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv1d(16, 16, 5, padding=2), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Conv1d(16, 2, 1))
    generator = torch.Generator().manual_seed(7 + seed)
    bump = torch.tensor([[[0.3, 0.7, 1.0, 0.7, 0.3]]])

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        objects = torch.rand(count, 1, 32, generator=generator) < 0.04
        noise = 0.5 * torch.randn(count, 1, 32, generator=generator)
        return functional.conv1d(objects.float(), bump, padding=2) + noise, objects[:, 0].float()

    def losses() -> Losses:
        signal, objects = draw(32, generator)
        logits, size = network(signal).unbind(1)
        objectness = functional.binary_cross_entropy_with_logits(logits, objects)
        missed = ((size - 1.0).square() * objects).sum() / objects.sum().clamp(min=1.0)
        return {"size": missed, "object": objectness}

    @torch.no_grad()
    def score() -> float:
        signal, objects = draw(128, torch.Generator().manual_seed(999))
        order = network(signal)[:, 0].flatten().argsort(descending=True)
        hits = objects.flatten()[order]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        return float((precision * hits).sum() / hits.sum())

    return Problem([*network.parameters()], losses, score, 5e-3, 350)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "autoencoder (accuracy)": autoencoder,
    "poisson (error)": poisson,
    "detector (precision)": detector,
}


def train(make: Callable[[int], Problem], method: Make, seed: int, steps: int | None) -> float:
    """The score after training."""
    torch.manual_seed(seed)
    problem = make(seed)
    weighting = method(*problem.losses())  # the cheap loss comes first
    optimizer = BalancedOptimizer(torch.optim.Adam(problem.params, lr=problem.lr), weighting)
    for _ in range(problem.steps if steps is None else steps):
        optimizer.zero_grad()
        optimizer.backward(problem.losses())
        optimizer.step()
    return problem.score()


def report(methods: dict[str, Make], seeds: int, steps: int | None = None) -> str:
    """A table: for each method and problem the mean score and the interval of all seeds."""
    lines = ["| method | " + " | ".join(PROBLEMS) + " |", "| --- |" + " --- |" * len(PROBLEMS)]
    for name, method in methods.items():
        cells = []
        for make in PROBLEMS.values():
            scores = [train(make, method, seed, steps) for seed in range(seeds)]
            mean = sum(scores) / len(scores)
            cells.append(f"{mean:.3f} ({min(scores):.3f} … {max(scores):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="instead of those of each problem")
    parser.add_argument("--references", action="store_true", help="compare references of a floor")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    methods = {**METHODS, **(REFERENCES if given.references else {})}
    print(report(methods, given.seeds, given.steps))


if __name__ == "__main__":
    main()
