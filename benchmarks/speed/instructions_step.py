"""The process that `instructions` runs under valgrind: some steps of one method on a small model.

It uses only what all versions of `moo_balance` have in common, and is run as a file, so that it
imports the package from ``PYTHONPATH``.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import torch
from torch import nn

from moo_balance import FAMO, MGDA, BalancedOptimizer, Sum

WEIGHTINGS = {
    "Sum": Sum,
    "FAMO lagged": lambda: FAMO(lagged=True),
    "MGDA": MGDA,
}


def make_step(method: str) -> Callable[[], None]:
    """Return a function that takes one step on two losses; its plain step takes about 5 ms."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 384), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(384, 8) for _ in range(2))
    inputs, targets = torch.randn(128, 384), torch.randn(2, 128, 8)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [*trunk.parameters(), *heads.parameters()], lr=1e-6
    )

    def losses() -> dict[str, torch.Tensor]:
        features = trunk(inputs)
        pairs = zip(heads, targets, strict=True)
        return {
            f"loss {k}": nn.functional.mse_loss(head(features), target)
            for k, (head, target) in enumerate(pairs)
        }

    def plain() -> None:
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()

    if method not in WEIGHTINGS:
        return plain
    balanced = BalancedOptimizer(optimizer, WEIGHTINGS[method]())

    def step() -> None:
        balanced.zero_grad()
        balanced.backward(losses())
        balanced.step()

    return step


def main(method: str, warm_up: str, steps: str, library: str) -> None:
    torch.set_num_threads(1)
    toggle = ctypes.CDLL(library)
    step = make_step(method)
    for _ in range(int(warm_up)):
        step()
    gc.collect()
    gc.disable()  # a collection would visit all objects that were imported
    toggle.start()
    for _ in range(int(steps)):
        step()
    toggle.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
