"""A small problem that one process trains on whole batches, and ranks on their shares of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moo_balance import BalancedOptimizer
from tests.support.problems import snapshot
from tests.support.registry import NAMES, Method

STEPS = 10
BATCH = 8

# Rounding differs in the last bit: a mean of two halves is summed in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

Wrap = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """A shared trunk and a head for each loss; sizes that two ranks cannot split evenly."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7, dtype=dtype), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(7, 1, dtype=dtype) for _ in NAMES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                start = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(start / 2)

    def forward(self, batch: Tensor) -> list[Tensor]:
        features = self.trunk(batch[:, :5])
        return [head(features) for head in self.heads]


class Normalized(Net):
    """The same with buffers, which DistributedDataParallel broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7, dtype=torch.float64)

    def forward(self, batch: Tensor) -> list[Tensor]:
        features = self.norm(self.trunk(batch[:, :5]))
        return [head(features) for head in self.heads]


def share(step: int, dtype: torch.dtype = torch.float64, alone: bool = False) -> Tensor:
    """The batch of a step, or the part of it that this rank trains on."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64).to(dtype)
    return batch if alone else batch.chunk(dist.get_world_size())[dist.get_rank()]


def losses_of(model: nn.Module, batch: Tensor, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Positive losses, a factor of ten apart."""
    return {
        name: 10.0**k * ((output - (k - 1) * batch[:, 5:]).square().mean() + 0.1)
        for k, (name, output) in enumerate(zip(NAMES, model(batch), strict=True))
        if name in names
    }


def by_closure(optimizer: BalancedOptimizer, losses: Callable[[], dict[str, Tensor]]) -> None:
    optimizer.step(losses)


def by_backward(optimizer: BalancedOptimizer, losses: Callable[[], dict[str, Tensor]]) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses())
    optimizer.step()
    if optimizer.weighting.observes_step:
        with torch.no_grad():
            optimizer.observe(losses())


def by_combined_loss(optimizer: BalancedOptimizer, losses: Callable[[], dict[str, Tensor]]) -> None:
    optimizer.zero_grad()
    optimizer.combined_loss(losses()).backward()
    optimizer.step()
    if optimizer.weighting.observes_step:
        with torch.no_grad():
            optimizer.observe(losses())


Step = Callable[[BalancedOptimizer, Callable[[], dict[str, Tensor]]], None]


def train(
    model: nn.Module,
    optimizer: BalancedOptimizer,
    steps: Sequence[int] = range(STEPS),
    step: Step = by_closure,
    alone: bool = False,
) -> None:
    dtype = next(model.parameters()).dtype
    for number in steps:
        batch = share(number, dtype, alone)
        step(optimizer, lambda: losses_of(model, batch))  # noqa: B023


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def as_whole(value: Any) -> Any:
    """All shards as whole tensors."""
    if isinstance(value, dict):
        return {key: as_whole(entry) for key, entry in value.items()}
    return getattr(value, "full_tensor", lambda: value)()


def parameters(model: nn.Module) -> list[Tensor]:
    """Whole parameters, also where each rank holds a shard."""
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


@functools.cache
def reference(method: Method, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and balance after one process went through the whole batches."""
    model = Net(dtype)
    optimizer = BalancedOptimizer(adam(model), method.make(NAMES), process_group=None)
    train(model, optimizer, alone=True)
    return parameters(model), optimizer.state_dict()["balance"]


def assert_same_on_all_ranks(*values: Any) -> None:
    """Equal to the last bit."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, snapshot(values))
    assert all(other == gathered[0] for other in gathered)


def assert_equals_reference(
    model: nn.Module, optimizer: BalancedOptimizer, method: Method, dtype: torch.dtype
) -> None:
    """The ranks hold the same, and it is what one process would hold."""
    own, balance = parameters(model), as_whole(optimizer.state_dict()["balance"])
    assert_same_on_all_ranks(own, balance)
    expected, expected_balance = reference(method, dtype)
    close = functools.partial(
        torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True
    )
    close(own, expected)
    close(balance["state"], expected_balance["state"])
    close(balance.get("rows", {}), expected_balance.get("rows", {}))
    values = {"state": None, "rows": None}
    assert {**balance, **values} == {**expected_balance, **values}
