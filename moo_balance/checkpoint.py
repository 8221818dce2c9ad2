"""The balance by itself, in the form that ``torch.distributed.checkpoint`` takes."""

from __future__ import annotations

import json
from typing import Any

import torch

from moo_balance.ledger import Ledger


class BalanceState:
    """A ``Stateful``: names, counters and state of the balance as one JSON text.

    Text, because a checkpoint is read into what its reader already holds, and a fresh optimizer
    does not know its losses yet. Floating-point numbers survive JSON to the last bit.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, FAMO
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), FAMO())
        >>> _ = optimizer.step(lambda: {"a": w[0] ** 2, "b": w[1] ** 2})
        >>> saved = optimizer.balance_state.state_dict()
        >>> other = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), FAMO())
        >>> other.balance_state.load_state_dict(saved)
        >>> other.balance_state.state_dict() == saved
        True
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """The committed state."""
        saved = self._ledger.state_dict()
        saved["state"] = {key: value.tolist() for key, value in saved["state"].items()}
        return {"balance": json.dumps(saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, or raise as ``BalancedOptimizer.load_state_dict`` does."""
        saved = json.loads(state_dict["balance"])
        saved["state"] = {
            key: torch.tensor(value, dtype=torch.float64) for key, value in saved["state"].items()
        }
        self._ledger.load_state_dict(saved, self._device)
