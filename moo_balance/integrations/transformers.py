"""The Trainer of transformers: a mixin that balances, and a callback that logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from moo_balance.errors import BalanceValueError
from moo_balance.integrations import find_balanced, unwrap_optimizer
from moo_balance.optimizer import BalancedOptimizer
from moo_balance.weighting import Weighting


class LogBalance(TrainerCallback):
    """Adds ``log_dict()`` of the balanced optimizer to the Trainer's logs of the training loss.

    For a Trainer with a ``compute_loss`` of its own; :class:`BalancedTrainerMixin` logs without it.
    A Trainer calls its callbacks in their order, and those that report (to TensorBoard, Weights &
    Biases, …) come before the ones that are passed to it, so put this one first::

        trainer.callback_handler.callbacks.insert(0, LogBalance())

    Passed as ``Trainer(callbacks=[LogBalance()])`` the values are in ``state.log_history``, which
    checkpoints contain, and in what the Trainer prints.

    Args:
        prefix: Prefix of the keys.
        pairs: As in ``BalancedOptimizer.log_dict``.

    Raises:
        BalanceValueError: When the Trainer logs, its optimizer is not balanced.
    """

    def __init__(self, prefix: str = "moo/", pairs: bool | None = None) -> None:
        self.prefix, self.pairs = prefix, pairs

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        """Add the values to the logs, and to the entry that the history has already."""
        if logs is not None and "loss" in logs:
            values = unwrap_optimizer(parts["optimizer"]).log_dict(self.prefix, self.pairs)
            logs.update(values)
            state.log_history[-1].update(values)


class BalancedTrainerMixin:
    """Makes a Trainer balance the losses that its model returns.

    Write it before the Trainer's class. The Trainer builds its optimizer as always, from
    ``TrainingArguments``: parameters with and without weight decay in groups of their own, learning
    rate, ``optim``. The mixin wraps it, or one that is passed as ``optimizers=``, unless that is
    balanced already. Schedulers, clipping, mixed precision and ``resume_from_checkpoint`` work as
    always. With ``gradient_accumulation_steps`` each micro-batch is balanced by itself, and the
    results are averaged. A method that observes the step needs ``lagged=True``.

    For evaluation the loss is the sum of the losses. What the Trainer logs as ``loss`` in training
    is the combined loss; each loss, its weight and so on are logged next to it (``log_dict``).

    Args:
        weighting: The method. It may be left out if `optimizers` has a ``BalancedOptimizer``.
        balance_options: Further arguments of ``BalancedOptimizer``, such as ``shared_params``.
        arguments: Those of the Trainer.

    Raises:
        BalanceValueError: When the optimizer is built: `weighting` is missing. In a step:
            `compute_losses` returns something else, or a loss is no scalar.

    Example::

        class BalancedTrainer(BalancedTrainerMixin, Trainer):
            def compute_losses(self, model, inputs):
                outputs = model(**inputs)
                return {"class": outputs.loss_ce, "box": outputs.loss_bbox}, outputs


        trainer = BalancedTrainer(weighting=NashMTL(), model=model, args=arguments, …)
    """

    def __init__(
        self,
        *positional: Any,
        weighting: Weighting | None = None,
        balance_options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(*positional, **arguments)
        self.weighting, self.balance_options = weighting, dict(balance_options or {})
        # The losses are means over a micro-batch, so the Trainer divides by the number of these.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True  # also where no input counts as a label

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's own optimizer, balanced."""
        optimizer = super().create_optimizer(*arguments, **options)  # type: ignore[misc]
        if find_balanced(optimizer) is None:
            if self.weighting is None:
                raise BalanceValueError(
                    "Parameter `weighting` should be a method, as `optimizers` has no "
                    "BalancedOptimizer. Found None. Pass, for example, `weighting=NashMTL()`."
                )
            optimizer = BalancedOptimizer(optimizer, self.weighting, **self.balance_options)
            self.optimizer = optimizer
        return optimizer

    def compute_losses(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Mapping[str, Tensor], Any]:
        """The losses by name, and the model's outputs for evaluation; override it.

        Here they are the same, ``model(**inputs)``: a model that returns its losses and nothing
        else. Each loss should be a mean over the batch.

        Args:
            model: The model, perhaps wrapped for training on several devices.
            inputs: The batch.

        Returns:
            The losses, and the outputs that ``predict`` and metrics get: a mapping, a tensor or a
            sequence of tensors, without a loss at its start.
        """
        outputs = model(**inputs)
        return outputs, outputs

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """One scalar whose gradient is the balanced gradient; their sum where there is no graph."""
        computed = self.compute_losses(model, inputs)
        if not isinstance(computed, tuple) or len(computed) != 2:
            raise BalanceValueError(
                "`compute_losses` should return a mapping of losses, and the model's outputs after "
                f"it. Found {type(computed).__name__}. Write `return losses, outputs`."
            )
        losses, outputs = computed
        for name, loss in losses.items():
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise BalanceValueError(
                    f"Loss `{name}` should be a scalar. Found shape {tuple(loss.shape)}. If it is "
                    "an output of the model and no loss, override `compute_losses`, and "
                    "`return losses, outputs` without it among the losses."
                )
        if torch.is_grad_enabled():
            # `self.optimizer` is the wrapper that `accelerator.prepare` returned.
            scaler = self.accelerator.scaler  # type: ignore[attr-defined]
            loss = unwrap_optimizer(self.optimizer).combined_loss(losses, grad_scaler=scaler)
        else:
            loss = torch.stack(list(losses.values())).sum()
        if not return_outputs:
            return loss
        if not isinstance(outputs, Mapping):  # the Trainer leaves out the first of a sequence
            outputs = (loss, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,)))
        return loss, outputs

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log also the metrics of the balance, next to the training loss."""
        balanced = find_balanced(self.optimizer)
        if "loss" in logs and balanced is not None:
            logs.update(balanced.log_dict())
        super().log(logs, *arguments, **options)  # type: ignore[misc]
