"""Three tasks on one small network, with every method of the package.

A trunk reads scikit-learn's handwritten digits; three heads predict which digit it is, whether it
is odd, and the image itself. Their losses differ by three orders of magnitude, so in a plain sum
the reconstruction dominates the other two. Each method gets the same initial weights and batches.

    python -m examples.multitask --method FAMO     # compared with the plain sum
    python -m examples.multitask --method all
"""

from __future__ import annotations

import argparse
import inspect
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moo_balance as mb
from moo_balance.weighting import Weighting

# FixedWeights and the Tchebycheff family take losses as they are, so they need to know what each is
# worth: a black image has a loss of about 4000, a guessed digit 2.3, a guessed parity 0.7.
WORTH = {"digit": 1.0, "parity": 1.0, "reconstruction": 1 / 4000}

# Arguments of the methods that need some here; every other one has its defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "COSMOS": {"preference": WORTH},
    "FixedWeights": {"values": WORTH},
    "Lagrangian": {"targets": {"digit": 0.2, "parity": 0.2}},
    "LearningRateAnnealing": {"reference": "reconstruction"},
    "MovingAverage": {"weighting": mb.MGDA()},
    "OnlineTchebycheff": {"preference": WORTH},
    "PBI": {"preference": WORTH},
    "PCD": {"primary": "digit"},
    "Rescaled": {"weighting": mb.SumLog()},
    "Sequential": {"weightings": [mb.MGDA("l2"), mb.SumLog()], "milestones": [100]},
    "SmoothTchebycheff": {"preference": WORTH},
    "Tchebycheff": {"preference": WORTH},
    "WithConstant": {"weighting": mb.SumLog(), "constants": {"parity": 0.1}},
}


def every_method() -> dict[str, Weighting]:
    """One instance of each method that the package exports, by the name of its class."""
    exported = {name: getattr(mb.weighting, name) for name in mb.weighting.__all__}
    return {
        name: cls(**ARGUMENTS.get(name, {}))
        for name, cls in exported.items()
        if Weighting in getattr(cls, "__mro__", ()) and not inspect.isabstract(cls)
    }


METHODS = {"Sum": mb.Sum(), **every_method(), "MGDA-log": mb.MGDA(normalize="log")}


class Digits(NamedTuple):
    images: Tensor  # [N, 64], grey values 0 … 16
    labels: Tensor  # [N]


class Scores(NamedTuple):
    digit: float  # accuracy in %
    parity: float  # accuracy in %
    reconstruction: float  # root mean square error in grey values


def load(seed: int = 0, held_out: int = 360) -> tuple[Digits, Digits]:
    """The digits, split into training and test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    digits = Digits(torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order])
    return Digits(*(part[held_out:] for part in digits)), Digits(*(p[:held_out] for p in digits))


class ThreeHeads(nn.Module):
    """A trunk that is too narrow for all three tasks, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU())
        self.digit, self.parity, self.reconstruction = (nn.Linear(8, n) for n in (10, 1, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(images / 16)
        return self.digit(features), self.parity(features)[:, 0], self.reconstruction(features)


def losses(model: nn.Module, batch: Digits) -> dict[str, Tensor]:
    """One scalar per task, each in its natural unit."""
    digit, parity, image = model(batch.images)
    odd = (batch.labels % 2).float()
    return {
        "digit": F.cross_entropy(digit, batch.labels),
        "parity": F.binary_cross_entropy_with_logits(parity, odd),
        "reconstruction": (image - batch.images).square().sum(1).mean(),
    }


def train(weighting: Weighting, data: Digits, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ThreeHeads()
    optimizer = mb.BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=5e-3), weighting)
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (64,))
        batch = Digits(data.images[chosen], data.labels[chosen])
        if weighting.uses_independent_batches:
            step_on_halves(optimizer, model, batch)
        else:
            optimizer.step(partial(losses, model, batch))
    return model


def step_on_halves(optimizer: mb.BalancedOptimizer, model: nn.Module, batch: Digits) -> None:
    """A step of a method that multiplies gradients of different batches, here of two halves."""
    halves = [Digits(*half) for half in zip(*(part.chunk(2) for part in batch), strict=True)]
    first, second = (
        {name: loss / 2 for name, loss in losses(model, half).items()} for half in halves
    )
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(first)
    optimizer.backward(second)
    optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> Scores:
    digit, parity, image = model(data.images)
    right = (digit.argmax(1) == data.labels).float().mean()
    right_parity = ((parity > 0) == (data.labels % 2 == 1)).float().mean()
    error = (image - data.images).square().mean().sqrt()
    return Scores(100 * right.item(), 100 * right_parity.item(), error.item())


def report(results: dict[str, list[Scores]], milliseconds: dict[str, float]) -> str:
    """A table of mean ± standard deviation over the seeds, the best mean of a column starred."""
    deviation, mean = torch.std_mean(torch.tensor(list(results.values())), dim=1, correction=0)
    best = (mean * torch.tensor([1.0, 1.0, -1.0])).argmax(0)
    lines = [f"{'method':20}{'digit, %':>16}{'parity, %':>16}{'image, RMSE':>16}{'ms/step':>10}"]
    for row, name in enumerate(results):
        cells = [
            f"{mean[row, task]:8.2f} ± {deviation[row, task]:4.2f}{'*' if star == row else ' '}"
            for task, star in enumerate(best)
        ]
        lines.append(f"{name:20}{''.join(cells)}{milliseconds[name]:10.2f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(arguments)
    if min(args.steps, args.seeds) < 1:
        parser.error("--steps and --seeds should be at least 1")
    torch.set_num_threads(1)  # the network is too small to share

    chosen = list(METHODS) if args.method == "all" else list(dict.fromkeys(["Sum", args.method]))
    training, test = load()
    train(METHODS["Sum"], training, 1, 0)  # the first step of a process is slow
    results: dict[str, list[Scores]] = {}
    milliseconds: dict[str, float] = {}
    with tqdm(total=len(chosen) * args.seeds, unit="run") as progress:
        for name in chosen:
            start = time.perf_counter()
            results[name] = []
            for seed in range(args.seeds):
                model = train(METHODS[name], training, args.steps, seed)
                results[name].append(evaluate(model, test))
                progress.update()
            milliseconds[name] = 1000 * (time.perf_counter() - start) / (args.seeds * args.steps)
    print(report(results, milliseconds))
    print(
        f"\nHeld-out digits, {args.seeds} seeds of {args.steps} steps: mean ± standard deviation, "
        "* the best mean.\nThe tasks compete for the same narrow trunk: compare rows, not cells."
    )


if __name__ == "__main__":
    main()
