"""A plain loop with scheduler, clipping, checkpoints and TensorBoard.

If it is stopped and run again, it resumes after its last complete epoch.

    python -m examples.frameworks.plain_tensorboard
    tensorboard --logdir runs/tensorboard
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from examples.frameworks.tiny import Codec, batches, codec
from moo_balance import BalancedOptimizer, BalancedTrajectory
from moo_balance.integrations.tensorboard import add_metrics


def train(folder: Path, epochs: int = 3, grouped: bool = False) -> Codec:
    """Resume from the checkpoint in `folder`, if there is one, and save one after each epoch."""
    model = codec()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = BalancedOptimizer(adam, BalancedTrajectory())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    saved, first = folder / "checkpoint.pt", 0
    if saved.exists():
        checkpoint = torch.load(saved, weights_only=True)
        first = checkpoint.pop("epoch")
        for name, state in checkpoint.items():
            parts[name].load_state_dict(state)

    with SummaryWriter(folder) as writer:
        for epoch in range(first, epochs):
            for index, signal in enumerate(batches()):
                optimizer.zero_grad()
                optimizer.backward(partial(model, signal))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                add_metrics(writer, optimizer, step=4 * epoch + index, grouped=grouped)
            scheduler.step()
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "epoch": epoch + 1}, saved)
    return model


if __name__ == "__main__":
    target = Path("runs/tensorboard")
    train(target)
    print(f"checkpoint and event files in {target}")
