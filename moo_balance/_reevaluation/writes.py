"""Tells which tensors operators write in place; private names of PyTorch that this needs.

Checked with PyTorch 2.13. Every use is guarded: without a name nothing is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from moo_balance._hints import add_note

Step = TypeVar("Step", bound=Callable[..., Any])

_SUBCLASS = (
    "The losses are evaluated under a TorchDispatchMode, which finds what they write. PyTorch "
    "cannot construct a subclass by `Tensor.__new__` there: construct it before, or by "
    "`tensor.as_subclass`."
)

_push_mode: Callable[[object], object] | None = getattr(
    torch._C, "_push_on_torch_dispatch_stack", None
)
_pop_mode: Callable[[None], object] | None = getattr(torch._C, "_pop_torch_dispatch_stack", None)


class Effect(NamedTuple):
    """What an operator does to memory.

    Args:
        writes: Position and name of each argument that it writes.
        training: Position and name of the argument without which it does not write.
        reshapes: Whether it changes sizes or memory of the tensor, not only values.
        returns_new: Whether it returns tensors in new memory.
        fills_out: Whether it writes an argument called ``out``.
    """

    writes: tuple[tuple[int, str], ...] = ()
    training: tuple[int, str] | None = None
    reshapes: bool = False
    returns_new: bool = False
    fills_out: bool = False


_effects: dict[int, Effect] = {}
_functions: list[Any] = []  # keeps the functions, and so their ids


def _effect_of(function: Any) -> Effect:
    """Read an operator's schema, once."""
    schema = getattr(function, "_schema", None)
    effect = Effect() if schema is None else _read_schema(function, schema)
    _effects[id(function)] = effect  # its own hash takes longer than all the rest
    _functions.append(function)
    return effect


def _read_schema(function: Any, schema: Any) -> Effect:
    namespace, _, name = schema.name.partition("::")
    if namespace == "fsdp":  # fills memory that FSDP itself allocates and frees
        return Effect()
    places = {argument.name: place for place, argument in enumerate(schema.arguments)}
    writes = [
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    training = None
    if not writes:
        # The schemas of batch norm and of collectives do not say that they write.
        writes = [each for each in ("running_mean", "running_var") if each in places]
        training = next((each for each in ("training", "train") if each in places), None)
        if namespace == "c10d" and name in ("allreduce_", "broadcast_"):
            writes = [schema.arguments[0].name]
    return Effect(
        writes=tuple((places[each], each) for each in writes),
        training=None if training is None else (places[training], training),
        reshapes=torch.Tag.inplace_view in function.tags,
        # `_unsafe_view` conceals that it returns a view, and so may operators of others.
        returns_new=namespace == "aten"
        and name != "_unsafe_view"
        and any(each.alias_info is None for each in schema.returns),
        fills_out="out" in writes,
    )


_BETWEEN = ("torch._ops", "torch._compile", "torch._dynamo.eval_frame")
"""What may stand between the caller of an operator and the mode."""


def _fills_own_memory(effect: Effect) -> bool:
    """Whether the caller of an operator writes memory that it manages itself.

    FSDP does so where it gathers parameters; compiled code gives ``out`` memory that is new.
    """
    frame = sys._getframe(3)
    while frame.f_globals.get("__name__") in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    caller = frame.f_globals
    if effect.fills_out and "extern_kernels" in caller:
        return True
    return str(caller.get("__name__")).startswith("torch.distributed.fsdp")


def _each_tensor(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument or result; for one that wraps others, as a DTensor does, those."""
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
        else:
            yield from _each_tensor([getattr(value, name) for name in flatten()[0]])
    elif isinstance(value, (tuple, list)):
        for element in value:
            yield from _each_tensor(element)


def _hide_from_compilers(function: Step) -> Step:
    """Keep a function from being compiled where compiled code calls it.

    The decorator, which PyTorch gives to every mode, costs half as much as an operator in each
    call. Marking the code costs nothing.
    """
    try:
        from torch._C._dynamo import eval_frame

        if hasattr(eval_frame, "skip_code"):  # PyTorch 2.6
            eval_frame.skip_code(function.__code__)
        else:
            skip = eval_frame._FrameAction.SKIP  # of the function, and of what it calls
            strategy = eval_frame._FrameExecStrategy(skip, skip)
            eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):
        return cast(Step, torch._disable_dynamo(function))  # type: ignore[attr-defined]
    return function


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports each tensor that is about to be written and that existed before."""

    supports_higher_order_operators = True

    def __init__(self, report: Callable[[Tensor, Effect], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report
        self._new: set[int | None] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code runs as it does without the mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # `_hide_from_compilers` does so

    @_hide_from_compilers
    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        effect = _effects.get(id(func)) or _effect_of(func)
        if effect.writes:
            self._report_writes(effect, args, kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        if effect.returns_new:
            if type(result) is Tensor and result.layout is torch.strided:
                self._new.add(result.untyped_storage().data_ptr())
            else:
                self._new.update(map(memory_address, _each_tensor(result)))
        return result

    @_hide_from_compilers
    def _report_writes(
        self, effect: Effect, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        def argument(place: int, name: str) -> Any:
            return args[place] if place < len(args) else kwargs.get(name)

        if effect.training is not None and argument(*effect.training) is False:
            return
        if _fills_own_memory(effect):
            return
        for place, name in effect.writes:
            for tensor in _each_tensor(argument(place, name)):
                address = memory_address(tensor)
                if address is None or address not in self._new:
                    self._report(tensor, effect)


def can_watch_writes() -> bool:
    """Whether PyTorch has the private names that :func:`watch_writes` needs."""
    return _push_mode is not None and _pop_mode is not None


@contextmanager
def watch_writes(report: Callable[[Tensor, Effect], None]) -> Iterator[None]:
    """Report each tensor before an operator writes it, on this thread, inside the context.

    Tensors that are made inside are left out, and so is what compiled code writes itself. Without
    PyTorch's private names nothing is reported.

    Args:
        report: Called with the tensor, and the effect of the operator.
    """
    if _push_mode is None or _pop_mode is None:
        yield
        return
    # Entering the mode as usual would set a flag of the whole process.
    _push_mode(_Watch(report))
    try:
        yield
    except RuntimeError as error:
        if "Creating a new Tensor subclass" in str(error):
            add_note(error, _SUBCLASS)
        raise
    finally:
        _pop_mode(None)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile`` was called for it; False without the name."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return "_orig_mod" in module._modules  # what `torch.compile` returns


def memory_address(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none of its own, as a sparse tensor."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written; constant where PyTorch does not count."""
    try:
        return getattr(tensor, "_version", 0)
    except RuntimeError:  # made in inference mode
        return 0


_revive_storage: Callable[[int], torch.UntypedStorage | None] | None = getattr(
    torch.UntypedStorage, "_new_with_weak_ptr", None
)


def weak_reference(storage: torch.UntypedStorage) -> Callable[[], torch.UntypedStorage | None]:
    """A function that returns the storage while it is in use elsewhere.

    Without the private name it keeps the storage.
    """
    if _revive_storage is None:
        return lambda: storage
    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return partial(_revive, _revive_storage, reference)


def _revive(
    revive: Callable[[int], torch.UntypedStorage | None], reference: Any
) -> torch.UntypedStorage | None:
    return revive(reference.cdata)
