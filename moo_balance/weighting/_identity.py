"""What identifies a weighting: its classes for checkpoints, all hyper-parameters for ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from moo_balance.weighting.base import Weighting


def method_name(weighting: Weighting) -> str:
    """The class of a weighting, with those of the weightings among its fields.

    A checkpoint carries it: states of the same name fit each other.

    Example:
        >>> from moo_balance import MGDA, MovingAverage
        >>> method_name(MovingAverage(MGDA(normalize="l2"), beta=0.5))
        'MovingAverage(MGDA)'
    """
    values = list(_parameters(weighting).values())
    nested = [method_name(inner) for inner in _weightings_in(values)]
    nested += [_module_name(value) for value in values if isinstance(value, nn.Module)]
    return type(weighting).__name__ + (f"({', '.join(nested)})" if nested else "")


def with_nested(weighting: Weighting) -> list[Weighting]:
    """A weighting, and all that are among its hyper-parameters, and theirs."""
    inner = _weightings_in(list(_parameters(weighting).values()))
    return [weighting, *(each for nested in inner for each in with_nested(nested))]


def _module_name(module: nn.Module) -> str:
    """The class of a module, with those of the modules inside of it."""
    nested = ", ".join(map(_module_name, module.children()))
    return type(module).__name__ + (f"({nested})" if nested else "")


def describe(weighting: Weighting) -> str:
    """The class of a weighting and all its hyper-parameters, the same in every process.

    Ranks compare it: unlike ``repr`` it has no address of a function in it.

    Example:
        >>> from moo_balance import FixedWeights, MovingAverage
        >>> describe(MovingAverage(FixedWeights({"a": 1, "b": 0.5})))
        "MovingAverage(weighting=FixedWeights(values={'a': 1, 'b': 0.5}), beta=0.9)"
    """
    arguments = ", ".join(f"{key}={_text(value)}" for key, value in _parameters(weighting).items())
    return f"{type(weighting).__name__}({arguments})"


def settings(weighting: Weighting) -> dict[str, str]:
    """All hyper-parameters as texts, those of a weighting inside it after its name.

    A checkpoint carries them, so that a run which continues with other ones can say which.

    Example:
        >>> from moo_balance import MGDA, MovingAverage
        >>> settings(MovingAverage(MGDA()))
        {'weighting.normalize': 'None', 'weighting.preference': 'None', 'weighting.every': '1', \
'beta': '0.9'}
    """
    texts: dict[str, str] = {}
    for key, value in _parameters(weighting).items():
        if isinstance(value, Weighting):
            texts.update({f"{key}.{inner}": text for inner, text in settings(value).items()})
        else:
            texts[key] = _text(value)
    return texts


def lagged_form(weighting: Weighting) -> str | None:
    """How to write a weighting that takes the next batch's losses instead of ``observe``.

    None if it has no such form.

    Example:
        >>> from moo_balance import FAMO, MovingAverage
        >>> lagged_form(MovingAverage(FAMO()))
        'MovingAverage(FAMO(lagged=True))'
    """
    parameters, name = _parameters(weighting), type(weighting).__name__
    if "lagged" in parameters:
        return f"{name}(lagged=True)"
    inner = [lagged_form(value) for value in parameters.values() if isinstance(value, Weighting)]
    return f"{name}({inner[0]})" if len(inner) == 1 and inner[0] else None


def _parameters(weighting: Weighting) -> dict[str, Any]:
    """The hyper-parameters: the fields that make two weightings equal or not."""
    if not is_dataclass(weighting):
        return vars(weighting)
    return {f.name: getattr(weighting, f.name) for f in fields(weighting) if f.compare}


def _weightings_in(value: object) -> list[Weighting]:
    """The weightings in a value, or in the sequences and mappings of it."""
    if isinstance(value, Weighting):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [weighting for entry in value for weighting in _weightings_in(entry)]
    return []


def _text(value: object) -> str:
    """The representation of a hyper-parameter, without addresses."""
    if isinstance(value, Weighting):
        return describe(value)
    if isinstance(value, nn.Module):
        return _module_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, (set, frozenset)):  # whose order differs from process to process
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, Tensor):
        return _text(value.tolist())
    if isinstance(value, partial):
        return f"partial({_text(value.func)}, {_text(value.args)}, {_text(value.keywords)})"
    if isinstance(value, MethodType):
        return f"{_text(value.__self__)}.{value.__name__}"
    if isinstance(value, float):  # 1.0 is 1, and NumPy's numbers are numbers
        return float.__repr__(value).removesuffix(".0")
    if hasattr(value, "__qualname__"):  # a function or a class
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, Tensor, Mapping, list, tuple, set, frozenset)


def _module_text(module: nn.Module) -> str:
    """A module's attributes and the modules inside of it.

    Not those that are None, and what other packages have put there, both of which may change.
    """
    package = type(module).__module__.partition(".")[0]
    parts = {
        name: value
        for name, value in {**vars(module), **dict(module.named_children())}.items()
        if name not in _OF_ANY_MODULE
        and (
            isinstance(value, (*_PLAIN, nn.Module))
            or callable(value)
            or type(value).__module__.partition(".")[0] == package
        )
    }
    arguments = ", ".join(f"{name}={_text(value)}" for name, value in parts.items())
    return f"{type(module).__name__}({arguments})"
