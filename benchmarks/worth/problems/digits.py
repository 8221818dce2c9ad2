"""Four tasks on scikit-learn's 8 × 8 digits, on a narrow shared trunk.

The network sees a digit rotated by 0, 90, 180 or 270 degrees. It tells the digit, its parity and
the rotation (the task of arXiv 1803.07728), all by cross-entropy, and reconstructs the image it
sees. The reconstruction loss is the sum of squared errors of an image, in grey values from 0 to 16.

The score is the mean change of the four metrics against networks trained for one task each, in per
cent (the Delta m of arXiv 1904.08918; here an increase is a loss). The metrics are three error
rates and the root mean square error of a grey value. Their references are the means of five seeds
on the test digits, at the middle learning rate. They are measured again by
`python -c "from benchmarks.worth.problems import digits; print(digits.measure_single_tasks())"`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._digits import split_digits

NAMES = ("digit", "parity", "reconstruction", "rotation")
SINGLE_TASK = {"digit": 0.194, "parity": 0.0698, "reconstruction": 3.753, "rotation": 0.0694}
HIDDEN = 64
NARROW = 8
BATCH = 64


class Digits(NamedTuple):
    images: Tensor  # 64 grey values each
    digit: Tensor
    parity: Tensor
    rotation: Tensor  # quarter turns

    def take(self, index: Tensor) -> Digits:
        return Digits(*(part[index] for part in self))


def in_all_rotations(images: Tensor, digit: Tensor) -> Digits:
    turned = torch.cat([torch.rot90(images, turns, dims=(1, 2)).flatten(1) for turns in range(4)])
    digit = digit.repeat(4)
    rotation = torch.arange(4).repeat_interleave(len(images))
    return Digits(turned, digit, (digit % 2).float(), rotation)


@functools.cache
def splits() -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits, the same for every seed."""
    training, validation, test = (in_all_rotations(*part) for part in split_digits())
    return training, validation, test


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NARROW), nn.ReLU()
        )
        self.digit = nn.Linear(NARROW, 10)
        self.parity = nn.Linear(NARROW, 1)
        self.reconstruction = nn.Sequential(
            nn.Linear(NARROW, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64)
        )
        self.rotation = nn.Linear(NARROW, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared = self.trunk(images / 16)
        parity = self.parity(shared).squeeze(1)
        return self.digit(shared), parity, self.reconstruction(shared), self.rotation(shared)


@torch.no_grad()
def metrics(model: Network, data: Digits) -> dict[str, float]:
    digit, parity, reconstruction, rotation = model(data.images)
    return {
        "digit": float((digit.argmax(dim=1) != data.digit).float().mean()),
        "parity": float(((parity > 0) != (data.parity > 0)).float().mean()),
        "reconstruction": float((reconstruction - data.images).square().mean().sqrt()),
        "rotation": float((rotation.argmax(dim=1) != data.rotation).float().mean()),
    }


def change(model: Network, data: Digits) -> float:
    """The mean change of the metrics against single-task training, in per cent."""
    measured = metrics(model, data)
    return 100 * sum(measured[name] / SINGLE_TASK[name] - 1 for name in NAMES) / len(NAMES)


def train_on(model: Network) -> Training:
    training, validation, test = splits()

    def losses(batch: Digits) -> dict[str, Tensor]:
        digit, parity, reconstruction, rotation = model(batch.images)
        return {
            "digit": cross_entropy(digit, batch.digit),
            "parity": binary_cross_entropy_with_logits(parity, batch.parity),
            "reconstruction": (reconstruction - batch.images).square().sum(dim=1).mean(),
            "rotation": cross_entropy(rotation, batch.rotation),
        }

    return Training(
        list(model.parameters()),
        draw=lambda: training.take(torch.randint(len(training.digit), (BATCH,))),
        losses=losses,
        validate=lambda: change(model, validation),
        test=lambda: change(model, test),
    )


def start(seed: int) -> Training:
    return train_on(Network())


PROBLEM = Problem(
    title="Four tasks on rotated digits",
    score="mean change of the four test metrics against single-task training, in per cent",
    start=start,
    loss_names=NAMES,
    primary="digit",
    steps=350,
    rates=(6e-3, 2e-2, 6e-2),
    trivial=500.0,
)


def measure_single_tasks(seeds: int = 5) -> dict[str, float]:
    """The test metric of each task trained alone, the mean over the seeds."""
    _, _, test = splits()
    means = {}
    for name in NAMES:
        total = 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = Network()
            training = train_on(model)
            optimizer = torch.optim.Adam(training.params, lr=PROBLEM.rates[1])
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBLEM.steps)
            for _ in range(PROBLEM.steps):
                optimizer.zero_grad()
                training.losses(training.draw())[name].backward()
                optimizer.step()
                schedule.step()
            total += metrics(model, test)[name]
        means[name] = total / seeds
    return means
