"""Models that write in their forward pass: a second evaluation sees what the first saw, no more."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moo_balance import FAMO, BalancedOptimizer, BalancedTrajectory, Sum
from moo_balance.weighting import Weighting
from tests.fuzz.amounts import over_amounts, settings_for
from tests.fuzz.models import next_numbers, random_states
from tests.support.problems import snapshot

Write = Callable[["Writing", str, Tensor], Any]
"""Changes a tensor of the model, given its name and a value that depends on the batch."""

OWNERS = ("buffer", "parameter", "attribute", "entry", "inner", "outside")
SIZE = 4


class Writing(nn.Module):
    """A linear layer, and a tensor of each owner that its forward pass reads and may write."""

    def __init__(self, writes: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.writes = writes
        self.layer = nn.Linear(SIZE, SIZE, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(SIZE, dtype=torch.float64)
        self.inner = nn.Module()
        self.inner.register_buffer("tensor", start(6))
        self.table = nn.Embedding(3, SIZE, max_norm=0.5, dtype=torch.float64)
        self.register_buffer("buffer", start(1))
        self.parameter = nn.Parameter(start(2), requires_grad=False)
        self.attribute = start(3)
        self.entries: dict[str, Any] = {"entry": start(4), "seen": []}
        self.calls = 0
        with torch.no_grad():
            for k, param in enumerate([*self.layer.parameters(), *self.table.parameters()]):
                param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape).sin() + k / 9)

    def read(self, owner: str) -> Tensor:
        if owner == "entry":
            return self.entries["entry"]
        if owner == "outside":
            return OUTSIDE["tensor"]
        return self.inner.tensor if owner == "inner" else getattr(self, owner)

    def assign(self, owner: str, value: Tensor) -> None:
        if owner == "inner":
            self.inner.tensor = value
        elif owner == "parameter":
            self.parameter.data = value
        elif owner not in ("entry", "outside"):  # which the library does not know
            setattr(self, owner, value)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        value = torch.tanh(self.layer(inputs))
        for write, owner in self.writes:
            value = value + self.read(owner).detach().clone().sin()
            value = WRITES[write](self, owner, value) if write in PASSES else value
            if write not in PASSES:
                with torch.no_grad():
                    WRITES[write](self, owner, value.mean(0))
        return {"a": value.square().mean() + 0.1, "b": (value - 1).square().mean() + 0.1}


def start(seed: int) -> Tensor:
    return torch.arange(SIZE, dtype=torch.float64) / 7 + seed


OUTSIDE = {"tensor": start(5)}
"""A tensor that no module holds."""


def in_view(model: Writing, owner: str, value: Tensor) -> None:
    model.read(owner).view(2, 2)[:, 0].add_(value[:2])


def in_entries(model: Writing, owner: str, value: Tensor) -> None:
    tensor = model.read(owner)
    tensor[1:3] = value[:2]
    tensor[tensor > 3] = 0.5


def count(model: Writing, owner: str, value: Tensor) -> None:
    model.calls += 1
    model.read(owner).add_(model.calls)


def draw(model: Writing, owner: str, value: Tensor) -> None:
    noise = torch.rand(SIZE, dtype=torch.float64) + float(np.random.rand()) + random.random()
    model.read(owner).add_(noise)


def multiply_by_foreach(model: Writing, owner: str, value: Tensor) -> None:
    torch._foreach_mul_([model.read(owner)], 0.5)
    torch._foreach_add_([model.read(owner)], [value])


def swap(model: Writing, owner: str, value: Tensor) -> None:
    held = model.read(owner)
    model.assign(owner, held * 0.5 + value)
    held.mul_(2.0)


WRITES: dict[str, Write] = {
    "add": lambda model, owner, value: model.read(owner).add_(value),
    "lerp": lambda model, owner, value: model.read(owner).lerp_(value, 0.3),
    "copy": lambda model, owner, value: model.read(owner).copy_(value),
    "data": lambda model, owner, value: model.read(owner).data.mul_(1.5),
    "out": lambda model, owner, value: torch.add(value, 1.0, out=model.read(owner)),
    "view": in_view,
    "entries": in_entries,
    "count": count,
    "draw": draw,
    "foreach": multiply_by_foreach,
    "assign": lambda model, owner, value: model.assign(owner, model.read(owner) * 0.5 + value),
    "swap": swap,
    "norm": lambda model, owner, value: model.norm(value),
    "embed": lambda model, owner, value: value + model.table(torch.tensor([0, 2])).sum(0),
    "checkpoint": lambda model, owner, value: checkpoint(model.norm, value, use_reentrant=False),
    "dropout": lambda model, owner, value: F.dropout(value, 0.3),
    "slope": lambda model, owner, value: (
        value + torch.autograd.grad(value.sum(), model.layer.weight, create_graph=True)[0].mean()
    ),
}
PASSES = ("norm", "embed", "checkpoint", "dropout", "slope")
"""Those that take part in the graph and return a value."""


def state_of(model: Writing) -> Any:
    """All that a forward pass may have changed."""
    tensors = [*model.state_dict().values(), *map(model.read, OWNERS)]
    numbers = next_numbers(random_states())
    return snapshot([tensors, model.calls, model.training, list(numbers)])


def run(weighting: Weighting, writes: Sequence[tuple[str, str]], lr: float, steps: int) -> Any:
    """Train, and return the model's state and the balance's."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    OUTSIDE["tensor"] = start(5)
    model = Writing(writes)
    trained = [*model.layer.parameters()]
    optimizer = BalancedOptimizer(torch.optim.SGD(trained, lr=lr), weighting)
    for step in range(steps):
        inputs = torch.linspace(-1, 2, 3 * SIZE, dtype=torch.float64).reshape(3, SIZE) + step
        optimizer.step(lambda: model(inputs))  # noqa: B023
    return state_of(model), optimizer.state_dict()["balance"]["state"]


writes = st.lists(st.tuples(st.sampled_from(sorted(WRITES)), st.sampled_from(OWNERS)), max_size=5)


@over_amounts(few=8)
@pytest.mark.parametrize("weighting", [FAMO(), BalancedTrajectory()], ids=["FAMO", "trajectory"])
def test_a_second_evaluation_repeats_the_first_and_leaves_nothing(
    weighting: Weighting, examples: int
) -> None:
    @settings_for(examples)
    @given(writes, st.integers(1, 14))
    def holds(program: list[tuple[str, str]], steps: int) -> None:
        state, balance = run(weighting, program, 0.0, steps)
        assert not balance["logits"].any()
        plain, _ = run(Sum(), program, 0.0, steps)
        assert state == plain

    holds()
