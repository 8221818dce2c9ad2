"""Lightning, automatic optimisation: the training step returns one combined loss.

A method that observes the step needs ``lagged=True`` here.

    python -m examples.frameworks.lightning_automatic
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from examples.frameworks.tiny import batches, codec
from moo_balance import AnalyticQP, BalancedOptimizer
from moo_balance.integrations.lightning import LogBalance, combined_loss
from moo_balance.weighting import Weighting


class Automatic(LightningModule):
    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.codec = codec()
        self.weighting = weighting

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.codec.parameters(), lr=1e-2)
        optimizer = BalancedOptimizer(adam, self.weighting)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, signal: Tensor, index: int) -> Tensor:
        return combined_loss(self, self.codec(signal))


if __name__ == "__main__":
    trainer = Trainer(
        max_epochs=3,
        gradient_clip_val=1.0,
        logger=CSVLogger("runs/lightning"),
        log_every_n_steps=4,
        callbacks=[LogBalance()],
        enable_checkpointing=False,
    )
    trainer.fit(Automatic(AnalyticQP()), batches())
    print({key: round(value, 3) for key, value in trainer.optimizers[0].log_dict().items()})
