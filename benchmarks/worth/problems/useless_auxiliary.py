"""Digits, next to an auxiliary task that cannot be learned: random labels.

Each training digit has a second label, drawn at random from ten as by Zhang et al. (arXiv
1611.03530). A second head on a narrow shared trunk is trained on it, which teaches nothing and
takes capacity. The score is the error rate of the first head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._few_digits import (
    draw_training_set,
    error_rate,
    test_set,
    validation_set,
)

IMAGES = 300
HIDDEN = 16
BATCH = 32


def start(seed: int) -> Training:
    images, digits = draw_training_set(IMAGES)
    labels = torch.stack([digits, torch.randint(10, (IMAGES,))], dim=1)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 20))

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(IMAGES, (BATCH,))
        return images[rows], labels[rows]

    def losses(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        digit, noise = model(batch[0]).split(10, dim=1)
        return {
            "digit": cross_entropy(digit, batch[1][:, 0]),
            "noise": cross_entropy(noise, batch[1][:, 1]),
        }

    @torch.no_grad()
    def error(data: tuple[Tensor, Tensor]) -> float:
        return error_rate(model(data[0])[:, :10], data[1])

    return Training(
        list(model.parameters()),
        draw,
        losses,
        validate=lambda: error(validation_set()),
        test=lambda: error(test_set()),
    )


PROBLEM = Problem(
    title="Digits next to random labels",
    score="error rate on the digits",
    start=start,
    loss_names=("digit", "noise"),
    primary="digit",
    steps=300,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.85,
    expected_to_lose=True,
)
