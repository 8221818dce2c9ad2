"""A run that saves after each step, and a driver that kills it, for ``test_checkpoint``.

    python -m tests.support.resumable_run FOLDER METHOD [METHOD ...]

trains each method in ``FOLDER/METHOD``; its process is killed three times on the way, and each
time the next one resumes from what it finds there. They are forked, because that is much faster
than to start an interpreter for each; the driver has trained nothing itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # An optimizer imports it in its first step; forked runs then need not.

from moo_balance import BalancedOptimizer
from tests.support.problems import SmallModel
from tests.support.registry import METHODS, NAMES

STEPS = 12
PAUSE = 0.01
"""Seconds between steps: as long as a step, so that a kill lands within one as often as not."""


def train(folder: Path, method: str) -> None:
    """Resume from the checkpoint in the folder if there is one, and go on to the end."""
    model = SmallModel()
    weighting = next(row for row in METHODS if row.id == method).make(NAMES)
    optimizer = BalancedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), weighting)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    checkpoint_file, start = folder / "checkpoint.pt", 0
    if checkpoint_file.exists():
        checkpoint = torch.load(checkpoint_file, weights_only=True)
        start = checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    for step in range(start, STEPS):
        optimizer.step(lambda step=step: model.losses(step))
        scheduler.step()
        checkpoint = {
            "step": step + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        torch.save(checkpoint, folder / "checkpoint.part")
        # The old one, or the new: never half of it.
        os.replace(folder / "checkpoint.part", checkpoint_file)
        time.sleep(PAUSE)
    torch.save(model.state_dict(), folder / "final.pt")


def train_until_killed(folder: Path, method: str, last: int, delay: float) -> None:
    """Train in a process of its own, and kill it `delay` seconds after that many steps."""
    process = os.fork()
    if not process:
        train(folder, method)
        os._exit(0)
    while not (folder / "checkpoint.pt").exists() or _saved_steps(folder) < last:
        time.sleep(PAUSE / 10)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)  # no chance to tidy up
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "The run ended before it was killed."


def _saved_steps(folder: Path) -> int:
    steps: int = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    return steps


def main(folder: Path, methods: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chance = random.Random(0)
    for method in methods:
        (folder / method).mkdir()
        for last in (1, 4, 8):
            train_until_killed(folder / method, method, last, chance.uniform(0, 2 * PAUSE))
        train(folder / method, method)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
