"""Three tasks on digits, two of which have labels for few images: losses that are often absent.

Every image is reconstructed from a noisy copy. The digit is known for 6 % of the images, and the
number of holes in it (0, 1 or 2) for 3 % of others, so that in a batch of 32 a loss is absent with
probabilities of about 0.14 and 0.38. A loss without labels is left out of the dict. The plain sum
and the best of several static weights are compared with methods, on held-out digits.

    python -m examples.recipes.multitask_missing --figure missing.svg
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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

TASKS = ("image", "digit", "holes")
HOLES = torch.tensor([1, 0, 0, 0, 1, 0, 1, 0, 2, 1])  # of the digits 0 … 9
BATCH, TRIALS = 32, 8


class Batch(NamedTuple):
    """Images in grey values 0 … 16 [N, 64], labels [N], and where a task has a label [N]."""

    images: Tensor
    digit: Tensor
    holes: Tensor
    has_digit: Tensor
    has_holes: Tensor

    def choose(self, index: Tensor | slice) -> Batch:
        return Batch(*(part[index] for part in self))

    def draw(self) -> Batch:
        return self.choose(torch.randint(len(self.images), (BATCH,)))


def make_data(seed: int) -> tuple[Batch, Batch, Batch]:
    """Training data, of which some images have labels, then validation and test data."""
    (images, labels), *held_out = common.split_digits(1077, 360, 360)
    draw = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    everywhere = torch.ones(360, dtype=torch.bool)
    return (
        Batch(images, labels, HOLES[labels], draw < 0.06, draw > 0.97),
        *(Batch(x, y, HOLES[y], everywhere, everywhere) for x, y in held_out),
    )


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 24), nn.ReLU())
        self.image, self.digit, self.holes = (nn.Linear(24, n) for n in (64, 10, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(images / 16)
        return self.image(features), self.digit(features), self.holes(features)


def compute_losses(network: Network, batch: Batch) -> dict[str, Tensor]:
    """The mean over the samples that have a label; a task without any is left out."""
    noisy = batch.images + 4 * torch.randn_like(batch.images)
    image, digit, holes = network(noisy)
    losses = {"image": (image - batch.images).square().sum(1).mean()}
    if batch.has_digit.any():
        losses["digit"] = cross_entropy(digit[batch.has_digit], batch.digit[batch.has_digit])
    if batch.has_holes.any():
        losses["holes"] = cross_entropy(holes[batch.has_holes], batch.holes[batch.has_holes])
    return losses


class Run(NamedTuple):
    network: Network
    optimizer: BalancedOptimizer
    history: History


def start(weighting: Weighting, seed: int) -> Run:
    torch.manual_seed(seed)
    network = Network()
    adam = torch.optim.Adam(network.parameters(), lr=3e-3)
    return Run(network, BalancedOptimizer(adam, weighting, loss_names=TASKS), History())


def step(run: Run, batch: Batch) -> None:
    run.optimizer.zero_grad()
    run.optimizer.backward(compute_losses(run.network, batch))
    run.optimizer.step()


def train(weighting: Weighting, seed: int, steps: int) -> Run:
    run, data = start(weighting, seed), make_data(seed)[0]
    for _ in range(steps):
        step(run, data.draw())
        run.history.append(run.optimizer.metrics)
    return run


@torch.no_grad()
def score(network: Network, batch: Batch) -> tuple[float, float, float]:
    """Errors: of the image as RMSE in grey values, of the two others in per cent."""
    torch.manual_seed(0)  # the same noise for all
    image, digit, holes = network(batch.images + 4 * torch.randn_like(batch.images))
    wrong = [100 * (out.argmax(1) != y).float().mean().item()
             for out, y in ((digit, batch.digit), (holes, batch.holes))]  # fmt: skip
    return (image - batch.images).square().mean().sqrt().item(), *wrong


def mean_log_error(network: Network, batch: Batch) -> float:
    """One number for the search of weights: the mean of the logarithms of the three errors."""
    return sum(math.log(error + 1e-6) for error in score(network, batch)) / 3


def search(seed: int, steps: int) -> FixedWeights:
    """The best of random static weights, by the validation score of one run each."""

    def score(trial: FixedWeights) -> float:
        network = train(trial, seed + 100, steps).network
        return mean_log_error(network, make_data(seed + 100)[1])

    return common.search_weights(TASKS, TRIALS, seed, score)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 60 if args.quick else 800
    best = search(args.seed, steps)
    methods = {
        "Sum": Sum(),
        f"static, best of {TRIALS}": best,
        "SumLog": SumLog(),
        "GradientNorms(every=10)": GradientNorms(every=10),
        "NashMTL": NashMTL(),
    }
    runs = {name: [train(m, seed, steps) for seed in args.seeds] for name, m in methods.items()}
    test = make_data(0)[2]
    errors = {name: [score(run.network, test) for run in each] for name, each in runs.items()}
    common.print_scores(["method", "image, RMSE", "digit, % wrong", "holes, % wrong"], errors)

    run, data = runs["Sum"][0], make_data(args.seed)[0]
    labelled = [data.choose(part.nonzero()[:, 0]) for part in (data.has_digit, data.has_holes)]
    # `diagnose` needs every loss in every batch: 8 images with each label.
    batches = [
        Batch(*(torch.cat(pair) for pair in zip(
            *(part.choose(torch.randint(len(part.images), (8,))) for part in labelled), strict=True
        )))
        for _ in range(16)
    ]  # fmt: skip
    print(f"\n{diagnose(partial(compute_losses, run.network), run.network, batches)}")

    def take_turn(run: Run) -> None:
        step(run, data.draw())

    contestants = {name: partial(take_turn, start(m, 0)) for name, m in methods.items()}
    common.print_step_times(contestants, 5 if args.quick else 300)
    if args.figure:
        draw(runs, args.figure)


def draw(runs: dict[str, list[Run]], path) -> None:
    figure, (axes,) = common.make_axes(1, 3)
    names = "Sum", "GradientNorms(every=10)", "NashMTL"
    for name, colour in zip(names, common.COLOURS, strict=False):
        history = runs[name][0].history
        for ax, task in zip(axes, TASKS, strict=False):
            steps, values = history.series(f"loss/{task}")
            chunks = [values[i : i + 20] for i in range(0, len(values), 20)]
            ax.plot(steps[::20], [sum(c) / len(c) for c in chunks], color=colour, label=name)
            ax.set(title=f"loss of {task}", xlabel="step", yscale="log")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


if __name__ == "__main__":
    main()
