"""The training loop: losses, gradients, learning rate, averaged weights, exact resuming."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.lic.losses import Objective
from moo_balance import BalancedOptimizer
from moo_balance.weighting import Weighting

FALLS = (0.7, 0.9)
"""The fractions of a run after each of which the learning rate falls."""

FALL_FACTOR = 0.3
"""What it falls to, as a factor."""


@dataclass(frozen=True)
class Recipe:
    """How a codec is trained, whatever weights its losses.

    Args:
        steps: How many.
        lr: Adam's learning rate at the start; near the end it falls twice, see :data:`FALLS`.
        clip: Bound on the norm of the gradient, positive, infinite for none; or ``"unit"``, which
            scales the gradient to norm 1, see :func:`normalize_gradient`.
        ema: Decay in (0, 1) of a moving average of the parameters, such as 0.999; None for none.
        auxiliary_lr: Learning rate of the auxiliary loss, which fits quantiles.
        amp: Run the transforms in bfloat16 (:class:`torch.autocast`); parameters, likelihoods and
            losses stay float32.
    """

    steps: int
    lr: float
    clip: float | Literal["unit"] = 1.0
    ema: float | None = None
    auxiliary_lr: float = 1e-3
    amp: bool = False


class Observer:
    """Watches a training run, which goes the same way with and without it."""

    def begin(self, trainer: Trainer) -> None:
        """Called before the first step to come."""

    def after(self, trainer: Trainer) -> None:
        """Called after each step."""

    def end(self, trainer: Trainer) -> None:
        """Called at the end, also when an error ends the run."""


class Trainer:
    """A training run that can be stopped between any two steps, saved, and resumed exactly.

    The codec is on the device to train on. Runs with equal seeds and crops see equal noise. For
    `nonfinite` see :class:`moo_balance.BalancedOptimizer`; a step that is skipped counts as taken.
    """

    def __init__(
        self,
        objective: Objective,
        weighting: Weighting,
        recipe: Recipe,
        *,
        seed: int,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        torch.manual_seed(seed)
        self.objective, self.model, self.recipe = objective, objective.model, recipe
        self.model.train()
        self.taken = 0
        self.stop = False
        """Set it, and the run ends after the step under way."""
        self.device = next(self.model.parameters()).device
        self.parameters, quantiles = _split(self.model)
        adam = torch.optim.Adam(self.parameters, lr=recipe.lr)
        self.optimizer = BalancedOptimizer(
            adam, weighting, loss_names=objective.names, nonfinite=nonfinite
        )
        falls = [int(fraction * recipe.steps) for fraction in FALLS]
        factor = lambda taken: FALL_FACTOR ** sum(taken >= fall for fall in falls)  # noqa: E731
        self._scheduler = LambdaLR(self.optimizer, factor)
        self._parts: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "schedule": self._scheduler,
        }  # fmt: skip
        self._after_step: list[Callable[[], object]] = []
        if quantiles:
            auxiliary = torch.optim.Adam(quantiles, lr=recipe.auxiliary_lr)
            self._parts["auxiliary"] = auxiliary
            self._after_step.append(partial(fit_quantiles, self.model, auxiliary))
        self.trained: nn.Module = self.model
        """The codec to evaluate: with averaged weights where the run keeps them."""
        if recipe.ema is not None:
            ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
            self._parts["ema"], self.trained = ema, ema.module
            self._after_step.append(partial(ema.update_parameters, self.model))

    @property
    def complete(self) -> bool:
        """Whether all steps are taken."""
        return self.taken >= self.recipe.steps

    def run(self, crops: Iterator[Tensor], observers: Sequence[Observer] = ()) -> None:
        """Take the steps that are left, on batches ``[B, 3, H, W]`` in [0, 1]."""
        with ExitStack() as ends:
            for observer in observers:
                observer.begin(self)
                ends.callback(observer.end, self)
            while not self.complete and not self.stop:
                self._step(next(crops).to(self.device, non_blocking=True))
                for observer in observers:
                    observer.after(self)

    def _step(self, images: Tensor) -> None:
        self.objective.begin_step(self.taken, self.recipe.steps)
        self.optimizer.zero_grad()
        # A closure, so that a method that observes the step can evaluate the losses after it.
        self.optimizer.backward(partial(self._evaluate, images))
        if self.recipe.clip == "unit":
            normalize_gradient(self.parameters)
        else:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self._scheduler.step()
        for action in self._after_step:
            action()
        self.taken += 1

    def _evaluate(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
            return self.objective(images)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        random = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            random[self.device.type] = module.get_rng_state(self.device)
        return {**state, "taken": self.taken, "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.taken = state["taken"]
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if self.device.type != "cpu" and self.device.type in state["random"]:
            module = torch.get_device_module(self.device)
            module.set_rng_state(state["random"][self.device.type].cpu(), self.device)


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run after the step under way; a second one does it at once."""

    def stop(number: int, frame: object) -> None:
        trainer.stop = True
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the losses, and those that are left to the auxiliary one."""
    main, quantiles = [], []
    for name, parameter in model.named_parameters():
        (quantiles if name.endswith(".quantiles") else main).append(parameter)
    return main, quantiles


def fit_quantiles(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fit the quantiles of the entropy bottleneck, which rate and distortion do not reach."""
    optimizer.zero_grad()
    model.aux_loss().backward()
    optimizer.step()


def normalize_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Scale the gradient over all parameters to norm 1; a zero gradient stays zero.

    For comparisons of weightings: Adam does not depend on the scale of gradients, which is what a
    weighting changes, but a bound on the norm does.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # those of a step that is skipped
        return
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_div_(gradients, norm.clamp(min=torch.finfo(norm.dtype).tiny))
