"""A training run as an object: it takes a step, and can be saved and resumed between any two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.lic.codec import Reconstruction
from examples.lic.schedules import Milestones, Schedule
from moo_balance import BalancedOptimizer
from moo_balance.weighting import Weighting


@dataclass(frozen=True)
class Recipe:
    """How a codec is trained, whatever weights its losses.

    Args:
        steps: How many.
        lr: Adam's learning rate at the start.
        schedule: When it falls; by default twice to 0.3 of itself near the end.
        clip: Bound on the norm of the gradient, as training loops have it; infinite for none.
            By default the norm is brought to 1, see :func:`normalize_gradient`.
        ema: Decay of a moving average of the parameters, such as 0.999; by default there is none.
        auxiliary_lr: Learning rate of the auxiliary loss, in codecs that have one (CompressAI's).
    """

    steps: int
    lr: float
    schedule: Schedule = field(default=Milestones())
    clip: float | None = None
    ema: float | None = None
    auxiliary_lr: float = 1e-3


def rate_distortion(
    model: Callable[[Tensor], Reconstruction], images: Tensor, lmbda: float
) -> dict[str, Tensor]:
    """The two losses to be balanced: bits per pixel, and λ · 255² · MSE."""
    output = model(images)
    mse = nn.functional.mse_loss(output.images, images)
    return {"rate": output.bpp(), "distortion": lmbda * 255**2 * mse}


class Objective(nn.Module):
    """A codec with the losses on top: what data parallelism has to see as one module."""

    def __init__(self, model: nn.Module, lmbda: float) -> None:
        super().__init__()
        self.model = model
        self.lmbda = lmbda

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return rate_distortion(self.model, images, self.lmbda)


def fit_quantiles(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """CompressAI's second optimizer: fits the quantiles of its entropy bottleneck to the data.

    They get no gradient from rate or distortion; ``model.aux_loss()`` is theirs alone.
    """
    optimizer.zero_grad()
    model.aux_loss().backward()
    optimizer.step()


class Observer:
    """Looks on while a session runs; the run goes the same way with and without it."""

    def before(self, session: Session, images: Tensor) -> None:
        """Called with the batch of the step to come."""

    def after(self, session: Session) -> None:
        """Called when the step has been taken."""


class Session:
    """A training run that can be stopped between any two steps, saved, and resumed exactly.

    Under ``torch.distributed`` every rank makes one, with a model of equal weights and crops of
    its own.

    Args:
        model: The codec, on the device to train on.
        weighting: Any weighting of ``moo_balance``.
        recipe: Steps, learning rate, and what is done to gradients.
        lmbda: λ, the price of distortion.
        seed: For the quantisation noise.
    """

    def __init__(
        self, model: nn.Module, weighting: Weighting, recipe: Recipe, *, lmbda: float, seed: int
    ) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(seed + rank)  # ranks that share noise would see half of it
        model.train()
        self.model, self.recipe, self.taken = model, recipe, 0
        self.device = next(model.parameters()).device
        self.parameters, quantiles = _split(model)
        adam = torch.optim.Adam(self.parameters, lr=recipe.lr)
        self.optimizer = BalancedOptimizer(adam, weighting)
        self._schedule = recipe.schedule.begin(self.optimizer, recipe.steps)
        self._parts: dict[str, Any] = {}
        self._parts.update(model=model, optimizer=self.optimizer, schedule=self._schedule)
        self._followers: list[Callable[[], object]] = []
        if quantiles:
            auxiliary = torch.optim.Adam(quantiles, lr=recipe.auxiliary_lr)
            self._follow("auxiliary", auxiliary, partial(fit_quantiles, model, auxiliary))
        if recipe.ema is not None:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
            self._follow("ema", ema, partial(ema.update_parameters, model))
        self.bare_objective = Objective(model, lmbda)
        self._objective = _parallel(self.bare_objective, unused=bool(quantiles))

    def _follow(self, name: str, part: Any, step: Callable[[], object]) -> None:
        """Do `step` after each step, and save `part` with the rest."""
        self._parts[name] = part
        self._followers.append(step)

    def run(self, crops: Iterator[Tensor], observers: Sequence[Observer] = ()) -> None:
        """Take the steps that are left."""
        while self.taken < self.recipe.steps:
            images = next(crops).to(self.device, non_blocking=True)
            for observer in observers:
                observer.before(self, images)
            self._step(images)
            for observer in observers:
                observer.after(self)

    def _step(self, images: Tensor) -> None:
        self.optimizer.zero_grad()
        # A closure, so that a method that watches the step can evaluate the losses after it.
        self.optimizer.backward(partial(self._objective, images))
        if self.recipe.clip is None:
            normalize_gradient(self.parameters)
        else:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self._schedule.step(sum(self.optimizer.metrics.losses.values()))
        for follow in self._followers:
            follow()
        self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only; of this rank, where ranks differ (random numbers)."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        return {**state, "taken": self.taken, "random": random_state(self.device)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.taken = state["taken"]
        set_random_state(state["random"], self.device)


def _parallel(objective: nn.Module, *, unused: bool) -> nn.Module:
    """What averages gradients over the ranks, where there are any."""
    if not dist.is_initialized():
        return objective
    return DistributedDataParallel(objective, find_unused_parameters=unused)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the two losses, and those that CompressAI leaves to the auxiliary one."""
    main, quantiles = [], []
    for name, parameter in model.named_parameters():
        (quantiles if name.endswith(".quantiles") else main).append(parameter)
    return main, quantiles


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's random streams are: the host's, and that of `device`."""
    state = {"host": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set them back to where :func:`random_state` found them."""
    torch.set_rng_state(state["host"].cpu())
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def normalize_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Bring the gradient over all parameters to norm 1.

    This stands where training loops clip. Clipping handicaps one side of a comparison: Adam does
    not care about the scale of gradients, but a bound does, and the scale is what a weighting
    changes. At norm 1 nobody has an advantage, and outliers are tamed all the same.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_div_(gradients, norm)
