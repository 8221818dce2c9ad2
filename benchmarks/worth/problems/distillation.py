"""Distillation of a digit classifier into a narrow student, with few images.

The student minimises the cross-entropy with the labels, the divergence from the teacher's softened
probabilities (Hinton et al. 2015, arXiv 1503.02531; temperature 4, multiplied by its square), and
half the squared distance between the teacher's features and a linear map of its own (the hints of
FitNets, arXiv 1412.6550). The teacher has been trained on 800 digits; the student sees 100 of them.
FitNets takes the hints first and the other losses afterwards; here all are taken at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.worth.problem import Problem, Training
from benchmarks.worth.problems._digits import LabelledImages, split_digits, train_classifier

NAMES = ("labels", "teacher", "hints")
TEMPERATURE = 4.0
IMAGES = 100
TEACHER_WIDTH = 128
STUDENT_WIDTH = 16
BATCH = 32


@functools.cache
def teacher() -> nn.Sequential:
    """A trained classifier; global random numbers are left as they are."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, TEACHER_WIDTH),
            nn.ReLU(),
            nn.Linear(TEACHER_WIDTH, TEACHER_WIDTH),
            nn.ReLU(),
            nn.Linear(TEACHER_WIDTH, 10),
        )
        return train_classifier(model)


def start(seed: int) -> Training:
    training, validation, test = split_digits()
    images = training.images[:IMAGES].flatten(1) / 16
    digit = training.digit[:IMAGES]
    teacher_features = teacher()[:-1](images)
    softened = (teacher()[-1](teacher_features) / TEMPERATURE).softmax(dim=1)
    trunk = nn.Sequential(
        nn.Linear(64, STUDENT_WIDTH),
        nn.ReLU(),
        nn.Linear(STUDENT_WIDTH, STUDENT_WIDTH),
        nn.ReLU(),
    )
    head = nn.Linear(STUDENT_WIDTH, 10)
    regressor = nn.Linear(STUDENT_WIDTH, TEACHER_WIDTH)

    def losses(index: Tensor) -> dict[str, Tensor]:
        features = trunk(images[index])
        logits = head(features)
        log_probabilities = (logits / TEMPERATURE).log_softmax(dim=1)
        divergence = kl_div(log_probabilities, softened[index], reduction="batchmean")
        distances = (regressor(features) - teacher_features[index]).square().sum(dim=1)
        return {
            "labels": cross_entropy(logits, digit[index]),
            "teacher": TEMPERATURE**2 * divergence,
            "hints": distances.mean() / 2,
        }

    @torch.no_grad()
    def error(data: LabelledImages) -> float:
        predicted = head(trunk(data.images.flatten(1) / 16)).argmax(dim=1)
        return 100 * float((predicted != data.digit).float().mean())

    return Training(
        [*trunk.parameters(), *head.parameters(), *regressor.parameters()],
        draw=lambda: torch.randint(IMAGES, (BATCH,)),
        losses=losses,
        validate=lambda: error(validation),
        test=lambda: error(test),
    )


PROBLEM = Problem(
    title="Distillation of a digit classifier, with few images",
    score="test error in per cent",
    start=start,
    loss_names=NAMES,
    primary="labels",
    steps=400,
    rates=(1e-2, 3e-2, 1e-1),
    trivial=85.0,
)
