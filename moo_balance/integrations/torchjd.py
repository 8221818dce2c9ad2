"""TorchJD: its weightings, and the aggregators that amount to one, as methods of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moo_balance.integrations._torchjd_solver import Batch, Solver, copy_fresh, explain
from moo_balance.weighting import GramianWeighting, State, Statistics, step_generator
from moo_balance.weighting._arguments import check_choice, check_whole
from moo_balance.weighting._identity import describe


@dataclass(frozen=True, eq=False)
class TorchJD(GramianWeighting):
    """A weighting or an aggregator of TorchJD, inside of ``BalancedOptimizer``.

    What it gets from TorchJD are K weights, computed from the Gramian. Everything else is that of
    this package: absent losses, windows, ranks, loss scalers, skipped steps, checkpoints, any
    engine, ``every``. So what looks at single coordinates of gradients (GradDrop, TrimmedMean,
    ExcessMTL) or takes two batches (MoDo, SDMGrad) is refused; this package has methods of its own
    for these, and for most of the others.

    A weighting that takes a Jacobian but does not depend on the choice of coordinates (ConFIG,
    NashMTL, the constant ones) gets a square root of the Gramian, [K, K], in its place. What it
    returns is the combination of K rows with the same inner products.

    The state of PCD, GradVac, NashMTL and CRMOGM is kept outside of them, as tensors of the
    balance: it is committed by a step, saved, and follows the present losses. Random numbers are
    drawn from `seed` and the number of the step, not from the global stream. Losses are passed on
    in the order in which they were first declared, whatever the order of the dict: the first one
    is PCD's primary objective, without which all weights are 0, and vectors of preferences have one
    entry for each. Where such a vector has entries for absent losses, these pass for gradients of
    zero.

    TorchJD computes on the host, in the dtype of the Gramian.

    Coefficients: TorchJD's weights.

    Args:
        weighting: An instance of a class of ``torchjd.aggregation``. It is copied, without the
            state that it may have; of an aggregator, the weighting inside of it.
        takes: What a class of your own takes, ``"gramian"`` or, if it does not depend on the
            choice of coordinates, ``"jacobian"``. Default None: as TorchJD's annotations say.
        every: Solve each n-th step only, and keep the weights in between. Default 1.
        seed: Seed of random draws, a whole number ≥ 0. Default 0.

    Raises:
        BalanceError: TorchJD is not installed.
        BalanceValueError: `weighting` cannot be computed from a Gramian, or keeps a state that is
            not known here.

    Example:
        >>> import torch
        >>> from torchjd.aggregation import MGDAWeighting
        >>> from moo_balance import BalancedOptimizer
        >>> from moo_balance.integrations.torchjd import TorchJD
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), TorchJD(MGDAWeighting()))
        >>> _ = optimizer.backward({"a": w[0], "b": w[1]})
        >>> w.grad
        tensor([0.5000, 0.5000])
    """

    weighting: Any
    takes: Literal["gramian", "jacobian"] | None = None
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "takes", (None, "gramian", "jacobian"))
        check_whole(self, "every", 1)
        check_whole(self, "seed", 0)
        solver = Solver(copy_fresh(self.weighting), self.takes)
        object.__setattr__(self, "weighting", solver.module)
        object.__setattr__(self, "_solver", solver)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchJD) and describe(self) == describe(other)

    def __hash__(self) -> int:
        return hash(describe(self))

    def init(self, names: Sequence[str], device: torch.device) -> State:
        solver: Solver = self._solver  # type: ignore[attr-defined]
        state = {
            "position": torch.arange(len(names), device=device),
            "declared": torch.tensor(len(names), device=device),
        }
        for keeper in solver.keepers:
            state.update(keeper.init(len(names), device))
        return {**state, **super().init(names, device)}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        solver: Solver = self._solver  # type: ignore[attr-defined]
        host = {key: value.cpu() for key, value in state.items()}
        position, declared = host.pop("position"), int(host.pop("declared"))
        # As they were declared, whatever the order of the dict.
        order = position.argsort()
        if solver.has_primary and int(position[order[0]]) > 0:
            return {"weights": torch.zeros_like(gramian[0])}
        batch = Batch(gramian.detach().cpu()[order][:, order], position[order], declared)
        kept = {key: _select(value, order) for key, value in host.items()}
        seed = step_generator(self.seed, statistics.step).initial_seed()
        try:
            weights, kept = solver(batch, kept, seed)
        except (ValueError, RuntimeError, IndexError) as error:
            raise explain(error, solver.name, statistics.names, position) from error
        back = order.argsort()
        result = {key: _select(value, back).to(state[key]) for key, value in kept.items()}
        return {**result, "weights": weights[back].to(gramian)}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"].to(statistics.losses.dtype)


def _select(value: Tensor, order: Tensor) -> Tensor:
    """The entries of a state in another order, along each dimension of K."""
    for dim in range(value.ndim):
        value = value.index_select(dim, order)
    return value
