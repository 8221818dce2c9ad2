"""The toy problem of GradNorm: ten regressions that differ in the size of their targets.

The targets are sigma_i tanh((B + eps_i) x), so that the tasks share most of their structure (Chen
et al. 2018, arXiv 1711.02257, section 4). The sigmas are those of the paper's figure with ten
tasks. With the weights 1 / sigma_i² all losses have the same scale; they are the ideal ones in the
paper.

The published set-up has 250 inputs, 100 outputs a task, a trunk of four layers with 100 ReLUs, and
elements of B and eps_i of standard deviation 10 and 3.5. Here there are 8 inputs, 10 outputs and
two layers, and the inputs are scaled so that the arguments of tanh have a standard deviation of 1.
Each batch is new.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training

SIGMAS = (48.0, 3.0, 54.0, 16.0, 9.0, 30.0, 52.0, 26.0, 47.0, 81.0)
NAMES = tuple(f"sigma_{sigma:.0f}" for sigma in SIGMAS)
IDEAL_WEIGHTS = {name: sigma**-2 for name, sigma in zip(NAMES, SIGMAS, strict=True)}
INPUTS = 8
OUTPUTS = 10
WIDTH = 100
BATCH = 64
HELD_OUT = 1000


class Examples(NamedTuple):
    x: Tensor
    targets: Tensor  # example, task, output


class Task(NamedTuple):
    matrix: Tensor
    validation: Examples
    test: Examples


def draw_inputs(count: int, generator: torch.Generator | None = None) -> Tensor:
    deviation = 1 / math.sqrt(INPUTS * (10**2 + 3.5**2))
    return deviation * torch.randn(count, INPUTS, generator=generator)


def targets_of(matrix: Tensor, x: Tensor) -> Tensor:
    arguments = (x @ matrix.T).view(-1, len(SIGMAS), OUTPUTS)
    return torch.tensor(SIGMAS)[:, None] * torch.tanh(arguments)


@functools.cache
def task() -> Task:
    """The matrices B + eps_i and the held-out examples, the same for every seed."""
    generator = torch.Generator().manual_seed(0)
    shared = 10 * torch.randn(OUTPUTS, INPUTS, generator=generator)
    own = 3.5 * torch.randn(len(SIGMAS), OUTPUTS, INPUTS, generator=generator)
    matrix = (shared + own).flatten(0, 1)
    validation, test = (draw_inputs(HELD_OUT, generator) for _ in range(2))
    return Task(
        matrix,
        Examples(validation, targets_of(matrix, validation)),
        Examples(test, targets_of(matrix, test)),
    )


def start(seed: int) -> Training:
    matrix, validation, test = task()
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, len(SIGMAS) * OUTPUTS),  # the ten heads, one below the other
        nn.Unflatten(1, (len(SIGMAS), OUTPUTS)),
    )

    def draw() -> Examples:
        x = draw_inputs(BATCH)
        return Examples(x, targets_of(matrix, x))

    def losses(batch: Examples) -> dict[str, Tensor]:
        errors = (model(batch.x) - batch.targets).square().mean(dim=(0, 2))
        return dict(zip(NAMES, errors.unbind(), strict=True))

    @torch.no_grad()
    def normalised_error(examples: Examples) -> float:
        errors = (model(examples.x) - examples.targets).square().mean(dim=(0, 2))
        return float((errors / examples.targets.square().mean(dim=(0, 2))).mean())

    return Training(
        list(model.parameters()),
        draw,
        losses,
        validate=lambda: normalised_error(validation),
        test=lambda: normalised_error(test),
    )


PROBLEM = Problem(
    title="Ten regressions with targets of different size (GradNorm's toy)",
    score="mean over the tasks of the squared error as a fraction of the targets' mean square",
    start=start,
    loss_names=NAMES,
    primary="sigma_81",
    steps=350,
    rates=(1.5e-2, 5e-2, 1.5e-1),
    trivial=0.95,
)
