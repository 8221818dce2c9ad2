"""Five equal tasks without conflict: the ten digits one against the rest, in five groups.

Each task tells two of the digits from all others, by two binary cross-entropies, and all five share
a trunk that is wide enough. Equal weights are about optimal, because the tasks are of equal scale
and use. The score is the share of test digits for which a wrong one of the ten outputs is the
largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._few_digits import (
    draw_training_set,
    error_rate,
    test_set,
    validation_set,
)

NAMES = ("0 and 1", "2 and 3", "4 and 5", "6 and 7", "8 and 9")
IMAGES = 300
HIDDEN = 64
BATCH = 32


def start(seed: int) -> Training:
    images, digits = draw_training_set(IMAGES)
    targets = one_hot(digits, 10).float()
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(IMAGES, (BATCH,))
        return images[rows], targets[rows]

    def losses(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        entropies = binary_cross_entropy_with_logits(model(x), y, reduction="none")
        groups = entropies.view(BATCH, 5, 2).mean((0, 2))
        return dict(zip(NAMES, groups.unbind(), strict=True))

    @torch.no_grad()
    def error(data: tuple[Tensor, Tensor]) -> float:
        return error_rate(model(data[0]), data[1])

    return Training(
        list(model.parameters()),
        draw,
        losses,
        validate=lambda: error(validation_set()),
        test=lambda: error(test_set()),
    )


PROBLEM = Problem(
    title="Five equal tasks without conflict (digits, one against the rest)",
    score="error rate of the ten outputs together",
    start=start,
    loss_names=NAMES,
    primary=NAMES[0],
    steps=300,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=0.5,
    expected_to_lose=True,
)
