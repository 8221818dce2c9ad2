"""Parts of error messages: the nearest known name, how to make an instance, and notes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable


def name_nearest(name: object, known: Iterable[str]) -> str:
    """A sentence that names the known name most like `name`, after a space; empty if none is."""
    from difflib import get_close_matches  # only for a message

    nearest = get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f" The nearest known name is {nearest[0]!r}." if nearest else ""


def describe_value(value: object, kind: type) -> str:
    """A value in place of an instance of `kind`; of such a class also how to make an instance."""
    if not isinstance(value, type) or not issubclass(value, kind) or inspect.isabstract(value):
        return repr(value)
    needed = any(map(is_required, inspect.signature(value).parameters.values()))
    call = f"{value.__name__}({'…' if needed else ''})"
    return f"the class {value.__name__}. Pass an instance, `{call}`"


def is_required(argument: inspect.Parameter) -> bool:
    """Whether a call has to pass the argument."""
    variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    return argument.default is argument.empty and not variadic


def add_note(error: BaseException, note: str) -> None:
    """``error.add_note(note)``, which Python 3.10 does not have."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]
