"""Accelerate: gradient accumulation, clipping, checkpoints.

For mixed precision only one line changes: ``Accelerator(mixed_precision="bf16")``.

    python -m examples.frameworks.accelerate_loop
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from examples.frameworks.tiny import batches, codec
from moo_balance import FAMO, BalancedOptimizer
from moo_balance.integrations import unwrap_optimizer
from moo_balance.integrations.accelerate import backward
from moo_balance.weighting import Weighting


def train(
    accelerator: Accelerator,
    weighting: Weighting,
    epochs: int = 3,
    resume_from: Path | None = None,
) -> tuple[Any, Any]:
    model = codec()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), weighting)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    if resume_from is not None:
        accelerator.load_state(str(resume_from))

    for epoch in range(epochs):
        for signal in loader:
            with accelerator.accumulate(model):
                # `lambda: model(signal)` would read `signal` later: in the last micro-batch.
                backward(accelerator, optimizer, partial(model, signal))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.log(unwrap_optimizer(optimizer).log_dict(), step=epoch)
    return model, optimizer


if __name__ == "__main__":
    _, trained = train(Accelerator(gradient_accumulation_steps=2), FAMO())
    print({key: round(value, 3) for key, value in unwrap_optimizer(trained).log_dict().items()})
