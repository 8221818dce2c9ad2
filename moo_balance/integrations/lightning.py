"""Lightning: what ``manual_backward`` and the trainer's backward do, and a callback that logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moo_balance._balancer import Closure, Losses
from moo_balance.errors import BalanceValueError
from moo_balance.integrations import find_balanced, unwrap_optimizer
from moo_balance.optimizer import BalancedOptimizer

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same framework, installed under its other name
    from pytorch_lightning import Callback  # type: ignore[assignment]


def backward(
    module: Any, losses: Losses | Closure, optimizer: Any = None, **options: Any
) -> Losses:
    """Balanced gradients, in place of ``self.manual_backward(sum(losses.values()))``.

    For manual optimisation. It passes on the loss scaler of ``precision="16-mixed"`` and calls
    ``strategy.pre_backward``, without which Lightning's DistributedDataParallel does not
    synchronise gradients. The hooks ``on_before_backward`` and ``on_after_backward`` take a single
    loss and are not called.

    Args:
        module: The ``LightningModule``: ``self``, in ``training_step``.
        losses: Scalar tensors by name, or a closure that computes them, for a method that
            needs the losses after the step.
        optimizer: Which of ``self.optimizers()``. Default: the only one.
        options: Those of ``BalancedOptimizer.backward``, such as ``features``.

    Returns:
        The losses.

    Raises:
        BalanceError: As ``BalancedOptimizer.backward``.

    Example::

        def training_step(self, batch, batch_index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            backward(self, partial(self.losses, batch))
            optimizer.step()
            self.log_dict(optimizer.log_dict())
    """
    strategy = module.trainer.strategy

    def announce(losses: Losses) -> Losses:
        if torch.is_grad_enabled() and isinstance(losses, Mapping):
            strategy.pre_backward(list(losses.values()))
        return losses

    inner = unwrap_optimizer(module.optimizers() if optimizer is None else optimizer)
    evaluated = inner.backward(
        (lambda: announce(losses())) if callable(losses) else announce(losses),
        grad_scaler=_scaler(module),
        **options,
    )
    strategy.post_backward(next(iter(evaluated.values())))
    return evaluated


def combined_loss(module: Any, losses: Losses, optimizer: Any = None, **options: Any) -> Tensor:
    """One scalar to return from ``training_step``, whose gradient is the balanced gradient.

    For automatic optimisation: ``BalancedOptimizer.combined_loss`` with the trainer's loss scaler.

    Args:
        module: The ``LightningModule``: ``self``, in ``training_step``.
        losses: Scalar tensors by name.
        optimizer: Which of ``self.optimizers()``. Default: the only one.
        options: Those of ``BalancedOptimizer.combined_loss``, such as ``features``.

    Raises:
        BalanceError: As ``BalancedOptimizer.combined_loss``.

    Example::

        def training_step(self, batch, batch_index):
            combined = combined_loss(self, self.losses(batch))
            self.log_dict(self.optimizers().log_dict())
            return combined
    """
    inner = unwrap_optimizer(module.optimizers() if optimizer is None else optimizer)
    return inner.combined_loss(losses, grad_scaler=_scaler(module), **options)


class LogBalance(Callback):
    """Logs ``log_dict()`` of every balanced optimizer, with each logger of the module.

    In place of ``self.log_dict(optimizer.log_dict())`` in ``training_step``, which synchronizes
    with the device in every step. It works with manual and with automatic optimisation. The
    horizontal axis is Lightning's, the number of optimizer steps taken before.

    Args:
        every: Log after each so many optimizer steps, counted by ``trainer.global_step`` from the
            start or the resumption, at least 1. Default None: ``log_every_n_steps`` of the trainer.
        prefix: Prefix of the keys. If several optimizers are balanced, the position of each among
            those of the trainer follows, as in ``moo/0/weight/a``.
        pairs: As in ``BalancedOptimizer.log_dict``.

    Raises:
        BalanceValueError: `every` is not a whole number of at least 1; or, when training starts, no
            optimizer is balanced.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from moo_balance.integrations.lightning import LogBalance
        >>> trainer = Trainer(callbacks=[LogBalance(every=10)], logger=False)
    """

    def __init__(
        self, every: int | None = None, *, prefix: str = "moo/", pairs: bool | None = None
    ) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise BalanceValueError(
                "Parameter `every` should be a whole number of steps, at least 1, or None for the "
                f"trainer's `log_every_n_steps`. Found {every!r}."
            )
        super().__init__()
        self.every, self.prefix, self.pairs = every, prefix, pairs
        self._next = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the balanced optimizers."""
        if not _balanced_optimizers(trainer):
            kinds = ", ".join(type(each).__name__ for each in trainer.optimizers) or "none"
            raise BalanceValueError(
                "The module's optimizers should contain a BalancedOptimizer for LogBalance. Found "
                f"{kinds}. Return one from `configure_optimizers`, or leave the callback out."
            )
        self._next = trainer.global_step + self._interval(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Log, if enough steps were taken."""
        if trainer.global_step < self._next:
            return
        self._next = trainer.global_step + self._interval(trainer)
        optimizers = _balanced_optimizers(trainer)
        values: dict[str, float] = {}
        for index, optimizer in optimizers.items():
            prefix = self.prefix if len(optimizers) == 1 else f"{self.prefix}{index}/"
            values.update(optimizer.log_dict(prefix, self.pairs))
        for logger in pl_module.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def _interval(self, trainer: Any) -> int:
        # It is 0 where the trainer logs nothing.
        return max(trainer.log_every_n_steps, 1) if self.every is None else self.every


def _balanced_optimizers(trainer: Any) -> dict[int, BalancedOptimizer]:
    """By position among the trainer's optimizers."""
    found = {index: find_balanced(each) for index, each in enumerate(trainer.optimizers)}
    return {index: optimizer for index, optimizer in found.items() if optimizer is not None}


def _scaler(module: Any) -> Any:
    """The loss scaler; the precision plugin has one for ``"16-mixed"`` only."""
    return getattr(module.trainer.strategy.precision_plugin, "scaler", None)
