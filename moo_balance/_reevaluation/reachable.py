"""Finds the modules and tensors that a closure uses, through what it refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ProxyTypes

from torch import Tensor, nn
from torch.optim import Optimizer

DEPTH = 5
"""References that are followed one after another."""

WIDTH, TOTAL = 100, 1000
"""Elements that are read of one container, and of all; a data set may have millions."""

_OPAQUE = (Optimizer, ModuleType, type, str, bytes, int, float, complex, type(None))
_CONTAINERS = (list, tuple, set, frozenset)
_ITERATORS = [kind.__iter__ for kind in _CONTAINERS]
_LIBRARIES = ("torch", "numpy", "builtins")


class Reachable(NamedTuple):
    """What a closure refers to.

    Args:
        modules: Modules with their submodules, each once.
        tensors: Tensors that are no parameter or buffer of theirs.
    """

    modules: list[nn.Module]
    tensors: list[Tensor]


def find_reachable(closure: Callable[..., Any]) -> Reachable:
    """What a closure refers to, directly or through a few other objects.

    Followed are the object of a bound method, the parts of a ``partial``, variables of enclosing
    functions, global variables that the code names, models that it names as an attribute of a
    Python module (``net.model``), containers that Python defines, and attributes of objects.
    Containers of other classes may compute their elements, and are not read.
    """
    modules: dict[nn.Module, None] = {}
    tensors: list[Tensor] = []
    known: set[int] = set()
    level: list[Any] = [closure]
    left = TOTAL
    for _ in range(DEPTH):
        following: list[Any] = []
        for each in level:
            # `isinstance` would ask what a weak reference refers to.
            if id(each) in known or type(each) in ProxyTypes or isinstance(each, _OPAQUE):
                continue
            known.add(id(each))
            if isinstance(each, Tensor):
                tensors.append(each)
            elif isinstance(each, nn.Module):
                _add_modules(each, modules)
            else:
                references = list(islice(_references(each), min(WIDTH, left)))
                left -= len(references)
                following += references
        level = following
    for module in modules:
        tensors.extend(value for value in vars(module).values() if isinstance(value, Tensor))
    return Reachable(list(modules), tensors)


def _add_modules(module: nn.Module, found: dict[nn.Module, None]) -> None:
    """As ``module.modules()``, which takes three times as long."""
    if module not in found:
        found[module] = None
        for child in module._modules.values():
            if child is not None:
                _add_modules(child, found)


def _references(thing: Any) -> Iterable[Any]:
    if isinstance(thing, partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, FunctionType):
        return _references_of_function(thing)
    if isinstance(thing, dict) and type(thing).values is dict.values:
        return thing.values()
    if isinstance(thing, _CONTAINERS) and type(thing).__iter__ in _ITERATORS:
        return (element for element in thing)
    try:
        return tuple(vars(thing).values())
    except TypeError:
        return ()


def _references_of_function(function: FunctionType) -> Iterable[Any]:
    if function.__module__ is not None and function.__module__.split(".")[0] in _LIBRARIES:
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()  # a decorator keeps the original function there
    names, known = list(_names(function.__code__)), function.__globals__
    for value in (known[name] for name in names if name in known):
        yield value
        if isinstance(value, ModuleType):
            attributes = vars(value)
            models = (attributes[name] for name in names if name in attributes)
            # `isinstance` might compute a value, as that of a weak reference.
            yield from (model for model in models if issubclass(type(model), nn.Module))


def _names(code: CodeType) -> Iterable[str]:
    """Names that code may look up among the global variables, with functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
