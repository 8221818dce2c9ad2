"""A small model whose forward pass may draw random numbers, write, and differentiate."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.problems import rows_of_batch
from tests.support.registry import NAMES

TRAITS = ("noise", "norm", "codebook", "penalty")
"""``noise``: draws from three random streams; ``norm``: batch norm and a counter; ``codebook``: a
parameter that is an average over batches; ``penalty``: a loss that calls ``autograd.grad``."""


class FuzzModel(nn.Module):
    """A shared trunk, and for each loss a head; the heads' parameters have equal shapes."""

    def __init__(self, traits: Collection[str] = ()) -> None:
        super().__init__()
        self.traits = frozenset(traits)
        self.trunk = nn.Linear(3, 4, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in NAMES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double() / 2)
        if "norm" in self.traits:
            self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if "codebook" in self.traits:
            average = torch.zeros(4, dtype=torch.float64)
            self.average = nn.Parameter(average, requires_grad=False)

    def forward(self, batch: int, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Positive losses, and the features that they are computed from."""
        rows = rows_of_batch(batch)
        inputs = rows[:, :3]
        if "penalty" in self.traits:
            inputs = inputs.clone().requires_grad_()
        features = self._features(inputs)
        losses = {
            name: 3.0**k * ((self.heads[k](features)[:, 0] - rows[:, 3]).square().mean() + 0.1)
            for k, name in enumerate(NAMES)
            if name in names
        }
        if "penalty" in self.traits and "b" in losses:
            (slope,) = torch.autograd.grad(losses["b"], inputs, create_graph=True)
            losses["b"] = losses["b"] + slope.square().sum()
        return losses, features

    def _features(self, inputs: Tensor) -> Tensor:
        hidden = self.trunk(inputs)
        if "norm" in self.traits:
            self.calls += 1
            hidden = self.norm(hidden)
        features = torch.tanh(hidden)
        if "noise" in self.traits:
            noise = torch.rand(4, dtype=torch.float64) + float(np.random.rand()) + random.random()
            features = features + 0.1 * noise
        if "codebook" in self.traits:
            with torch.no_grad():
                self.average.lerp_(features.mean(0), 0.1)
            features = features - self.average.detach().clone()
        return features

    def written(self) -> list[Tensor]:
        """What the forward pass writes."""
        codebook = [self.average.data] if "codebook" in self.traits else []
        return [*self.buffers(), *codebook]


RandomStates = tuple[Tensor, Any, Any]


def random_states() -> RandomStates:
    """The states of the three random streams that a model may draw from."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states: RandomStates) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def next_numbers(states: RandomStates) -> tuple[float, float, float]:
    """What each stream gives next, which tells two states apart."""
    now = random_states()
    set_random_states(states)
    numbers = float(torch.rand(())), float(np.random.rand()), random.random()
    set_random_states(now)
    return numbers
