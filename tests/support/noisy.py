"""Losses whose expected gradients are known: linear ones with noise that they share in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer
from moo_balance.engine import Engine
from moo_balance.weighting import State, Statistics
from moo_balance.weighting.base import GramianWeighting

NAMES = ("a", "b", "c")
SIZE = 6
MEANS = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

Batch = dict[str, Tensor]
Present = Callable[[int], Sequence[str]]


@dataclass(frozen=True)
class Recording(GramianWeighting):
    """Equal weights; takes the Gramian of independent batches as it is, or any."""

    uses_independent_batches: bool = True

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        return {"weights": torch.full_like(statistics.losses, 1.0 / len(statistics.names))}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]


@dataclass
class NoisyLosses:
    """Draws batches. Each loss has the expected gradient MEANS[k].

    Args:
        seed: Another one for each rank.
        noise: Its standard deviation in each coordinate; the half of it is common to all losses.
    """

    seed: int = 0
    noise: float = 1.0
    dtype: torch.dtype = torch.float64
    params: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        sizes = (2, SIZE - 2)
        self.params = [nn.Parameter(torch.zeros(n, dtype=self.dtype)) for n in sizes]

    def rows(self) -> Tensor:
        """The gradients [K, P] of one batch."""
        draw = torch.randn(4, SIZE, generator=self.generator, dtype=torch.float64)
        return MEANS + self.noise * (draw[:3] + draw[3]) / 2**0.5

    def batch(self, names: Sequence[str] = NAMES) -> Batch:
        whole = torch.cat(tuple(self.params))
        rows = self.rows().to(self.dtype)
        return {name: whole @ rows[NAMES.index(name)] for name in names}

    def optimizer(self, engine: Engine | None = None, **arguments: object) -> BalancedOptimizer:
        sgd = torch.optim.SGD(self.params, lr=0.0)
        weighting = Recording(engine is None)
        return BalancedOptimizer(sgd, weighting, engine=engine, loss_names=NAMES, **arguments)


def gramian_of_step(
    optimizer: BalancedOptimizer, losses: NoisyLosses, window: int, present: Present
) -> Tensor:
    """The Gramian [K, K] of a window, in the order of NAMES."""
    optimizer.zero_grad()
    for number in range(window - 1):
        with optimizer.accumulate():
            optimizer.backward(losses.batch(present(number)))
    optimizer.backward(losses.batch(present(window - 1)))
    metrics = optimizer.metrics
    assert metrics.gramian is not None
    order = [metrics.names.index(name) for name in NAMES]
    return metrics.gramian[order][:, order].double()


def draw_gramians(
    losses: NoisyLosses,
    optimizer: BalancedOptimizer,
    count: int,
    window: int,
    present: Present = lambda number: NAMES,
) -> Tensor:
    """Gramians of many steps, shape [count, K, K]."""
    return torch.stack([gramian_of_step(optimizer, losses, window, present) for _ in range(count)])


def deviation(gramians: Tensor, expected: Tensor) -> float:
    """The largest deviation of the mean from what is expected, in standard errors."""
    errors = gramians.std(0) / len(gramians) ** 0.5
    return float(((gramians.mean(0) - expected).abs() / errors).max())


def expected_gramian(window: int, present: Present = lambda number: NAMES) -> Tensor:
    """Inner products of the expected gradients of a window."""
    counts = [sum(name in present(k) for k in range(window)) for name in NAMES]
    sums = MEANS * torch.tensor(counts, dtype=torch.float64)[:, None]
    return sums @ sums.T
