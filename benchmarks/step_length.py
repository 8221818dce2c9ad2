"""What the length of a step does to training, where losses differ in scale.

    python -m benchmarks.step_length

Three regressions share a small network; their losses are multiplied by the scales. The learning
rate is the best of a grid for the plain sum at the same scales, as one that was tuned before
balancing; clipping is to a tenth of the norm that the plain sum's gradient has at the start.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from moo_balance import (
    FAMO,
    MGDA,
    BalancedOptimizer,
    NonFiniteError,
    Rescaled,
    Sum,
    SumLog,
    Weighting,
)

SCALES = [(1.0, 1.0, 1.0), (1.0, 30.0, 1000.0), (1e-9, 1.0, 1e9)]
LENGTHS = ("as published", "one", "count", "mean", "sum")
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS: dict[str, Callable[[], Weighting]] = {
    "SumLog": lambda: SumLog(floor=0),
    "FAMO": lambda: FAMO(lagged=True),
    "MGDA": MGDA,
    "MGDA l2": lambda: MGDA("l2"),
}

Losses = dict[str, Tensor]


class Problem:
    """Three regressions on shared inputs, from a seed."""

    def __init__(self, seed: int, scales: Sequence[float]) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        self.inputs = torch.randn(128, 6)
        teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        with torch.no_grad():
            self.targets = 2 * teacher(self.inputs)
        self.scales = scales

    def losses(self) -> Losses:
        errors = (self.model(self.inputs) - self.targets).square().mean(0)
        scaled = zip("abc", errors, self.scales, strict=True)
        return {name: scale * error for name, error, scale in scaled}

    def score(self) -> float:
        """Geometric mean of the three errors, free of the scales."""
        with torch.no_grad():
            values = [float(loss) for loss in self.losses().values()]
        ratios = [value / scale for value, scale in zip(values, self.scales, strict=True)]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))


def optimizer_of(name: str, params: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    return {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name.split()[0]](params, lr=rate)


def train(problem: Problem, weighting: Weighting, name: str, rate: float, steps: int) -> float:
    """The score after training, relative to the one before; infinite if it diverged."""
    params = list(problem.model.parameters())
    optimizer = BalancedOptimizer(optimizer_of(name, params, rate), weighting)
    before, limit = problem.score(), math.inf
    if name.endswith("clipped"):
        limit = 0.1 * norm_of_sum(problem)
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward(problem.losses())
            nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()
    except NonFiniteError:
        return math.inf
    after = problem.score() / before
    return after if math.isfinite(after) else math.inf


def norm_of_sum(problem: Problem) -> float:
    """The length of the plain sum's gradient."""
    loss = torch.stack([*problem.losses().values()]).sum()
    grads = torch.autograd.grad(loss, list(problem.model.parameters()))
    return float(torch.cat([grad.double().flatten() for grad in grads]).norm())


def tune(name: str, scales: Sequence[float], seeds: Sequence[int], steps: int) -> float:
    """The learning rate at which the plain sum leaves the least sum of the losses."""
    largest = max(scales) if name.startswith("SGD") else 1.0

    def left(rate: float) -> float:
        problems = (Problem(seed, scales) for seed in seeds)
        runs = [(train(p, Sum(), name, rate, steps), p.losses()) for p in problems]
        sums = [float(torch.stack([*losses.values()]).sum().detach()) for _, losses in runs]
        return median(value if math.isfinite(value) else math.inf for value in sums)

    return min((rate / largest for rate in GRID), key=left)


def ratio(weighting: Weighting, scales: Sequence[float], seeds: Sequence[int]) -> float:
    """Length of the first direction relative to the plain sum's gradient."""
    lengths = []
    for seed in seeds:
        norms = []
        for method in (weighting, Sum()):
            problem = Problem(seed, scales)
            params = list(problem.model.parameters())
            optimizer = BalancedOptimizer(torch.optim.SGD(params), method)
            optimizer.backward(problem.losses())
            norms.append(float(torch.cat([p.grad.double().flatten() for p in params]).norm()))
        lengths.append(norms[0] / norms[1])
    return median(lengths)


def row(cells: Sequence[object]) -> str:
    texts = [f"{cell:.2g}" if isinstance(cell, float) else str(cell) for cell in cells]
    return f"| {' | '.join(texts)} |"


def report(seeds: Sequence[int], steps: int) -> str:
    """Both tables as text."""
    headings = [":".join(f"{scale:g}" for scale in scales) for scales in SCALES]
    lines = [row(["first direction / plain sum's", *headings]), row(["---"] * 4)]
    for name, make in METHODS.items():
        lines.append(row([name, *(ratio(make(), scales, seeds) for scales in SCALES)]))
    lines += ["", row(["error left", "length", *headings]), row(["---"] * 5)]
    for name in ("SGD", "SGD clipped", "Adam"):
        rates = [tune(name, scales, seeds, steps) for scales in SCALES]
        for label, length, weighting in _runs():
            cells = [
                median(train(Problem(s, scales), weighting, name, rate, steps) for s in seeds)
                for scales, rate in zip(SCALES, rates, strict=True)
            ]
            lines.append(row([f"{name}, {label}", length, *cells]))
    return "\n".join(lines)


def _runs() -> list[tuple[str, str, Weighting]]:
    runs: list[tuple[str, str, Weighting]] = [("Sum", "", Sum())]
    for length in LENGTHS:
        published = METHODS["SumLog"]()
        weighting = published if length == "as published" else Rescaled(published, length)
        runs.append(("SumLog", length, weighting))
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    print(report(range(arguments.seeds), arguments.steps))
