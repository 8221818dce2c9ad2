"""What a balanced step costs on the demo's codec, beside a bare loop: ``python -m benchmarks``.

Each method trains its own copy of the codec. The copies take turns, a step at a time and in
another order each round, so that a busy machine slows all of them alike; a ratio compares a method
with the bare loop of the same round, and the table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
from torch import Tensor, nn

from examples.lic.codec import MeanScaleHyperprior
from examples.lic.training import rate_distortion
from moo_balance import FAMO, AnalyticQP, BalancedOptimizer, Sum
from moo_balance.weighting import Weighting

METHODS: dict[str, Weighting] = {"Sum": Sum(), "FAMO": FAMO(), "AnalyticQP": AnalyticQP()}
TARGETS = {"Sum": 1.02, "AnalyticQP": 1.30}
BARE = "bare loop"
LIMIT = "limit"

Step = Callable[[], None]


def bare_step(model: nn.Module, images: Tensor, lmbda: float) -> Step:
    """One step of the loop that everybody writes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        sum(rate_distortion(model, images, lmbda).values()).backward()
        optimizer.step()

    return step


def limit_step(model: nn.Module, images: Tensor, lmbda: float) -> Step:
    """What exact per-loss gradients cost at least: one differentiation per loss, and their sum."""
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4)

    def step() -> None:
        rate, distortion = rate_distortion(model, images, lmbda).values()
        rows = (
            torch.autograd.grad(rate, params, retain_graph=True, allow_unused=True),
            torch.autograd.grad(distortion, params, allow_unused=True),
        )
        for param, *parts in zip(params, *rows, strict=True):
            reached = [part for part in parts if part is not None]
            param.grad = sum(reached[1:], reached[0]) if reached else None
        optimizer.step()

    return step


def balanced_step(model: nn.Module, images: Tensor, lmbda: float, weighting: Weighting) -> Step:
    """The same through the wrapper."""
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-4), weighting)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(lambda: rate_distortion(model, images, lmbda))
        optimizer.step()

    return step


def measure(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each method in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + 1):
        names = list(steps)
        shuffle(names)
        for name in names:
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            if turn > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def report(seconds: dict[str, list[float]]) -> str:
    """A table of medians, with the targets where there is one."""
    lines = [f"{'':12} {'ms/step':>8} {'x bare':>8}   target"]
    for name, values in seconds.items():
        ratio = median(own / bare for own, bare in zip(values, seconds[BARE], strict=True))
        line = f"{name:12} {1000 * median(values):8.2f} {ratio:8.3f}"
        if name in TARGETS:
            verdict = "met" if ratio <= TARGETS[name] else "MISSED"
            line += f"   <= {TARGETS[name]:.2f} {verdict}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1, help="steps of a method in each round")
    parser.add_argument("--threads", type=int, default=1, help="as in the demo")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)  # the crops of the demo
    codec = MeanScaleHyperprior()
    steps = {
        BARE: bare_step(deepcopy(codec), images, 0.0067),
        LIMIT: limit_step(deepcopy(codec), images, 0.0067),
    }
    for name, weighting in METHODS.items():
        steps[name] = balanced_step(deepcopy(codec), images, 0.0067, weighting)

    count = sum(parameter.numel() for parameter in codec.parameters())
    print(
        f"Mean-scale hyperprior, {count:,} parameters, batch {tuple(images.shape)}; forward pass "
        f"and Adam included.\ntorch {torch.__version__}, {args.threads} threads; medians of "
        f"{args.rounds} interleaved rounds of {args.repeats} steps.\n"
    )
    print(report(measure(steps, args.rounds, args.repeats)))
    print(f"\n{LIMIT}: the bare loop with one pruned autograd.grad per loss, and nothing else.")


if __name__ == "__main__":
    main()
