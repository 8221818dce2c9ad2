"""The Trainer of transformers: `compute_loss` returns the combined loss.

A method that observes the step needs ``lagged=True`` here.

    python -m examples.frameworks.hf_trainer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from examples.frameworks.tiny import codec, signals
from moo_balance import BalancedOptimizer, BalancedTrajectory
from moo_balance.integrations import unwrap_optimizer
from moo_balance.weighting import Weighting


class BalancedTrainer(Trainer):
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        losses = model(**inputs)
        if torch.is_grad_enabled():
            # `self.optimizer` is the wrapper that `accelerator.prepare` returned.
            optimizer = unwrap_optimizer(self.optimizer)
            loss = optimizer.combined_loss(losses, grad_scaler=self.accelerator.scaler)
        else:
            loss = torch.stack(list(losses.values())).sum()  # evaluation
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(unwrap_optimizer(self.optimizer).log_dict())
        super().log(logs, start_time)


def build_trainer(weighting: Weighting, **arguments: Any) -> BalancedTrainer:
    model = codec()
    optimizer = BalancedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), weighting)
    settings = {
        "output_dir": "runs/hf_trainer",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "logging_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
    }
    return BalancedTrainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=[{"signal": signal} for signal in signals()],
        optimizers=(optimizer, None),
    )


if __name__ == "__main__":
    build_trainer(BalancedTrajectory(lagged=True)).train()
