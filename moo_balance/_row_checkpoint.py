"""What is kept of rows in a checkpoint: by the parameter's position, the loss and a name.

Positions count the parameters of the wrapped optimizer, group after group, as its own state dict
does. Nothing is copied, as what is kept is never written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moo_balance._rows import RowState
from moo_balance._torch_internals import as_plain
from moo_balance.engine.distributed import is_sharded, local_part
from moo_balance.errors import BalanceValueError
from moo_balance.weighting.base import Weighting
from moo_balance.weighting.rows import RowWeighting

SavedRows: TypeAlias = dict[int, dict[str, dict[str, Tensor]]]


def find_keeping(weighting: Weighting, steps: int) -> RowWeighting | None:
    """The method that keeps something of rows after so many steps; None for none."""
    if not steps:
        return None
    method = weighting.needs(steps - 1).method  # `rows` is None between two refreshes
    if isinstance(method, RowWeighting) and (method.keeps or method.steps_apart):
        return method
    return None


def save_rows(rows: RowState, params: Sequence[Tensor]) -> SavedRows:
    """What is kept, by position."""
    return {k: dict(rows[param]) for k, param in enumerate(params) if param in rows}


def read_rows(saved: object, names: Sequence[str], params: Sequence[Tensor], key: str) -> RowState:
    """What was kept, for these parameters; an error if it does not fit them.

    Args:
        saved: What :func:`save_rows` gave.
        names: The losses.
        params: All parameters of the wrapped optimizer.
        key: What the method keeps; empty for states of the wrapped optimizer, which may hold
            anything.
    """
    read = _read if key else _read_entry
    rows: RowState = {}
    for position, by_loss in _items(saved, "rows"):
        if type(position) is not int or not 0 <= position < len(params):
            raise _misfit(f"positions below {len(params)}", f"{position!r}")
        param = params[position]
        rows[param] = {}
        for name, entries in _items(by_loss, f"rows[{position}]"):
            if name not in names:
                raise _misfit(f"entries for the losses {list(names)}", f"one for {name!r}")
            where = f"rows[{position}][{name!r}]"
            rows[param][name] = {
                entry: read(value, param, where) for entry, value in _items(entries, where)
            }
            if key and list(rows[param][name]) != [key]:
                raise _misfit(f"`{key}` at `{where}`", f"{list(rows[param][name])}")
    return rows


# ------------------------------------------------------------ torch.distributed.checkpoint


def spread_rows(
    rows: RowState, params: Sequence[Tensor], names: Sequence[str], weighting: Weighting
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What is kept under texts as keys, and zeros for every pair of parameter and loss without.

    ``torch.distributed.checkpoint`` reads into tensors that the reader holds already. So a new
    optimizer must have all that a checkpoint may hold, and a checkpoint all that it may have.
    """
    method = weighting.needs(0).rows
    if method is not None and method.steps_apart:  # whose entries a new optimizer does not know
        return {str(k): by_loss for k, by_loss in save_rows(rows, params).items()}
    keys = {key for by_loss in rows.values() for entries in by_loss.values() for key in entries}
    if not keys and method is not None and method.keeps:
        keys = {method.keeps}
    if not keys or not names:
        return {}
    return {
        str(k): {
            name: {**_zeros(keys, param), **rows.get(param, {}).get(name, {})} for name in names
        }
        for k, param in enumerate(params)
    }


def _zeros(keys: Iterable[str], param: Tensor) -> dict[str, Tensor]:
    dtype = torch.promote_types(param.dtype, torch.float32)
    return {key: torch.zeros_like(param, dtype=dtype, requires_grad=False) for key in keys}


def outline_rows(rows: RowState, params: Sequence[Tensor]) -> dict[str, dict[str, list[str]]]:
    """Which of them there are, without the tensors."""
    return {
        str(k): {name: list(entries) for name, entries in by_loss.items()}
        for k, by_loss in save_rows(rows, params).items()
    }


def fill_outline(outline: Any, tensors: Any) -> SavedRows:
    """What :func:`save_rows` gave, from an outline and what :func:`spread_rows` gave."""
    try:
        return {
            int(k): {
                name: {key: tensors[k][name][key] for key in keys} for name, keys in each.items()
            }
            for k, each in outline.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BalanceValueError(
            "Parameter `state_dict` should hold what the method keeps of gradients as entry "
            "`rows`. Found some of it missing. To read a distributed checkpoint into a new "
            "optimizer, name all losses by `loss_names=[…]` of BalancedOptimizer."
        ) from None


# ------------------------------------------------------------ reading


def _items(saved: object, where: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(saved, Mapping):
        raise _misfit(f"a mapping at `{where}`", type(saved).__name__)
    return saved.items()


def _read(value: object, param: Tensor, where: str) -> Tensor:
    """A kept row as a tensor like its parameter, in float32 or better."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise _misfit(f"dense tensors at `{where}`", type(value).__name__)
    if not value.is_floating_point() and not value.is_complex():
        raise _misfit(f"floating-point numbers at `{where}`", f"{value.dtype}")
    if value.shape != param.shape or value.is_complex() != param.is_complex():
        raise _misfit(
            f"a tensor of shape {tuple(param.shape)} at `{where}`", f"{tuple(value.shape)}"
        )
    if not bool(local_part(value.detach()).isfinite().all()):
        raise _misfit(f"finite numbers at `{where}`", "others")
    dtype = torch.promote_types(param.dtype, torch.float32)
    return place_like(value, param).to(param.device, dtype, copy=True)


def _read_entry(value: object, param: Tensor, where: str) -> Any:
    """An entry of an optimizer's state: on the parameter's device if it is of its shape."""
    if not isinstance(value, Tensor):
        return value
    if value.is_meta:
        raise _misfit(f"tensors with values at `{where}`", "one without")
    if value.shape != param.shape or value.ndim == 0:
        return value.detach().clone()
    return place_like(value, param).to(param.device, copy=True)


def place_like(value: Tensor, param: Tensor) -> Tensor:
    """A tensor, whole or in shards, in the same shards as a parameter."""
    if not is_sharded([param]):
        whole: Tensor = value.full_tensor() if is_sharded([value]) else as_plain(value)  # type: ignore[attr-defined]
        return whole.detach()
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if is_sharded([value]):
        return value.detach().redistribute(mesh, placements)  # type: ignore[attr-defined, no-any-return]
    return distribute_tensor(as_plain(value).detach().to(param.device), mesh, placements)


def _misfit(should: str, found: str) -> BalanceValueError:
    return BalanceValueError(
        f"`rows` in entry `balance` of the state dict should hold {should}. Found {found}. Load it "
        "into an optimizer of the same parameters in the same order, or remove the entry "
        '(`state_dict.pop("balance")`) to continue with the state of the wrapped optimizer only.'
    )
