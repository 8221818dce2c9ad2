"""Calls that are wrong whatever came before: a BalanceError, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from moo_balance import BalancedOptimizer

WrongCall = Callable[[BalancedOptimizer, Mapping[str, Tensor]], Any]

WRONG_CALLS: dict[str, WrongCall] = {
    "no losses": lambda optimizer, losses: optimizer.backward({}),
    "no mapping": lambda optimizer, losses: optimizer.backward([*losses.values()]),
    "None": lambda optimizer, losses: optimizer.backward(None),
    "a closure without losses": lambda optimizer, losses: optimizer.backward(lambda: None),
    "a number": lambda optimizer, losses: optimizer.backward({**losses, "a": 1.0}),
    "a detached loss": lambda optimizer, losses: optimizer.backward(
        {**losses, "a": torch.tensor(1.0)}
    ),
    "a vector": lambda optimizer, losses: optimizer.backward(
        {name: torch.stack([loss, loss]) for name, loss in losses.items()}
    ),
    "a complex loss": lambda optimizer, losses: optimizer.backward(
        {name: loss * 1j for name, loss in losses.items()}
    ),
    "no name": lambda optimizer, losses: optimizer.backward({**losses, "": losses["a"]}),
    "a name that is no string": lambda optimizer, losses: optimizer.backward(
        {**losses, 1: losses["a"]}
    ),
    "features without a graph": lambda optimizer, losses: optimizer.backward(
        losses, features=torch.ones(3)
    ),
    "no features": lambda optimizer, losses: optimizer.backward(losses, features=()),
    "a combined loss of numbers": lambda optimizer, losses: optimizer.combined_loss({"a": 1.0}),
    "an observed mapping of numbers, or too early": lambda optimizer, losses: _observe(
        optimizer, {"a": 1.0}
    ),
    "a combined loss in a window": lambda optimizer, losses: _combine_in_a_window(
        optimizer, losses
    ),
}


def _observe(optimizer: BalancedOptimizer, losses: Mapping[str, Any]) -> None:
    if optimizer.state_dict()["balance"]["awaiting"] is None:
        optimizer.backward(losses)
    else:
        optimizer.observe(losses)


def _combine_in_a_window(optimizer: BalancedOptimizer, losses: Mapping[str, Tensor]) -> None:
    with optimizer.accumulate():
        optimizer.combined_loss(losses)


Change = Callable[[dict[str, Any]], dict[str, Any]]

MALFORMED: dict[str, Change] = {
    "no mapping": lambda balance: 7,
    "another format": lambda balance: {**balance, "format": 99},
    "another method": lambda balance: {**balance, "weighting": "Nothing"},
    "names that are a number": lambda balance: {**balance, "names": 7},
    "names that are numbers": lambda balance: {**balance, "names": [1, 2, 3]},
    "an unknown loss that is awaited": lambda balance: {**balance, "awaiting": ["zzz"]},
    "awaited losses that are a number": lambda balance: {**balance, "awaiting": 3},
    "steps that are a text": lambda balance: {**balance, "steps": "many"},
    "steps below zero": lambda balance: {**balance, "steps": -1},
    "skipped steps below zero": lambda balance: {**balance, "skipped": -3},
    "steps that are missing": lambda balance: {k: v for k, v in balance.items() if k != "steps"},
    "a state that is a number": lambda balance: {**balance, "steps": 3, "state": 3.0},
}
"""Changes to a saved ``"balance"`` entry that make it malformed."""


def malformed(optimizer: BalancedOptimizer, change: str) -> dict[str, Any]:
    """A state dict whose wrapped part also differs, so that a partial load would be seen."""
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 123.0
    saved["balance"] = MALFORMED[change](saved["balance"])
    if not saved.get("balance"):
        raise AssertionError("the entry should be there")
    return saved
