"""Small problems for the tests: three losses of a small network, and random statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput
from tests.support.naive_rows import NaiveRows
from tests.support.registry import NAMES, Method

Losses = dict[str, Tensor]


@cache
def rows_of_batch(batch: int) -> Tensor:
    """The batch of that number: eight rows of three inputs and a target."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64)


class SmallModel(nn.Module):
    """A shared trunk, and for each loss a head that the other losses do not reach."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Linear(3, 4, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in NAMES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) / 2)

    def losses(self, batch: int = 0, names: Sequence[str] = NAMES) -> Losses:
        """Positive losses whose scales lie a factor of ten apart, on the batch of that number."""
        draw = rows_of_batch(batch).to(self.trunk.weight)
        features = torch.tanh(self.trunk(draw[:, :3]))
        return {
            name: 10.0**k * (self.heads[k](features)[:, 0] - (k - 1) * draw[:, 3]).square().mean()
            for k, name in enumerate(NAMES)
            if name in names
        }


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def grouped(model: SmallModel) -> torch.optim.Optimizer:
    """Two groups of different learning rates."""
    groups = [
        {"params": model.trunk.parameters()},
        {"params": model.heads.parameters(), "lr": 0.002},
    ]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def setup(
    method: Method,
    of: Sequence[str] = NAMES,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = momentum,
    **arguments: Any,
) -> tuple[SmallModel, BalancedOptimizer]:
    """A fresh model and its optimizer, balanced by the method of these losses."""
    model = SmallModel()
    return model, BalancedOptimizer(optimizer(model), method.make(of), **arguments)


def train(
    model: SmallModel,
    optimizer: BalancedOptimizer,
    batches: Sequence[int],
    names: Sequence[str] = NAMES,
) -> None:
    """The loop of the documentation, with a closure for methods that observe the step."""
    for batch in batches:
        optimizer.zero_grad()
        optimizer.backward(lambda: model.losses(batch, names))  # noqa: B023
        optimizer.step()


def train_plainly(
    model: SmallModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[int],
    names: Sequence[str] = NAMES,
) -> None:
    """The loop without balancing: one backward pass of the sum."""
    for batch in batches:
        optimizer.zero_grad()
        torch.stack([*model.losses(batch, names).values()]).sum().backward()
        optimizer.step()


def sum_losses(batches: Iterable[Losses]) -> Losses:
    """Losses of several micro-batches, added up by name."""
    total: Losses = {}
    for losses in batches:
        for name, loss in losses.items():
            total[name] = total[name] + loss if name in total else loss
    return total


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def jacobian(losses: Losses, params: Sequence[Tensor]) -> Tensor:
    """Row by row, the slow obvious way."""
    rows = []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        whole = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)
        ]
        rows.append(torch.cat([g.reshape(-1) for g in whole]))
    return torch.stack(rows)


def flat_gradient(model: nn.Module) -> Tensor:
    """`.grad` of all parameters in one vector, zero where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
            for p in model.parameters()
        ]
    )


def as_vector(figures: Mapping[str, Tensor]) -> Tensor:
    """Figures by name as one vector, such as ``optimizer.metrics.coefficients``."""
    return torch.stack([*figures.values()])


def assert_same_parameters(
    model: nn.Module, twin: nn.Module, rtol: float = 1e-12, atol: float = 1e-12
) -> None:
    """Equal but for rounding: sums may be taken in another order."""
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=rtol, atol=atol)


def snapshot(value: Any) -> Any:
    """A picture of nested containers that compares equal bit by bit, NaN included."""
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(entry) for entry in value]
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.tolist()!r}"
    return value


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a run consists of: parameters, wrapped state, balance."""
    return snapshot({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@dataclass
class Scene:
    """What a weighting is given in a few steps: losses before and after each, and gradients."""

    names: tuple[str, ...]
    losses: Tensor  # [T, K]
    after: Tensor  # [T, K]
    jacobians: Tensor  # [T, K, P]

    @staticmethod
    def random(names: Sequence[str] = NAMES, seed: int = 0, steps: int = 5) -> Scene:
        generator = torch.Generator().manual_seed(seed)
        count = len(names)
        draw = torch.randn(steps, count, 2, generator=generator, dtype=torch.float64).exp()
        jacobians = torch.randn(steps, count, 7, generator=generator, dtype=torch.float64)
        return Scene(tuple(names), draw[..., 0], draw[..., 1], jacobians)

    def permute(self, order: Sequence[int]) -> Scene:
        return Scene(
            tuple(self.names[k] for k in order),
            self.losses[:, order],
            self.after[:, order],
            self.jacobians[:, order],
        )

    def scale(self, factors: Sequence[float]) -> Scene:
        scale = torch.tensor(factors, dtype=torch.float64)
        return Scene(
            self.names,
            self.losses * scale,
            self.after * scale,
            self.jacobians * scale[:, None],
        )


def play(weighting: Weighting, scene: Scene) -> list[WeightingOutput]:
    """The output of a weighting and the state that follows, in each step of a scene."""
    state: State = weighting.init(scene.names, torch.device("cpu"))
    naive, answers = NaiveRows(weighting), []
    for step, (losses, after, rows) in enumerate(
        zip(scene.losses, scene.after, scene.jacobians, strict=True)
    ):
        gramian = rows @ rows.T if weighting.needs(step).gramian else None
        statistics = naive.tell(Statistics(scene.names, losses, gramian, step), rows)
        answer = weighting.weights(statistics, state)
        state = answer.state
        if weighting.needs(step).observes:
            state = weighting.observe(Statistics(scene.names, after, step=step + 1), state)
        answers.append(answer._replace(state=state))
    return answers


class _SpoiledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor such as NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.factor, None


def spoil_gradient(losses: Losses, factor: float, name: str = "b") -> Losses:
    """The losses with their values; the gradient of one of them is multiplied by `factor`."""
    return {**losses, name: _SpoiledGradient.apply(losses[name], factor)}


def change_value(losses: Losses, value: float, name: str = "b") -> Losses:
    """The losses with their gradients; one of them has this value instead of its own."""
    return {**losses, name: losses[name] - losses[name].detach() + value}
