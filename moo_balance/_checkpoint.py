"""The ``"balance"`` entry of a checkpoint: what it holds, and how it is validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moo_balance._nonfinite import names_of
from moo_balance._record import Record
from moo_balance._row_checkpoint import (
    fill_outline,
    find_keeping,
    outline_rows,
    read_rows,
    save_rows,
    spread_rows,
)
from moo_balance._rows import RowState
from moo_balance._torch_internals import as_plain
from moo_balance._warnings import warn
from moo_balance.errors import BalanceValueError
from moo_balance.weighting._identity import method_name, settings
from moo_balance.weighting.base import State, Weighting

if TYPE_CHECKING:
    from moo_balance._balancer import Balancer

_FORMAT = 2
_REMEDY = (
    'Remove the entry (`state_dict.pop("balance")`) to continue with the state of the wrapped '
    "optimizer only."
)
_REQUIRED = ("weighting", "names", "steps", "skipped", "awaiting", "state")


class Checkpoint(NamedTuple):
    """A validated entry."""

    names: tuple[str, ...] | None
    state: State | None
    steps: int
    skipped: int
    awaiting: tuple[str, ...] | None
    satisfied: Tensor | None
    rows: RowState
    rows_method: Weighting

    def restore(self, record: Record) -> None:
        """Replace what the record has committed, and drop the step in progress."""
        record.drop_step()
        record.names, record.state = self.names, self.state
        record.rows, record.rows_method = self.rows, self.rows_method
        record.steps, record.skipped, record.awaiting = self.steps, self.skipped, self.awaiting
        record.satisfied, record.loaded_at = self.satisfied, self.steps


def save_checkpoint(
    record: Record, weighting: Weighting, params: Sequence[Tensor]
) -> dict[str, Any]:
    """The committed state as tensors and primitives.

    Args:
        record: What is committed.
        weighting: The method.
        params: All parameters of the wrapped optimizer.
    """
    # Present even if empty, to tell it from one that was lost.
    holds = find_keeping(weighting, record.steps) is not None
    rows = {"rows": save_rows(record.rows, params)} if holds else {}
    return {
        "format": _FORMAT,
        "weighting": method_name(weighting),
        "settings": settings(weighting),
        "names": list(record.names or ()),
        "steps": record.steps,
        "skipped": record.skipped,
        "awaiting": None if record.awaiting is None else list(record.awaiting),
        "satisfied": list(names_of(record.names or (), record.satisfied)),
        "state": {key: value.clone() for key, value in (record.state or {}).items()},
        **rows,
    }


def validate_checkpoint(
    saved: object,
    record: Record,
    weighting: Weighting,
    params: Sequence[Tensor],
    device: torch.device,
) -> Checkpoint:
    """Read an entry, or raise; nothing has changed either way.

    Args:
        saved: What :func:`save_checkpoint` gave; a state may hold nested lists in place of tensors.
        record: Of the optimizer that loads it.
        weighting: Its method.
        params: All parameters of the wrapped optimizer.
        device: Where its state lives.
    """
    entry = _check_origin(saved, weighting)
    names, steps = _read_names(entry, "names"), _read_count(entry, "steps")
    if names and record.names is not None and set(record.names) != set(names):
        raise BalanceValueError(
            f"Entry `balance` of the state dict should name the losses {list(record.names)}. "
            f"Found {list(names)}. Give the losses the names of the run that was saved. {_REMEDY}"
        )
    if steps and not names:
        raise _bad_entry("names", f"name the losses of {steps} steps", "none")
    awaiting = None if entry["awaiting"] is None else _read_names(entry, "awaiting")
    unknown = [name for name in awaiting or () if name not in names]
    if unknown or awaiting == ():
        raise _bad_entry("awaiting", f"name some of the losses {list(names)}", unknown or "none")
    differing = _compare_settings(entry, weighting)
    state = _read_state(entry["state"], names if steps else (), weighting, device, differing)
    last = weighting.needs(max(steps - 1, 0))  # in the last step that was taken
    rows: RowState = {}
    method = find_keeping(weighting, steps)
    if method is not None and "rows" not in entry:
        raise _bad_entry("rows", f"hold what {type(method).__name__} keeps of gradients", "none")
    if method is not None:
        rows = read_rows(entry["rows"], names, params, method.keeps)
    skipped = _read_count(entry, "skipped")
    if differing:
        warn(
            f"{method_name(weighting)} continues with other arguments than the checkpoint was "
            f"saved with: {', '.join(differing)}."
        )
    # A method without a second evaluation waits for nothing.
    awaiting = awaiting if weighting.observes_step else None
    satisfied = _read_satisfied(entry, names, device)
    return Checkpoint(
        names=names or record.names,
        state=state if steps else None,
        steps=steps,
        skipped=skipped,
        awaiting=awaiting,
        satisfied=satisfied,
        rows=rows,
        rows_method=last.method,
    )


def _check_origin(saved: object, weighting: Weighting) -> Mapping[str, Any]:
    """Refuse an entry of another version, or of another method."""
    if not isinstance(saved, Mapping):
        raise BalanceValueError(
            "Entry `balance` of the state dict should be a mapping. Found "
            f"{type(saved).__name__}. {_REMEDY}"
        )
    if "format" in saved and (type(saved["format"]) is not int or saved["format"] != _FORMAT):
        raise BalanceValueError(
            f"Entry `balance` of the state dict should have format {_FORMAT}. Found "
            f"{saved['format']!r}: it was written by another version of moo_balance, or is "
            f"damaged. {_REMEDY}"
        )
    missing = [key for key in ("format", *_REQUIRED) if key not in saved]
    if missing:
        raise BalanceValueError(
            "Entry `balance` of the state dict should be as `state_dict` gave it. Found it "
            f"without `{missing[0]}`. {_REMEDY}"
        )
    method = method_name(weighting)
    # `!=` of a tensor or an array has no truth value.
    if not isinstance(saved["weighting"], str) or saved["weighting"] != method:
        raise BalanceValueError(
            f"Entry `balance` of the state dict should come from {method}. Found "
            f"{saved['weighting']}. {_REMEDY}"
        )
    return saved


def _bad_entry(key: str, should: str, found: object) -> BalanceValueError:
    return BalanceValueError(
        f"`{key}` in entry `balance` of the state dict should {should}. Found {found}. {_REMEDY}"
    )


def _read_count(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if type(value) is not int or value < 0:
        raise _bad_entry(key, "be a whole number of steps, at least 0", repr(value))
    return value


def _read_names(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = entry[key]
    if (
        not isinstance(value, (list, tuple))
        or not all(isinstance(name, str) and name for name in value)
        or len(set(value)) != len(value)
    ):
        raise _bad_entry(key, "be a list of distinct, non-empty strings", repr(value))
    return tuple(value)


def _read_satisfied(
    entry: Mapping[str, Any], names: Sequence[str], device: torch.device
) -> Tensor | None:
    """Which losses counted as satisfied; None for none."""
    satisfied = _read_names(entry, "satisfied") if "satisfied" in entry else ()
    unknown = [name for name in satisfied if name not in names]
    if unknown:
        raise _bad_entry("satisfied", f"name some of the losses {list(names)}", unknown)
    if not satisfied:
        return None
    return torch.tensor([name in satisfied for name in names], device=device)


def _read_state(
    saved: object,
    names: tuple[str, ...],
    weighting: Weighting,
    device: torch.device,
    differing: list[str],
) -> State:
    """The state of these losses on the device; it is empty for no losses."""
    if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
        raise _bad_entry("state", "be a mapping from strings to tensors", type(saved).__name__)
    initial = weighting.init(names, device) if names else {}
    state = {key: _read_tensor(key, value) for key, value in saved.items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in initial.items()}
    if shapes != expected:
        wrong = [k for k in {**expected, **shapes} if shapes.get(k) != expected.get(k)]
        should, found = ({k: each[k] for k in wrong if k in each} for each in (expected, shapes))
        text = f" ({', '.join(differing)})" if differing else ""
        raise BalanceValueError(
            f"`state` in entry `balance` of the state dict should hold {should or 'nothing'} for "
            f"{weighting}. Found {found or 'nothing'}: it was saved with other settings{text}, or "
            f"is damaged. {_REMEDY}"
        )
    for key, value in state.items():
        _check_values(key, value, initial[key].cpu())
    return {key: _convert(saved[key], value) for key, value in initial.items()}


def _read_tensor(key: str, value: object) -> Tensor:
    """A tensor on the host, from a tensor or from nested lists of numbers."""
    if isinstance(value, (list, bool, int, float)):
        try:
            numbers = torch.tensor(value, device="cpu")
            # Inferred in the default dtype, which may be narrower.
            dtype = torch.float64 if numbers.is_floating_point() else numbers.dtype
            return torch.tensor(value, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise _bad_entry(f"state[{key!r}]", "hold numbers", "something else") from None
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise _bad_entry(f"state[{key!r}]", "be a dense tensor with values", type(value).__name__)
    return as_plain(value).detach().cpu()


def _check_values(key: str, value: Tensor, initial: Tensor) -> None:
    """Refuse another kind of numbers, and what is not finite where the method began finite."""
    if not torch.can_cast(value.dtype, initial.dtype):
        raise _bad_entry(f"state[{key!r}]", f"hold {initial.dtype}", value.dtype)
    initial = initial.to(value.dtype) if value.is_floating_point() else initial
    unchanged = (value == initial) | (value.isnan() & initial.isnan())
    if not bool((value.isfinite() | unchanged).all()):
        raise _bad_entry(f"state[{key!r}]", "be finite", value.tolist())


def _convert(saved: object, like: Tensor) -> Tensor:
    """A copy with dtype and device of `like`, exact where the numbers were written as lists."""
    if isinstance(saved, Tensor):
        return as_plain(saved).detach().clone().to(like)
    return torch.tensor(saved, dtype=like.dtype, device="cpu").to(like)


def _compare_settings(entry: Mapping[str, Any], weighting: Weighting) -> list[str]:
    """The hyper-parameters that differ from those of the saved run, if it says them."""
    saved = entry.get("settings", {})
    if not isinstance(saved, Mapping) or not all(
        isinstance(text, str) for pair in saved.items() for text in pair
    ):
        raise _bad_entry("settings", "be a mapping from strings to strings", repr(saved))
    return [
        f"{key}={own} (saved with {saved[key]})"
        for key, own in settings(weighting).items()
        if key in saved and own != saved[key]
    ]


class BalanceState:
    """A ``Stateful``: names, counters and state of the balance as one JSON text.

    ``torch.distributed.checkpoint`` reads a checkpoint into the tensors that its reader already
    holds, and a fresh optimizer does not know its losses yet; a text has no shape to match.
    Numbers survive JSON to the last bit, and are read in the dtype of the method's state.

    A method that keeps something as large as the gradients (``MoCo``) has it as tensors in a second
    entry, ``"rows"``. To read that into a new optimizer it needs its ``loss_names=``.

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
        rows = self._save_rows(saved)
        return {"balance": json.dumps(saved, sort_keys=True), **rows}

    def _save_rows(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What is kept of rows, as tensors; the text gets an outline of it."""
        balancer = self._balancer
        record, params = balancer.record, balancer.all_params
        if "rows" in saved:
            saved["rows"] = outline_rows(record.rows, params)
        spread = spread_rows(record.rows, params, record.names or (), balancer.weighting)
        return {"rows": spread} if spread else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, or raise as ``BalancedOptimizer.load_state_dict`` does."""
        import json

        text = state_dict.get("balance") if isinstance(state_dict, Mapping) else None
        try:
            saved = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            saved = None
        if not isinstance(saved, dict):
            raise BalanceValueError(
                "Parameter `state_dict` should hold the JSON text that `balance_state.state_dict` "
                f"gave, as entry `balance`. Found {text!r:.80}. Load that checkpoint again."
            )
        if "rows" in saved:
            saved["rows"] = fill_outline(saved["rows"], state_dict.get("rows"))
        self._balancer.validate(saved).restore(self._balancer.record)
