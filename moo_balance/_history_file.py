"""The file of a history: the tensors of its steps, stacked where steps are alike.

    {"format": "moo_balance.History", "version": 1, "maxlen": …, "appended": …, "groups": […]}

A group has the names of its losses, the positions of its steps, and for each kind of value that
these have a tensor whose first dimension is the step.
"""

from __future__ import annotations

import io
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moo_balance._step_metrics import StepMetrics
from moo_balance.errors import BalanceValueError

_HEADER = {"format": "moo_balance.History", "version": 1}

# Each kind of value, and how many dimensions of the number of losses it has.
_DIMENSIONS = {
    "gramian": 2,
    "_losses": 1,
    "_weights": 1,
    "_coefficients": 1,
    "_satisfied": 1,
    "projected": 0,
}


def save(path: str | os.PathLike[str], steps: deque[StepMetrics], appended: int) -> None:
    """Write the steps; `appended` counts also those that the history has dropped."""
    groups: dict[Any, list[int]] = {}
    listed = list(steps)
    for position, step in enumerate(listed):
        groups.setdefault(_layout(step), []).append(position)
    content = {
        **_HEADER,
        "maxlen": steps.maxlen,
        "appended": appended,
        "groups": [_stack(listed, positions) for positions in groups.values()],
    }
    with Path(path).open("wb") as file:  # torch.save of a path raises no OSError
        torch.save(content, file)


def load(path: str | os.PathLike[str]) -> tuple[deque[StepMetrics], int]:
    """The steps, in a deque with the bound that they had, and how many were appended."""
    data = Path(path).read_bytes()  # so that an OSError of torch.load is one of the content
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refuse(path, f"a file that torch.load refuses: {error}") from error
    try:
        return _unpack(content)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _refuse(path, f"another content: {error}") from error


def _values(step: StepMetrics) -> dict[str, Tensor]:
    values = {kind: getattr(step, kind) for kind in _DIMENSIONS}
    return {kind: value for kind, value in values.items() if value is not None}


def _layout(step: StepMetrics) -> Any:
    """Equal for steps whose values can be stacked without a change."""
    kinds = tuple((kind, v.dtype, v.device) for kind, v in _values(step).items())
    return step.names, kinds


def _stack(steps: list[StepMetrics], positions: list[int]) -> dict[str, Any]:
    rows = [_values(steps[position]) for position in positions]
    return {
        "names": list(steps[positions[0]].names),
        "positions": torch.tensor(positions),
        "values": {kind: torch.stack([row[kind] for row in rows]).cpu() for kind in rows[0]},
    }


def _unpack(content: Any) -> tuple[deque[StepMetrics], int]:
    if {key: content[key] for key in _HEADER} != _HEADER:
        raise ValueError(f"format and version should be {_HEADER}")
    by_position: dict[int, StepMetrics] = {}
    for group in content["groups"]:
        steps = _unstack(group["names"], group["positions"].tolist(), group["values"])
        if by_position.keys() & steps.keys():
            raise ValueError("a step occurs twice")
        by_position.update(steps)
    count, maxlen, appended = len(by_position), content["maxlen"], content["appended"]
    if by_position.keys() != set(range(count)):
        raise ValueError("a step is missing")
    if maxlen is not None and (type(maxlen) is not int or maxlen < max(count, 1)):
        raise ValueError(f"maxlen is {maxlen!r}, with {count} steps")
    if type(appended) is not int or appended < count:
        raise ValueError(f"appended is {appended!r}, with {count} steps")
    return deque((by_position[position] for position in range(count)), maxlen), appended


def _unstack(
    names: list[str], positions: list[int], values: dict[str, Tensor]
) -> dict[int, StepMetrics]:
    """The steps of a group by position."""
    if type(names) is not list or any(type(name) is not str for name in names):
        raise ValueError(f"names are {names!r}")
    if len(set(names)) < len(names) or len(set(positions)) < len(positions):
        raise ValueError("a name or a step occurs twice")
    for kind, value in values.items():
        shape = (len(positions), *[len(names)] * _DIMENSIONS[kind])
        if value.shape != shape:
            raise ValueError(f"{kind} has the shape {tuple(value.shape)}, not {shape}")
        if not (value.dtype == torch.bool if kind == "_satisfied" else value.is_floating_point()):
            raise ValueError(f"{kind} has the dtype {value.dtype}")
    rows = {kind: value.unbind() for kind, value in values.items()}
    return {
        position: StepMetrics(tuple(names), **{kind: row[i] for kind, row in rows.items()})
        for i, position in enumerate(positions)
    }


def _refuse(path: str | os.PathLike[str], found: str) -> BalanceValueError:
    return BalanceValueError(
        f"Parameter `path` should name a file that History.save has written. Found {found} "
        f"({os.fspath(path)}). Save the history again, or name another file."
    )
