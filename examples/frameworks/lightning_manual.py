"""Lightning, manual optimisation: the training step calls `backward` and `step`.

It works with every method, also with those that observe the step.

    python -m examples.frameworks.lightning_manual
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from examples.frameworks.tiny import batches, codec
from moo_balance import FAMO, BalancedOptimizer
from moo_balance.integrations.lightning import LogBalance, backward
from moo_balance.weighting import Weighting


class Manual(LightningModule):
    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec = codec()
        self.weighting = weighting

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.codec.parameters(), lr=1e-2)
        optimizer = BalancedOptimizer(adam, self.weighting)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]

    def training_step(self, signal: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        backward(self, partial(self.codec, signal))  # replaces self.manual_backward
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


if __name__ == "__main__":
    trainer = Trainer(
        max_epochs=3,
        logger=CSVLogger("runs/lightning"),
        log_every_n_steps=4,
        callbacks=[LogBalance()],
        enable_checkpointing=False,
    )
    trainer.fit(Manual(FAMO()), batches())
    print({key: round(value, 3) for key, value in trainer.optimizers[0].log_dict().items()})
