"""Distillation of a digit classifier: three losses, bfloat16, gradient accumulation, and an EMA.

The student sees 100 images. Its losses are the cross-entropy with the labels, the divergence from
the teacher's softened probabilities (times the squared temperature), and the distance of its
features from the teacher's. The plain sum and the best of several static weights are compared with
methods by the error of the averaged weights on held-out digits. On a GPU the forward pass runs in
float16 with a GradScaler, on a CPU in bfloat16.

    python -m examples.recipes.distillation --figure distillation.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.recipes import common
from moo_balance import (
    BalancedOptimizer,
    FixedWeights,
    GradientNorms,
    History,
    NashMTL,
    Sum,
    SumLog,
    diagnose,
)
from moo_balance.weighting import Weighting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16
NAMES = ("labels", "teacher", "features")
IMAGES, MICRO_BATCH, MICRO_BATCHES, TEMPERATURE, TRIALS = 100, 16, 2, 4.0, 8


class Digits(NamedTuple):
    images: Tensor  # [N, 64], grey values 0 … 16
    labels: Tensor  # [N]


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images / 16)
        return self.head(features), features


class Student(Classifier):
    """A narrow classifier, and a map of its features to the teacher's."""

    def __init__(self) -> None:
        super().__init__(16)
        self.regressor = nn.Linear(16, 128)


@cache
def make_data() -> tuple[Digits, Digits, Digits, Digits]:
    """The digits for the teacher, those for the student, and those to validate and to test."""
    whole, *held_out = common.split_digits(1077, 360, 360)
    few = [part[:IMAGES] for part in whole]
    return tuple(Digits(*(x.to(DEVICE) for x in part)) for part in (whole, few, *held_out))


@cache
def make_teacher() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, data = Classifier(128).to(DEVICE), make_data()[0]
        optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
        for _ in range(200):
            optimizer.zero_grad()
            cross_entropy(teacher(data.images)[0], data.labels).backward()
            optimizer.step()
    return teacher.requires_grad_(False)


def compute_losses(student: Student, batch: Digits) -> dict[str, Tensor]:
    """The forward pass in low precision, the losses in float32."""
    teacher = make_teacher()
    with torch.autocast(DEVICE, DTYPE):
        target, target_features = teacher(batch.images)
        logits, features = student(batch.images)
        features = student.regressor(features)
    logs = (logits.float() / TEMPERATURE).log_softmax(1)
    softened = (target.float() / TEMPERATURE).softmax(1)
    return {
        "labels": cross_entropy(logits.float(), batch.labels),
        "teacher": TEMPERATURE**2 * kl_div(logs, softened, reduction="batchmean"),
        "features": (features - target_features).float().square().sum(1).mean() / 2,
    }


class Run(NamedTuple):
    student: Student
    average: AveragedModel
    optimizer: BalancedOptimizer
    scaler: torch.amp.GradScaler
    history: History


def start(weighting: Weighting, seed: int) -> Run:
    torch.manual_seed(seed)
    student = Student().to(DEVICE)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    adam = torch.optim.AdamW(student.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, enabled=DEVICE == "cuda")
    return Run(student, average, BalancedOptimizer(adam, weighting), scaler, History())


def step(run: Run, batch: Digits) -> None:
    """One step on all micro-batches, whose losses and gradients are balanced as of one batch."""
    parts = zip(*(x.chunk(MICRO_BATCHES) for x in batch), strict=True)
    run.optimizer.zero_grad()
    for i, part in enumerate(parts, start=1):
        losses = compute_losses(run.student, Digits(*part))
        losses = {name: loss / MICRO_BATCHES for name, loss in losses.items()}
        run.optimizer.backward(losses, grad_scaler=run.scaler, last=i == MICRO_BATCHES)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.average.update_parameters(run.student)


def train(weighting: Weighting, seed: int, steps: int) -> Run:
    run, data = start(weighting, seed), make_data()[1]
    for _ in range(steps):
        chosen = torch.randint(IMAGES, (MICRO_BATCH * MICRO_BATCHES,))
        step(run, Digits(data.images[chosen], data.labels[chosen]))
        run.history.append(run.optimizer.metrics)
    return run


@torch.no_grad()
def error(model: nn.Module, data: Digits) -> float:
    """Wrongly classified images in per cent."""
    return 100 * float((model(data.images)[0].argmax(1) != data.labels).float().mean())


def search(seed: int, steps: int) -> FixedWeights:
    """The best of random static weights, by the validation error of one run each."""

    def score(trial: FixedWeights) -> float:
        return error(train(trial, seed + 100, steps).average, make_data()[2])

    return common.search_weights(NAMES, TRIALS, seed, score)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 20 if args.quick else 400
    best = search(args.seed, steps)
    methods = {
        "labels only": FixedWeights({**dict.fromkeys(NAMES, 0.0), "labels": 1.0}),
        "Sum": Sum(),
        f"static, best of {TRIALS}": best,
        "SumLog": SumLog(),
        "GradientNorms(every=10)": GradientNorms(every=10),
        "NashMTL": NashMTL(),
    }
    runs = {name: [train(m, seed, steps) for seed in args.seeds] for name, m in methods.items()}
    test = make_data()[3]
    errors = {
        name: [(error(run.student, test), error(run.average, test)) for run in each]
        for name, each in runs.items()
    }
    common.print_scores(["method", "last weights, % wrong", "averaged, % wrong"], errors)
    print(f"The teacher: {error(make_teacher(), test):.3g} % wrong.")

    run, data = runs["Sum"][0], make_data()[1]
    chosen = [torch.randint(IMAGES, (MICRO_BATCH * MICRO_BATCHES,)) for _ in range(16)]
    batches = [Digits(data.images[index], data.labels[index]) for index in chosen]
    scaler = run.scaler if run.scaler.is_enabled() else None
    loss_function = partial(compute_losses, run.student)
    print(f"\n{diagnose(loss_function, run.student, batches, grad_scaler=scaler)}")
    contestants = {name: partial(step, start(m, 0), batches[0]) for name, m in methods.items()}
    common.print_step_times(contestants, 5 if args.quick else 300)
    if args.figure:
        figure, ((left, middle, right),) = common.make_axes(1, 3)
        common.draw_history(runs["NashMTL"][0].history, left, middle, "NashMTL")
        common.draw_scores(
            right, {name: [row[1:] for row in rows] for name, rows in errors.items()}
        )
        right.set(xlabel="held-out error, %")
        common.save_figure(figure, args.figure)


if __name__ == "__main__":
    main()
