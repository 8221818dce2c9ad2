"""One step of the wrapped optimizer for each loss, with a state of its own, averaged.

Used only with a method whose ``steps_apart`` is True. In place of

    state, theta = step(state, theta, gradient)

each loss takes the step that it would take alone, from the same parameters, and the parameters go
to the weighted mean of where these steps lead:

    state_k, theta_k = step(state_k, theta, gradient_k)        theta = sum of share_k * theta_k
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moo_balance._rows import RowState, SeparateRows
from moo_balance.engine.distributed import is_whole
from moo_balance.functional._checks import at_least_float32


@torch.no_grad()
def take_separate_steps(optimizer: Optimizer, separate: SeparateRows, state: RowState) -> RowState:
    """Step for each loss, and return the states that follow.

    Args:
        optimizer: The wrapped optimizer. Its own state stays as it is; a copy of it is what the
            state of a loss starts from.
        separate: The gradients.
        state: Of the optimizer, by parameter and loss. It does not change: a step that fails can be
            taken again.
    """
    reached = _gradients_by_param(separate, state)
    shares = _relative_shares(reached, separate)
    following = {param: dict(by_loss) for param, by_loss in state.items()}
    moved: dict[Tensor, Tensor] = {}
    with _borrow(optimizer, list(reached)) as (start, own, options):
        for k, name in enumerate(separate.names):
            mine = {param: rows[k] for param, rows in reached.items() if k in rows}
            states = {}
            for param in mine:
                known = following.get(param, {}).get(name)
                states[param] = _copy(own.get(param, {}) if known is None else known)
            _set_options(optimizer, options)  # some optimizers count steps in it
            _take_step(optimizer, mine, states)
            for param in mine:
                following.setdefault(param, {})[name] = dict(optimizer.state.pop(param, {}))
                _add(moved, param, start[param], shares[param].get(k))
                param.copy_(start[param])
    for param, target in moved.items():
        param.copy_(target)
    return following


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else deepcopy(value)
        for key, value in state.items()
    }


def _set_options(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups of an optimizer the options that they had."""
    for group, before in zip(optimizer.param_groups, options, strict=True):
        group.clear()
        group.update(before)


def _add(moved: dict[Tensor, Tensor], param: Tensor, start: Tensor, share: Tensor | None) -> None:
    """Add a share of a step to where a parameter goes; None for the only one."""
    if share is None:
        moved[param] = param.clone()
        return
    before = moved.get(param)
    origin = at_least_float32(start)
    step = (at_least_float32(param) - origin) * share.to(origin.device, origin.dtype)
    moved[param] = (origin if before is None else before) + step


def _gradients_by_param(separate: SeparateRows, state: RowState) -> dict[Tensor, dict[int, Tensor]]:
    """By parameter, the gradients of the losses that reach it, by position.

    A compiled model gives zeros in place of no gradient. They do not count before a loss has
    reached the parameter, as long as another one does.
    """
    reached = {}
    for p, param in enumerate(separate.params):
        rows = {k: g for k, row in enumerate(separate.rows) if (g := row[p]) is not None}
        known = state.get(param, {})
        new = [k for k in rows if separate.names[k] not in known]
        if new and len(rows) > 1 and is_whole(param):
            zero = [k for k in new if not bool(rows[k].any())]
            if len(zero) < len(rows):
                rows = {k: gradient for k, gradient in rows.items() if k not in zero}
        if rows:
            reached[param] = rows
    return reached


def _relative_shares(
    reached: Mapping[Tensor, Mapping[int, Tensor]], separate: SeparateRows
) -> dict[Tensor, dict[int, Tensor]]:
    """Shares among the losses that reach a parameter; empty for a single one."""
    each = separate.shares.unbind()
    relative: dict[Tensor, dict[int, Tensor]] = {}
    for param, rows in reached.items():
        relative[param] = {}
        if len(rows) > 1:
            shares = torch.stack([each[k] for k in rows])
            total = shares.sum()  # 0 in a step that is masked on the device
            shares = torch.where(total > 0, shares / total, 1.0 / len(shares))
            relative[param] = dict(zip(rows, shares.unbind(), strict=True))
    return relative


def _take_step(
    optimizer: Optimizer,
    gradients: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """The step of one loss, with its own state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = gradients.get(param)
    for param, known in states.items():
        if known:
            optimizer.state[param] = dict(known)
    optimizer.step()


@contextmanager
def _borrow(
    optimizer: Optimizer, params: Sequence[Tensor]
) -> Iterator[tuple[dict[Tensor, Tensor], dict[Tensor, Any], list[dict[str, Any]]]]:
    """Where parameters start from, the optimizer's own state and the options of its groups.

    Gradients and the state are put back at the end; after an error parameters and options are, too.
    """
    options = [dict(group) for group in optimizer.param_groups]
    everything = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in everything]
    own = {param: optimizer.state.pop(param) for param in params if param in optimizer.state}
    start = {param: param.detach().clone() for param in params}
    try:
        yield start, own, options
    except BaseException:
        for param, value in start.items():
            param.copy_(value)
        _set_options(optimizer, options)
        raise
    finally:
        for param, grad in zip(everything, grads, strict=True):
            param.grad = grad
        for param in params:
            optimizer.state.pop(param, None)
        optimizer.state.update(own)
