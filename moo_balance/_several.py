"""Several optimizers that act as one, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from moo_balance._hints import add_note
from moo_balance._torch_internals import mark_as_hooked
from moo_balance._wrapper import ForwardingOptimizer
from moo_balance.errors import BalanceValueError


class SeveralOptimizers(ForwardingOptimizer):
    """Optimizers of different parameters, as one ``torch.optim.Optimizer``.

    ``BalancedOptimizer([muon, adamw], ...)`` makes one; it is ``optimizer.optimizer`` there. It
    owns nothing: ``param_groups`` lists the very dicts of all of them, in order, so that a
    scheduler may be given one of them or the BalancedOptimizer. ``state`` is a view of theirs,
    ``defaults`` has the entries that all of them have. A method that only some have, such as
    ``train()`` of a schedule-free optimizer, is called on these.

    ``state_dict`` is that of one optimizer which has all groups. What a part's has beyond the form
    of PyTorch is in a third entry, ``"parts"``.

    Args:
        optimizers: The parts, at least one. No parameter is in two of them.
    """

    _pickled = ("optimizers",)

    optimizers: tuple[Optimizer, ...]

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.__setstate__({"optimizers": tuple(optimizers)})

    # ------------------------------------------------------------ groups and state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all parts, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        _check_count("param_groups", len(groups), len(self.param_groups))
        rest = iter(groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(rest) for _ in optimizer.param_groups]

    @property
    def state(self) -> Any:
        """That of all parts, as one mapping. What is written to it reaches the part."""
        return _JoinedState(self.optimizers)

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        entries = dict(state)
        for optimizer in self.optimizers:
            optimizer.state = defaultdict(dict)
        _JoinedState(self.optimizers).update(entries)

    @property
    def defaults(self) -> dict[str, Any]:
        """What all parts have, with the values of the first."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {key: first[key] for key in first if all(key in other for other in others)}

    @defaults.setter
    def defaults(self, defaults: Mapping[str, Any]) -> None:
        for optimizer in self.optimizers:
            optimizer.defaults = {**optimizer.defaults, **defaults}

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: a group belongs to one of the parts."""
        raise BalanceValueError(
            "A parameter group should be added to one of several optimizers. Found "
            f"`add_param_group` of all {len(self.optimizers)} of them. Call it on the part, such "
            f"as `optimizer.optimizers[0]`, here {type(self.optimizers[0]).__name__}."
        )

    def __getattr__(self, name: str) -> Any:
        """A public attribute that only some of the parts have, such as ``train``."""
        parts = () if name.startswith("_") else self.__dict__.get("optimizers", ())
        values = [getattr(part, name) for part in parts if hasattr(part, name)]
        if len(values) == 1:
            return values[0]
        if not values or not all(map(callable, values)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return partial(_call_each, values)

    # ------------------------------------------------------------ steps

    @mark_as_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each part take its step, in order."""
        arguments = {} if closure is None else {"closure": closure}
        return self._step_with_hooks(self._step_each, **arguments)

    def _step_each(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for position, optimizer in enumerate(self.optimizers):
            try:
                optimizer.step()
            except BaseException as error:
                if position:
                    add_note(error, _describe_half_step(self.optimizers, position))
                raise
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parts."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts in the form of one: running numbers, and groups in order."""
        return self._save_with_hooks(self._save)

    def _save(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            saved = optimizer.state_dict()
            numbers = _renumber(saved["param_groups"], len(_renumber(groups)))
            for group in saved["param_groups"]:
                groups.append({**group, "params": [numbers[key] for key in group["params"]]})
            state.update({numbers[k]: v for k, v in saved["state"].items() if k in numbers})
            other = {k: v for k, v in saved.items() if k not in ("state", "param_groups")}
            no_params = {k: v for k, v in saved["state"].items() if k not in numbers}
            others.append({**other, **({"state": no_params} if no_params else {})})
        parts = {"parts": others} if any(others) else {}
        return {"state": state, "param_groups": groups, **parts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of one optimizer with the same groups."""
        self._load_with_hooks(self._load, state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        parts = self._split(state_dict)
        for position, (optimizer, part) in enumerate(zip(self.optimizers, parts, strict=True)):
            try:
                optimizer.load_state_dict(part)
            except Exception as error:
                if position:
                    add_note(error, f"The first {position} of the optimizers have loaded theirs.")
                raise

    def _split(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The state dict of each part; an error if the groups are not theirs."""
        groups, state = state_dict.get("param_groups", ()), state_dict.get("state", {})
        _check_count("state_dict", len(groups), len(self.param_groups))
        for own, saved in zip(self.param_groups, groups, strict=True):
            if len(own["params"]) != len(saved["params"]):
                raise BalanceValueError(
                    "Parameter `state_dict` should have groups of as many parameters as the "
                    f"optimizers have. Found {len(saved['params'])} in place of "
                    f"{len(own['params'])}. Give the optimizers in the order of the saved run."
                )
            _check_shapes(own["params"], [state.get(key, {}) for key in saved["params"]])
        rest, parts = iter(groups), []
        others = state_dict.get("parts", [{}] * len(self.optimizers))
        for optimizer, other in zip(self.optimizers, others, strict=True):
            mine = [next(rest) for _ in optimizer.param_groups]
            numbers = _renumber(mine)
            entries = {numbers[key]: value for key, value in state.items() if key in numbers}
            mine = [{**group, "params": [numbers[k] for k in group["params"]]} for group in mine]
            whole = {**other.get("state", {}), **entries}
            parts.append({**other, "state": whole, "param_groups": mine})
        return parts

    def __repr__(self) -> str:
        parts = ",\n".join(map(repr, self.optimizers))
        return f"{type(self).__name__}(\n{parts}\n)"


def _check_shapes(params: Sequence[Tensor], entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse state that belongs to parameters of other shapes, as of another optimizer."""
    for param, entry in zip(params, entries, strict=True):
        for key, value in entry.items():
            like = isinstance(value, Tensor) and value.ndim == param.ndim > 0
            if like and value.shape != param.shape:
                raise BalanceValueError(
                    "Parameter `state_dict` should have the state of the same parameters. Found "
                    f"{key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(param.shape)}. Give the optimizers in the order of the saved run."
                )


class _JoinedState(MutableMapping[Any, Any]):
    """The states of several optimizers; an entry belongs to the optimizer of its parameter.

    A missing entry of a parameter is an empty one, as in the state of any optimizer.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._owners: dict[Tensor, Optimizer] = {
            param: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        }

    def _holder(self, key: Any) -> Any:
        """The state that an entry is in, or belongs to."""
        owner = self._owners.get(key)
        if owner is None:  # what a part keeps under another key than a parameter
            holders = (each for each in self._optimizers if key in each.state)
            owner = next(holders, self._optimizers[0])
        return owner.state

    def __getitem__(self, key: Any) -> Any:
        return self._holder(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._holder(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._holder(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._holder(key)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def get(self, key: Any, default: Any = None) -> Any:
        return self._holder(key).get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        return self._holder(key).pop(key, *default)

    def __repr__(self) -> str:
        return repr(dict(self))


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """An optimizer, and those that it consists of."""
    parts = optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else ()
    return (optimizer, *parts)


def _call_each(functions: Sequence[Callable[..., Any]], *args: Any, **kwargs: Any) -> None:
    for function in functions:
        function(*args, **kwargs)


def _renumber(groups: Sequence[Mapping[str, Any]], start: int = 0) -> dict[Any, int]:
    """New numbers for the parameters of saved groups, each once, in order."""
    keys = dict.fromkeys(key for group in groups for key in group["params"])
    return {key: number for number, key in enumerate(keys, start)}


def _check_count(argument: str, count: int, expected: int) -> None:
    if count != expected:
        raise BalanceValueError(
            f"Parameter `{argument}` should have {expected} groups, those of all optimizers in "
            f"order. Found {count}. Give the same optimizers as the saved run, in the same order."
        )


def _describe_half_step(optimizers: Sequence[Optimizer], position: int) -> str:
    names = [type(optimizer).__name__ for optimizer in optimizers]
    return (
        f"{', '.join(names[:position])} had taken its step, and {', '.join(names[position:])} not: "
        "the parameters of the former have moved. Load a checkpoint, or call `zero_grad` and go on "
        "with the next batch."
    )
