"""Everything that reads autograd's graph, and every private name of PyTorch in the engine.

The graph that autograd records leads from the losses to the parameters. A *node* is an operation's
backward step; an *edge* ``(node, output)`` is a place where the gradient of one tensor arrives:

    loss -> (MeanBackward0, 0) -> (AddmmBackward0, 0) -+-> (TBackward0, 0) -> (AccumulateGrad, 0)
                                                       |                      gradient of a weight
                                                       +-> (TanhBackward0, 0) -> ...
                                                           gradient of the layer's input
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from moo_balance.errors import BalanceError

# Private names of PyTorch, checked with 2.13 (most of them with 2.6, too), and what happens
# without them. A test takes each of them away.
_SEQUENCE_NUMBER = "_sequence_nr"  # of nodes; without it, their order follows from the edges
_METADATA = "_input_metadata"  # of nodes; without it, the shape of a gradient is not known
_ACCUMULATE, _LEAF = "AccumulateGrad", "variable"  # without them, no layer is factored
_TENSOR_HOOKS = "_backward_hooks"  # of tensors; without it, an activation may have hooks
_POST_HOOKS = "_post_accumulate_grad_hooks"  # of leaves; without the two, handles lead to hooks
_BACKWARD_CLASS = "_backward_cls"  # of functions; without this name or one of the next two, any
_CHECKPOINT = "CheckpointFunction"  # node that Python defines may be a reentrant checkpoint
_MODULE_HOOK = "BackwardHookFunction"  # or the hook of a module
_DISPATCH_MODE = "TorchDispatchMode"  # without it, any activation may have a hook
_DDP, _STATIC = "ddp_weakref", "static_graph"  # without them, DDP itself reports the conflict
_FLATTENED = "_fsdp_flattened"  # of FSDP1's parameters; without it, FSDP1 itself fails
_DONATED = "donated buffer"  # of an error's text; without it, the error stays as it is
_SELECTIVE = "under selective activation checkpoint"  # the same
_TRANSPOSE, _SIZES, _RIGHT = "TBackward0", "_sym_sizes", "_saved_mat2"  # see `_PRODUCTS`
_RAW, _UNPACK = "_raw", "unpack_hook"  # of saved tensors; without them, no layer is factored


class _Product(NamedTuple):
    """What a node of ``coefficient * left @ right`` saves, and its edge to the right factor."""

    left: str
    right_edge: int
    coefficient: str | None


_PRODUCTS = {  # without one of these names, no layer is factored
    "AddmmBackward0": _Product("_saved_mat1", 2, "_saved_alpha"),
    "MmBackward0": _Product("_saved_self", 1, None),
}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one vector. PyTorch's own function takes half the time."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


flatten: Any = getattr(getattr(torch, "_utils", None), "_flatten_dense_tensors", _concatenate)

Edge: TypeAlias = tuple[Node, int]
"""An output of a node, where a gradient arrives."""


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor arrives."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return get_gradient_edge(tensor).node, 0


def gradient_edge(edge: Edge) -> GradientEdge:
    """The form in which ``autograd.grad`` takes it."""
    return GradientEdge(*edge)


def edges_of(node: Node) -> list[Edge]:
    """Where a node passes gradients on."""
    return [(after, output) for after, output in node.next_functions if after is not None]


def nodes_above(tensors: Iterable[Tensor], cut: Iterable[Tensor] = ()) -> set[Node]:
    """Every node that is reached from `tensors` without passing through those of the cut."""
    blocked = {edge_of(tensor) for tensor in cut}
    stack: list[Any] = [edge[0] for edge in map(edge_of, tensors) if edge not in blocked]
    seen = {None, *stack}
    while stack:
        for edge in stack.pop().next_functions:
            node = edge[0]
            if node not in seen and not (blocked and edge in blocked):
                seen.add(node)
                stack.append(node)
    seen.remove(None)
    return seen


def count_uses(nodes: Iterable[Node]) -> Counter[Node | None]:
    """How many edges of these nodes lead to each node."""
    return Counter(after for node in nodes for after, _ in node.next_functions)


def recorded_order(nodes: Iterable[Node]) -> list[Node]:
    """The nodes, those recorded last first: each before the nodes that it passes gradients to.

    It holds unless a model computes in several threads, each of which counts its own nodes.
    """
    try:
        return sorted(nodes, key=lambda node: -getattr(node, _SEQUENCE_NUMBER)())
    except AttributeError:
        return _topological_order(set(nodes))


def _topological_order(nodes: set[Node]) -> list[Node]:
    waiting = count_uses(nodes)
    order = [node for node in nodes if not waiting[node]]
    for node in order:  # which grows meanwhile
        for after, _ in edges_of(node):
            waiting[after] -= 1
            if after in nodes and not waiting[after]:
                order.append(after)
    return order


def count_reaching_losses(
    losses: Sequence[Tensor],
    nodes: Collection[Node],
    edges: Callable[[Node], Sequence[Edge]] = edges_of,
) -> dict[Node, int]:
    """By how many losses each node is reached.

    Args:
        losses: The losses.
        nodes: All that they reach.
        edges: Where a node passes gradients on, if that is known already.
    """
    masks = dict.fromkeys(nodes, 0)  # bit k: loss k reaches the node
    for k, loss in enumerate(losses):
        masks[edge_of(loss)[0]] |= 1 << k
    for node in recorded_order(nodes):
        for after, _ in edges(node):
            masks[after] |= masks[node]
    return {node: mask.bit_count() for node, mask in masks.items()}


def leaf_of(node: Node) -> Tensor | None:
    """The tensor whose ``.grad`` is accumulated at this node, if it is such a node."""
    return getattr(node, _LEAF, None) if type(node).__name__ == _ACCUMULATE else None


def leaf_positions(nodes: Collection[Node], params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters whose gradients are accumulated at one of these nodes."""
    leaves = {id(leaf_of(node)) for node in nodes if type(node).__name__ == _ACCUMULATE}
    if not leaves - {id(None)}:  # a slower way, but public
        return [k for k, param in enumerate(params) if edge_of(param)[0] in nodes]
    return [k for k, param in enumerate(params) if id(param) in leaves]


def gradient_shape(edge: Edge) -> Sequence[int] | None:
    """Shape of the gradient that arrives at an edge; None if it is not known."""
    metadata = getattr(edge[0], _METADATA, None)
    return None if metadata is None else tuple(metadata[edge[1]].shape)


class MatrixProduct(NamedTuple):
    """A node where ``left @ right`` was computed, [samples, inputs] times [inputs, outputs]."""

    node: Any
    saved: _Product
    samples: int
    inputs: int
    outputs: int

    def is_packed(self) -> bool:
        """Whether a hook has packed the left factor, so that reading it may compute it anew.

        Activation checkpoints are such hooks. Each reading outside of a backward pass would compute
        the whole block again, and keep what it has computed.
        """
        try:
            return getattr(getattr(self.node, _RAW + self.saved.left), _UNPACK) is not None
        except AttributeError:
            return True

    def left(self) -> Tensor:
        """The left factor."""
        return getattr(self.node, self.saved.left).detach()  # type: ignore[no-any-return]

    def right_leaf(self) -> tuple[Tensor | None, bool, list[Node]]:
        """The leaf that is the right factor; whether it is transposed; the nodes on the way."""
        after, _ = self.node.next_functions[self.saved.right_edge]
        coefficient = self.saved.coefficient
        if after is None or (coefficient and getattr(self.node, coefficient, None) != 1):
            return None, False, []
        path, transposed = [after], type(after).__name__ == _TRANSPOSE
        if transposed:
            path.append(after.next_functions[0][0])
        return leaf_of(path[-1]), transposed, path


def matrix_products(nodes: Iterable[Node]) -> list[MatrixProduct]:
    """The nodes of products of two matrices."""
    kinds = {}
    for kind in set(map(type, nodes)):
        saved = _PRODUCTS.get(kind.__name__)
        if saved and hasattr(kind, saved.left) and hasattr(kind, saved.left + _SIZES):
            kinds[kind] = saved
    products = []
    for node in nodes if kinds else ():
        if type(node) in kinds and hasattr(node, _RIGHT + _SIZES):
            saved = kinds[type(node)]
            samples, inputs = getattr(node, saved.left + _SIZES)
            _, outputs = getattr(node, _RIGHT + _SIZES)
            products.append(MatrixProduct(node, saved, samples, inputs, outputs))
    return products


def unpack_hook(node: Node) -> int | None:
    """Identity of the hook that unpacks what a node has saved; None without the private names.

    One activation checkpoint has one hook for all its nodes. That of ``save_on_cpu``, which only
    moves a tensor, does not count.
    """
    for name in _saved_names(type(node)):
        saved = getattr(node, name)
        for each in saved if type(saved) is tuple else (saved,):
            hook = getattr(each, _UNPACK, None)
            if hook is not None:
                moves = getattr(hook, "__module__", None) == torch.autograd.graph.__name__
                return None if moves else id(hook)
    return None


@cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith(_RAW + "_saved_")]


class KeptTensors(NamedTuple):
    """The tensors that functions defined in Python keep for their backward pass, with versions."""

    nodes: Sequence[Node]
    kept: Sequence[dict[Any, tuple[Tensor, int]]]

    @staticmethod
    def of(nodes: Iterable[Node]) -> KeptTensors:
        """Those of all these nodes."""
        functions = [node for node in nodes if isinstance(node, BackwardCFunction)]
        return KeptTensors(functions, [_kept_tensors(node) for node in functions])

    def find_change(self) -> str | None:
        """Name of a function that has since replaced one, or written into it; None if none has."""
        for node, before in zip(self.nodes, self.kept, strict=True):
            after = _kept_tensors(node)
            for name, (tensor, version) in before.items():
                same = name in after and after[name][0] is tensor and after[name][1] == version
                if not same:
                    return type(node).__name__
        return None


def _kept_tensors(node: Any) -> dict[Any, tuple[Tensor, int]]:
    """Attributes, entries of attributes, and saved tensors, which are read only if not packed."""
    kept = dict[Any, Any]()
    for name, value in vars(node).items():
        entries = value if isinstance(value, (tuple, list)) else [value]
        kept |= {(name, k): entry for k, entry in enumerate(entries)}
    for k, saved in enumerate(getattr(node, _RAW + "_saved_tensors", ())):
        kept[k] = saved.data if getattr(saved, _UNPACK, saved) is None else None
    tensors = {name: t for name, t in kept.items() if isinstance(t, Tensor)}
    return {name: (t, t._version) for name, t in tensors.items() if not t.is_inference()}


def has_reentrant_checkpoint(nodes: Iterable[Node]) -> bool:
    """Whether there is a reentrant checkpoint among these nodes.

    ``autograd.grad`` does not see the parameters inside: it raises, or, where the checkpoint lies
    on no other parameter's path, silently passes over them.
    """
    module = sys.modules.get("torch.utils.checkpoint")  # if not imported, no graph contains one
    if module is None:
        return False
    reentrant = _node_class(module, _CHECKPOINT)
    return any(issubclass(kind, reentrant) for kind in set(map(type, nodes)))


def _node_class(module: Any, function: str) -> Any:
    """Class of the nodes of a ``torch.autograd.Function``; if it is not known, of all of them."""
    return getattr(getattr(module, function, None), _BACKWARD_CLASS, BackwardCFunction)


# ---------------------------------------------------------------------- hooks of parameters


class ParameterHooks(NamedTuple):
    """The hooks registered on a parameter, each kind in the order in which they run.

    PyTorch reads these dictionaries whenever a gradient arrives: emptied in place, none runs.
    """

    of_tensor: dict[int, Any]
    post_accumulate: dict[int, Any]


def hooks_of_parameter(param: Tensor) -> ParameterHooks:
    """The hooks that get its gradient, and those called once the gradient is in ``.grad``."""
    of_tensor = _hook_dict(param, _TENSOR_HOOKS, param.register_hook)
    register = param.register_post_accumulate_grad_hook
    return ParameterHooks(of_tensor, _hook_dict(param, _POST_HOOKS, register))


def _hook_dict(param: Tensor, name: str, register: Callable[[Any], Any]) -> dict[int, Any]:
    if hasattr(param, name):
        return getattr(param, name) or {}
    if not param.requires_grad:
        return {}  # a hook can be registered on no such tensor
    handle = register(_do_nothing)
    handle.remove()
    return handle.hooks_dict_ref()  # type: ignore[no-any-return]


def _do_nothing(*arguments: Any) -> None:
    pass


def hooked_positions(params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters with hooks; those of their graph nodes do not count."""
    read = attrgetter(_TENSOR_HOOKS, _POST_HOOKS)  # a third of the time of a loop
    try:
        return [k for k, (one, other) in enumerate(map(read, params)) if one or other]
    except AttributeError:
        return [k for k, param in enumerate(params) if any(hooks_of_parameter(param))]


def silence_hooks(params: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Context within which hooks of parameters do not run; it may be entered repeatedly.

    Hooks are for the balanced gradient; the gradients of single losses are not shown to them.
    """
    hooked = hooked_positions(params)
    if not hooked:
        return nullcontext()
    return _SilencedHooks([hooks_of_parameter(params[k]) for k in hooked])


class _SilencedHooks(AbstractContextManager[None]):
    def __init__(self, hooked: Iterable[ParameterHooks]) -> None:
        self.hooks = [kind for hooks in hooked for kind in hooks if kind]
        self.kept: list[dict[int, Any]] = []

    def __enter__(self) -> None:
        self.kept = [dict(hooks) for hooks in self.hooks]
        for hooks in self.hooks:
            hooks.clear()

    def __exit__(self, *error: object) -> None:
        for hooks, kept in zip(self.hooks, self.kept, strict=True):
            kept.update(hooks)  # registered meanwhile
            hooks.clear()
            hooks.update(kept)


def node_hook_positions(params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters at whose graph nodes hooks were registered from Python.

    ``autograd.grad`` does not run these. Finding them takes microseconds for each parameter. Those
    that FSDP1 registers on its flat parameters do not count.
    """
    return [
        k
        for k, param in enumerate(params)
        if not is_flattened([param]) and _has_node_hooks(edge_of(param)[0])
    ]


def _has_node_hooks(node: Node) -> bool:
    for register in (node.register_hook, node.register_prehook):
        handle = register(_do_nothing)
        registered = handle.hooks_dict_ref()
        handle.remove()
        if registered:
            return True
    return False


def has_hooks(tensors: Sequence[Tensor]) -> bool:
    """Whether a hook is registered on one of these activations."""
    try:
        return any(getattr(tensor, _TENSOR_HOOKS) for tensor in tensors)
    except AttributeError:
        return any(tensor.is_leaf or has_hook_at(edge_of(tensor)) for tensor in tensors)


# ---------------------------------------------------------------------- hooks of activations


def has_hook_at(edge: Edge) -> bool:
    """Whether a gradient that arrives here in several parts would run a hook on each.

    Hooks of modules are nodes. Those of tensors are invisible in the graph, so a gradient of zeros
    is sent to this edge and no further: there is a hook if the gradient comes back changed, or if
    anything is computed on the way. A hook that does neither stays unnoticed.
    """
    node, output = edge
    if isinstance(node, _node_class(sys.modules.get("torch.nn.modules._functions"), _MODULE_HOOK)):
        return True
    metadata = getattr(node, _METADATA, None)
    no_operations = _no_operations(_DISPATCH_MODE)
    if metadata is None or no_operations is None:
        return True
    form, here = metadata[output], gradient_edge(edge)
    probe = torch.zeros((), dtype=form.dtype, device=form.device).expand(form.shape)
    try:
        with no_operations():
            (returned,) = torch.autograd.grad([here], [here], [probe], retain_graph=True)
    except _OperationError:
        return True
    return returned is not probe


class _OperationError(Exception):
    pass


@cache
def _no_operations(name: str) -> Any:
    """A context manager that raises when anything is computed, or None."""
    base = getattr(sys.modules.get("torch.utils._python_dispatch"), name, None)

    def refuse(*arguments: Any) -> None:
        raise _OperationError

    return base and type("NoOperations", (base,), {"__torch_dispatch__": refuse})


def explain_second_pass(error: RuntimeError) -> None:
    """Raise a better error if this one comes from a graph that allows one backward pass only."""
    if _DONATED in str(error):
        raise BalanceError(
            "A compiled model should keep its buffers for more than one backward pass. Found "
            "donated buffers. Set `torch._functorch.config.donated_buffer = False` before the "
            "model is compiled."
        ) from error
    if _SELECTIVE in str(error):
        raise BalanceError(
            "An activation checkpoint should allow more than one backward pass. Found a selective "
            "one, which allows a single one. Leave out its `context_fn`, or pass the outputs of "
            "the model's shared part as `features=`, which takes one pass through that."
        ) from error


def in_static_graph(losses: Sequence[Tensor]) -> bool:
    """Whether the losses come out of the first step of a DDP model with ``static_graph=True``."""
    wrappers = [getattr(node, _DDP, lambda: None)() for node in nodes_above(losses)]
    return any(getattr(wrapper, _STATIC, False) for wrapper in wrappers)


def is_flattened(params: Iterable[Tensor]) -> bool:
    """Whether one of these is a part of FullyShardedDataParallel's (FSDP1's) flat parameters."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(getattr(param, _FLATTENED, False) for param in params)
