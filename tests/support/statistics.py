"""What a weighting gets to see, in float64 and by short names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

CPU = torch.device("cpu")


def names(count: int) -> tuple[str, ...]:
    return tuple("abcdefgh"[:count])


def vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(
    losses: Sequence[float] | Tensor, gramian: Tensor | None = None, step: int = 0
) -> Statistics:
    """Statistics with losses named "a", "b" and so on, in the dtype of the Gramian."""
    losses = losses if isinstance(losses, Tensor) else vector(losses)
    losses = losses if gramian is None else losses.to(gramian.dtype)
    return Statistics(names(len(losses)), losses, gramian, step)


def initial_state(weighting: Weighting, count: int) -> State:
    return weighting.init(names(count), CPU)


def run_steps(
    weighting: Weighting,
    losses: Sequence[Tensor | Sequence[float]] | None = None,
    gramians: Sequence[Tensor | None] | None = None,
    state: State | None = None,
) -> list[WeightingOutput]:
    """The output of each step, from losses, Gramians (with losses that are all 1), or both."""
    if losses is None:
        losses = [[1.0] * len(gramians[0])] * len(gramians)
    each = [None] * len(losses) if gramians is None else gramians
    state = initial_state(weighting, len(losses[0])) if state is None else state
    outputs = []
    for step, (values, gramian) in enumerate(zip(losses, each, strict=True)):
        outputs.append(weighting.weights(statistics_of(values, gramian, step), state))
        state = outputs[-1].state
    return outputs


def assert_near(actual: Tensor, expected: Iterable[float] | Tensor, atol: float) -> None:
    expected = expected if isinstance(expected, Tensor) else vector(expected)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)
