"""What the stateful weightings of TorchJD keep, as tensors [K] or [K, K] outside of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.weighting import State
from moo_balance.weighting._arguments import constant_state
from moo_balance.weighting.base import state_dtype


class StateKeeper(ABC):
    """Reads and writes the state of one module; between two calls the module has none.

    Attributes:
        module: The stateful module.
        prefix: What its entries are called.
    """

    def __init__(self, module: Any, prefix: str) -> None:
        self.module, self.prefix = module, prefix

    @abstractmethod
    def init(self, count: int, device: torch.device) -> State:
        """The state before the first call."""

    @abstractmethod
    def write(self, state: State, gramian: Tensor, position: Tensor) -> None:
        """Set the module to a state, for a Gramian of losses at these declared positions."""

    @abstractmethod
    def read(self) -> State:
        """The state after a call."""

    def reset(self) -> None:
        """Leave the module as it was built."""
        self.module.reset()


class _GradVac(StateKeeper):
    def init(self, count: int, device: torch.device) -> State:
        zeros = torch.zeros(count, count, dtype=state_dtype(device), device=device)
        return {f"{self.prefix}phi": zeros}

    def write(self, state: State, gramian: Tensor, position: Tensor) -> None:
        # Written to in place.
        self.module._phi_t = state[f"{self.prefix}phi"].to(gramian.dtype, copy=True)
        self.module._state_key = (len(gramian), gramian.dtype)

    def read(self) -> State:
        return {f"{self.prefix}phi": self.module._phi_t.to(torch.float64)}


class _PCD(StateKeeper):
    def init(self, count: int, device: torch.device) -> State:
        return {
            f"{self.prefix}squares": constant_state(0.0, count, device),
            f"{self.prefix}calls": torch.zeros((), dtype=torch.int64, device=device),
        }

    def write(self, state: State, gramian: Tensor, position: Tensor) -> None:
        self.module._sq_norm_ema = state[f"{self.prefix}squares"].to(torch.float64)
        self.module._n_steps = state[f"{self.prefix}calls"]
        self.module._state_key = len(gramian)

    def read(self) -> State:
        return {
            f"{self.prefix}squares": self.module._sq_norm_ema,
            f"{self.prefix}calls": self.module._n_steps,
        }


class _NashMTL(StateKeeper):
    """The last solution, and when it was found; the problem for the solver is no state."""

    def __init__(self, module: Any, prefix: str) -> None:
        super().__init__(module, prefix)
        self.solved_for = 0  # losses

    def init(self, count: int, device: torch.device) -> State:
        return {
            f"{self.prefix}alpha": constant_state(1.0, count, device),
            f"{self.prefix}calls": torch.zeros((), dtype=torch.int64, device=device),
        }

    def write(self, state: State, gramian: Tensor, position: Tensor) -> None:
        module, count = self.module, len(gramian)
        if self.solved_for != count:
            module.n_tasks = count
            module.reset()
        module.prvs_alpha = state[f"{self.prefix}alpha"].to(torch.float64).numpy()
        module.step = float(state[f"{self.prefix}calls"])
        if self.solved_for != count and module.step:  # else it does so itself
            module._init_optim_problem()
        self.solved_for = count

    def read(self) -> State:
        alpha = torch.as_tensor(self.module.prvs_alpha, dtype=torch.float64)
        calls = torch.tensor(int(self.module.step))
        return {f"{self.prefix}alpha": alpha, f"{self.prefix}calls": calls}

    def reset(self) -> None:
        """Keep the problem, which takes long to state; both are set before each call."""


class _CRMOGM(StateKeeper):
    """The moving average; what is averaged is noted, for losses that had no average before."""

    def __init__(self, module: Any, prefix: str) -> None:
        super().__init__(module, prefix)
        self.inner: Tensor | None = None
        self.hook: Any = None

    def init(self, count: int, device: torch.device) -> State:
        return {f"{self.prefix}lambda": constant_state(torch.nan, count, device)}

    def write(self, state: State, gramian: Tensor, position: Tensor) -> None:
        before = state[f"{self.prefix}lambda"].to(gramian.dtype)
        initial = self.module._initial_weights
        if initial is not None:
            before = torch.where(before.isnan(), initial.to(before)[position], before)
        self.module._lambda = before
        self.hook = self.module.weighting.register_forward_hook(self._replace_missing)

    def _replace_missing(self, module: Any, inputs: Any, output: Tensor) -> None:
        before = self.module._lambda
        self.module._lambda = torch.where(before.isnan(), output.to(before), before)

    def read(self) -> State:
        return {f"{self.prefix}lambda": self.module._lambda.to(torch.float64)}

    def reset(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        self.module.reset()


_KEEPERS: dict[str, type[StateKeeper]] = {
    "GradVacWeighting": _GradVac,
    "PCDWeighting": _PCD,
    "_NashMTLWeighting": _NashMTL,
    "CRMOGMWeighting": _CRMOGM,
}


def find_keepers(given: Any, module: Any) -> list[StateKeeper]:
    """One for each stateful part of a module, from the outside to the inside."""
    keepers: list[StateKeeper] = []
    for path, part in module.named_modules():
        found = [_KEEPERS[c.__name__] for c in type(part).__mro__ if c.__name__ in _KEEPERS]
        if found:
            keepers.append(found[0](part, f"{path}." if path else ""))
        elif hasattr(part, "reset"):
            raise BalanceValueError(
                "Parameter `weighting` should have no state, or one that is known here. Found "
                f"{type(given).__name__} with {type(part).__name__}, which has a `reset`. Write it "
                'as a method of your own: see the manual, "Writing a method".'
            )
    return keepers
