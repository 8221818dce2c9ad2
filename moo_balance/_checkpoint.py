"""The ``"balance"`` entry of a checkpoint: what it holds, and how it is validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moo_balance._record import Record
from moo_balance.errors import BalanceValueError
from moo_balance.weighting._identity import method_name
from moo_balance.weighting.base import State, Weighting

if TYPE_CHECKING:
    from moo_balance._balancer import Balancer

_FORMAT = 2


class Checkpoint(NamedTuple):
    """A validated entry."""

    names: tuple[str, ...] | None
    state: State | None
    steps: int
    skipped: int
    awaiting: tuple[str, ...] | None

    def restore(self, record: Record) -> None:
        """Replace what the record has committed, and drop what it has staged."""
        record.names, record.state = self.names, self.state
        record.steps, record.skipped, record.awaiting = self.steps, self.skipped, self.awaiting
        record.staged = record.window = None


def save_checkpoint(record: Record, weighting: Weighting) -> dict[str, Any]:
    """The committed state as tensors and primitives."""
    return {
        "format": _FORMAT,
        "weighting": method_name(weighting),
        "names": list(record.names or ()),
        "steps": record.steps,
        "skipped": record.skipped,
        "awaiting": None if record.awaiting is None else list(record.awaiting),
        "state": {key: value.clone() for key, value in (record.state or {}).items()},
    }


def validate_checkpoint(
    saved: Mapping[str, Any], record: Record, weighting: Weighting, device: torch.device
) -> Checkpoint:
    """Read an entry, or raise; nothing has changed either way.

    Args:
        saved: What :func:`save_checkpoint` gave.
        record: Of the optimizer that loads it.
        weighting: Its method.
        device: Where its state lives.
    """
    _check_origin(saved, record, weighting)
    names = tuple(saved["names"]) or record.names
    state = None
    if saved["names"] and saved["steps"]:
        state = _read_state(saved["state"], weighting.init(names or (), device), weighting)
    awaits = weighting.observes_step and saved["awaiting"] is not None
    awaiting = tuple(saved["awaiting"]) if awaits else None
    return Checkpoint(names, state, int(saved["steps"]), int(saved["skipped"]), awaiting)


def _check_origin(saved: Mapping[str, Any], record: Record, weighting: Weighting) -> None:
    """Refuse an entry of another version, another method, or other losses."""
    missing = save_checkpoint(record, weighting).keys() - saved.keys()
    if missing or saved["format"] != _FORMAT:
        raise BalanceValueError(
            f"Entry `balance` of the state dict should have format {_FORMAT}. Found "
            f"{saved.get('format')!r}{f' without `{min(missing)}`' if missing else ''}. It was "
            "written by another version of moo_balance; remove the entry to start afresh."
        )
    method = method_name(weighting)
    if saved["weighting"] != method:
        raise BalanceValueError(
            f"Entry `balance` of the state dict should come from {method}. Found "
            f'{saved["weighting"]}. Remove the entry (`state_dict.pop("balance")`) to continue '
            "with the wrapped optimizer's state only."
        )
    if saved["names"] and record.names is not None and set(record.names) != set(saved["names"]):
        raise BalanceValueError(
            f"Entry `balance` of the state dict should name the losses {list(record.names)}. "
            f"Found {list(saved['names'])}. Give the losses the names of the run that was saved."
        )


def _read_state(saved: Mapping[str, Tensor], initial: State, weighting: Weighting) -> State:
    shapes = {key: tuple(value.shape) for key, value in saved.items()}
    expected = {key: tuple(value.shape) for key, value in initial.items()}
    if shapes != expected:
        raise BalanceValueError(
            f"Entry `balance` of the state dict should hold {expected} for {weighting}. "
            f"Found {shapes}. It was saved with other settings."
        )
    return {key: saved[key].clone().to(value) for key, value in initial.items()}


class BalanceState:
    """A ``Stateful``: names, counters and state of the balance as one JSON text.

    ``torch.distributed.checkpoint`` reads a checkpoint into the tensors that its reader already
    holds, and a fresh optimizer does not know its losses yet; a text has no shape to match.
    Floating-point values survive JSON to the last bit.

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

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def state_dict(self) -> dict[str, Any]:
        """The committed state."""
        import json  # takes a tenth of the package's own import

        saved = self._balancer.save()
        saved["state"] = {key: value.tolist() for key, value in saved["state"].items()}
        return {"balance": json.dumps(saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, or raise as ``BalancedOptimizer.load_state_dict`` does."""
        import json

        saved = json.loads(state_dict["balance"])
        saved["state"] = {
            key: torch.tensor(value, dtype=torch.float64) for key, value in saved["state"].items()
        }
        self._balancer.validate(saved).restore(self._balancer.record)
