"""The Trainer of transformers: a mixin balances the losses that the model returns.

A method that observes the step needs ``lagged=True`` here.

    python -m examples.frameworks.hf_trainer
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

from examples.frameworks.tiny import codec, signals
from moo_balance import BalancedTrajectory
from moo_balance.integrations.transformers import BalancedTrainerMixin
from moo_balance.weighting import Weighting


class BalancedTrainer(BalancedTrainerMixin, Trainer):
    """The codec returns its losses; for other models override `compute_losses`."""


def build_trainer(weighting: Weighting, **arguments: Any) -> BalancedTrainer:
    settings = {
        "output_dir": "runs/hf_trainer",
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "logging_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
    }
    return BalancedTrainer(
        weighting=weighting,
        model=codec(),
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=[{"signal": signal} for signal in signals()],
    )


if __name__ == "__main__":
    build_trainer(BalancedTrajectory(lagged=True)).train()
