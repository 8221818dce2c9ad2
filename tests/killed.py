"""A run that saves after each step, for ``test_kill_resume`` to kill wherever it likes.

    python -m tests.killed FOLDER METHOD

It resumes from what it finds in FOLDER, says so after each step, and ends with its parameters.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from moo_balance import BalancedOptimizer
from tests.problems import Toy
from tests.support.registry import METHODS, NAMES

STEPS = 12
PAUSE = 0.01
"""Seconds between steps: as long as a step, so that a kill lands within one as often as not."""


def main(folder: Path, method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Toy()
    weighting = next(row for row in METHODS if row.id == method).make(NAMES)
    optimizer = BalancedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), weighting)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    saved, start = folder / "checkpoint.pt", 0
    if saved.exists():
        checkpoint = torch.load(saved, weights_only=True)
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
        os.replace(folder / "checkpoint.part", saved)  # the old one, or the new: never half of it
        print(step + 1, flush=True)
        time.sleep(PAUSE)
    torch.save(model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
