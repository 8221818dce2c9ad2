"""Reading the graph; and each private name of PyTorch taken away, with the same result."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalanceError
from moo_balance.engine import Engine, PerLoss, autograd
from moo_balance.engine.autograd import (
    count_reaching_losses,
    edge_of,
    explain_second_pass,
    gradient_shape,
    has_hook_at,
    has_hooks,
    has_reentrant_checkpoint,
    hooks_of_parameter,
    in_static_graph,
    is_flattened,
    leaf_positions,
    nodes_above,
    recorded_order,
    silence_hooks,
)
from moo_balance.engine.linear import find_linear_layers
from tests.support.engine_graphs import (
    Graph,
    assert_same,
    checkpointed_reentrant,
    drawn,
    gradient,
    handed_out,
    hooked,
    hooked_beside_a_way_around,
    hooked_in_between,
    naive_jacobian,
    parameter,
    shared,
    unhooked_jacobian,
    wide,
    wide_and_tied,
)
from tests.support.engines import ENGINES
from tests.support.feature_graphs import plain as plain_features

NODES = ["_SEQUENCE_NUMBER", "_METADATA", "_ACCUMULATE", "_LEAF", "_TRANSPOSE", "_SIZES", "_RIGHT"]
NODES += ["_RAW", "_UNPACK"]
OTHERS = [
    "_TENSOR_HOOKS",
    "_POST_HOOKS",
    "_BACKWARD_CLASS",
    "_CHECKPOINT",
    "_MODULE_HOOK",
    "_DISPATCH_MODE",
]
WITHOUT_EFFECT = ["_DDP", "_STATIC", "_FLATTENED", "_DONATED", "_SELECTIVE"]
MAY_BE_CHECKPOINTS = ["_BACKWARD_CLASS", "_CHECKPOINT"]  # functions that Python defines
NAMES = [*NODES, *OTHERS, *WITHOUT_EFFECT]

CUTTING = list(ENGINES.values())[-1]
"""Streaming with cuts in small graphs."""


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Reads a name that PyTorch does not have in place of one that it has."""
    return lambda name: monkeypatch.setattr(autograd, name, "a_name_that_pytorch_does_not_have")


def layers_of(built: Graph) -> list[int]:
    problem = built.problem()
    return [layer.param_index for layer in find_linear_layers(problem, nodes_above(problem.losses))]


def assert_right(engine: Engine, build: Callable[[], Graph]) -> None:
    """The Gramian and both forms of the gradient are those of the naive Jacobian.

    Hooks of parameters see the balanced gradient; those of the graphs here are linear.
    """
    jacobian, rows, built = naive_jacobian(build()), unhooked_jacobian(build()), build()
    coefficients = drawn(len(built.losses), seed=9)
    linearization = engine.linearize(built.problem())
    assert_same(linearization.gramian(), rows @ rows.T)
    linearization.add_to_grad(coefficients)
    assert_same(gradient(built), coefficients @ jacobian)
    other = build()
    linearization = engine.linearize(other.problem())
    linearization.gramian()
    linearization.combined(coefficients).backward()
    assert_same(gradient(other), coefficients @ jacobian)


# ---------------------------------------------------------------------- no name is needed


def test_every_private_name_is_taken_away_here() -> None:
    names = {name for name, value in vars(autograd).items() if isinstance(value, str)}
    assert {name for name in names if not name.startswith("__")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "build",
    [shared, wide, wide_and_tied, hooked, handed_out, checkpointed_reentrant],
    ids=lambda build: build.__name__,
)
def test_per_loss_is_right_without_a_private_name(
    without: Callable[[str], None], name: str, build: Callable[[], Graph]
) -> None:
    without(name)
    assert_right(PerLoss(), build)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "build",
    [shared, wide, hooked_in_between, hooked_beside_a_way_around],
    ids=lambda build: build.__name__,
)
def test_streaming_is_right_without_a_private_name(
    without: Callable[[str], None], name: str, build: Callable[[], Graph]
) -> None:
    without(name)
    if name in MAY_BE_CHECKPOINTS and build is hooked_beside_a_way_around:
        with pytest.raises(BalanceError, match="reentrant"):
            CUTTING.linearize(build().problem()).gramian()
    else:
        assert_right(CUTTING, build)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_right_without_a_private_name(
    without: Callable[[str], None], name: str
) -> None:
    without(name)
    built = plain_features()
    jacobian, naive = built.jacobian(), naive_jacobian(built.graph)
    linearization = built.linearize()
    assert_same(linearization.gramian(), jacobian @ jacobian.T)
    linearization.add_to_grad(torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert_same(gradient(built.graph), torch.tensor([0.3, 0.7], dtype=torch.float64) @ naive)


# ---------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("name", ["_LEAF", "_ACCUMULATE", "_TRANSPOSE", "_SIZES", "_RIGHT"])
def test_no_layer_is_factored_without_a_private_name(
    without: Callable[[str], None], name: str
) -> None:
    assert layers_of(wide()) == [0]
    without(name)
    assert layers_of(wide()) == []


@pytest.mark.parametrize("field", ["left", "coefficient", None])
def test_no_layer_is_factored_whose_node_saves_something_else(
    monkeypatch: pytest.MonkeyPatch, field: str | None
) -> None:
    product = autograd._PRODUCTS["AddmmBackward0"]
    others = {} if field is None else {"AddmmBackward0": product._replace(**{field: "_nothing"})}
    monkeypatch.setattr(autograd, "_PRODUCTS", others)
    assert layers_of(wide()) == []
    assert_right(PerLoss(), wide)


# ---------------------------------------------------------------------- order, leaves, shapes


def test_nodes_are_ordered_without_their_numbers(without: Callable[[str], None]) -> None:
    built = wide_and_tied()
    nodes = nodes_above(built.losses)
    counts = count_reaching_losses(built.losses, nodes)
    without("_SEQUENCE_NUMBER")
    order = recorded_order(nodes)
    assert set(order) == nodes
    assert len(order) == len(nodes)
    place = {node: k for k, node in enumerate(order)}
    assert all(place[n] < place[after] for n in nodes for after, _ in n.next_functions if after)
    assert count_reaching_losses(built.losses, nodes) == counts


@pytest.mark.parametrize("name", [None, "_LEAF", "_ACCUMULATE"])
def test_leaves_are_found(without: Callable[[str], None], name: str | None) -> None:
    if name is not None:
        without(name)
    used, idle, other = parameter(3), parameter(3, seed=1), parameter(3, seed=2)
    nodes = nodes_above([(used * idle.detach()).sum(), other.sum()])
    assert leaf_positions(nodes, [idle, other, used]) == [1, 2]


def test_shapes_of_gradients(without: Callable[[str], None]) -> None:
    value = parameter(2, 3).exp()
    assert gradient_shape(edge_of(value)) == (2, 3)
    without("_METADATA")
    assert gradient_shape(edge_of(value)) is None


# ---------------------------------------------------------------------- hooks


def test_hooks_of_tensors_are_seen() -> None:
    weight = parameter(3)
    assert not has_hooks([weight])
    handle = weight.register_hook(lambda gradient: None)
    assert has_hooks([parameter(2), weight])
    handle.remove()
    assert not has_hooks([weight])


@pytest.mark.parametrize("name", ["_TENSOR_HOOKS", "_POST_HOOKS"])
def test_hooks_are_silenced_without_their_names(without: Callable[[str], None], name: str) -> None:
    without(name)
    weight, idle, frozen = parameter(2), parameter(2, seed=1), parameter(2).detach()
    seen: list[str] = []
    weight.register_hook(lambda gradient: seen.append("tensor"))
    weight.register_post_accumulate_grad_hook(lambda param: seen.append("post"))
    silenced = silence_hooks([idle, weight, frozen])
    for _ in range(2):
        with silenced:
            weight.sum().backward()
    assert seen == []
    weight.sum().backward()
    assert seen == ["tensor", "post"]
    assert not any(hooks_of_parameter(idle))


def test_hooks_registered_while_others_are_silent_are_kept() -> None:
    weight, seen = parameter(2), list[int]()
    weight.register_hook(lambda gradient: seen.append(1))
    with silence_hooks([weight]):
        weight.register_hook(lambda gradient: seen.append(2))
    weight.sum().backward()
    assert seen == [1, 2]


def test_without_the_name_of_hooks_parameters_may_have_some(without: Callable[[str], None]) -> None:
    without("_TENSOR_HOOKS")
    weight = parameter(3)
    assert has_hooks([weight])
    value = weight.exp()
    assert not has_hooks([value])
    value.register_hook(lambda gradient: 2 * gradient)
    assert has_hooks([value])


def hooked_values() -> dict[str, Tensor]:
    """Activations: one without a hook, one that changes its gradient, one that computes with it."""
    plain, changed, read = (parameter(3, seed=k).exp() for k in range(3))
    changed.register_hook(torch.zeros_like)
    read.register_hook(lambda gradient: [None, gradient.norm()][0])
    return {"plain": plain, "changed": changed, "read": read}


def test_hooks_at_edges_are_seen() -> None:
    found = {name: has_hook_at(edge_of(value)) for name, value in hooked_values().items()}
    assert found == {"plain": False, "changed": True, "read": True}


@pytest.mark.parametrize("name", ["_METADATA", "_DISPATCH_MODE"])
def test_any_edge_may_have_hooks_without_a_private_name(
    without: Callable[[str], None], name: str
) -> None:
    without(name)
    assert all(has_hook_at(edge_of(value)) for value in hooked_values().values())


@pytest.mark.parametrize("name", [None, "_MODULE_HOOK", "_BACKWARD_CLASS"])
def test_hooks_of_modules_are_seen(without: Callable[[str], None], name: str | None) -> None:
    module = nn.Tanh()
    module.register_full_backward_hook(lambda module, entering, leaving: None)
    value = module(parameter(3).exp())
    if name is not None:
        without(name)
    assert has_hook_at(edge_of(value))


# ---------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("name", [None, "_CHECKPOINT", "_BACKWARD_CLASS"])
def test_reentrant_checkpoints_are_seen(without: Callable[[str], None], name: str | None) -> None:
    if name is not None:
        without(name)
    assert has_reentrant_checkpoint(nodes_above(checkpointed_reentrant().losses))
    assert not has_reentrant_checkpoint(nodes_above(shared().losses))
    # Without the name, functions that Python defines take the slower way, too.
    assert has_reentrant_checkpoint(nodes_above(handed_out().losses)) == (name is not None)


class Wrapper:
    def __init__(self, static: bool) -> None:
        self.static_graph = static


class Sink(torch.autograd.Function):
    """As that of DistributedDataParallel's first step."""

    @staticmethod
    def forward(ctx: Any, wrapper: Wrapper | None, value: Tensor) -> Tensor:
        ctx.ddp_weakref = lambda: wrapper
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, upstream


@pytest.mark.parametrize(
    ("wrapper", "static"), [(Wrapper(True), True), (Wrapper(False), False), (None, False)]
)
def test_static_graphs_are_seen(
    without: Callable[[str], None], wrapper: Wrapper | None, static: bool
) -> None:
    losses = [Sink.apply(wrapper, parameter(3)).sum(), parameter(2).sum()]
    assert in_static_graph(losses) == static
    without("_DDP")
    assert not in_static_graph(losses)


def test_flattened_parameters_are_seen(without: Callable[[str], None]) -> None:
    pytest.importorskip("torch.distributed.fsdp")
    weight = parameter(3)
    assert not is_flattened([weight])
    weight._fsdp_flattened = True  # type: ignore[attr-defined]
    assert is_flattened([parameter(2), weight])
    without("_FLATTENED")
    assert not is_flattened([weight])


def test_donated_buffers_are_explained(without: Callable[[str], None]) -> None:
    error = RuntimeError("This backward function was compiled with non-empty donated buffers")
    explain_second_pass(RuntimeError("something else"))
    with pytest.raises(BalanceError, match="donated_buffer = False"):
        explain_second_pass(error)
    without("_DONATED")
    explain_second_pass(error)


# ---------------------------------------------------------------------- one file for all of them


def test_gradients_are_flattened_without_the_private_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = [drawn(2, 3), drawn(4, seed=1), drawn(3, 2, seed=2).T]
    expected = autograd.flatten(tensors)
    monkeypatch.delattr(torch._utils, "_flatten_dense_tensors")
    spec = importlib.util.spec_from_file_location("a_copy_of_autograd", autograd.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.flatten is copy._concatenate
    assert torch.equal(copy.flatten(tensors), expected)


ALLOWED = {"_foreach_mul", "_foreach_add_"}  # torch.optim's own
SOURCES = sorted(Path(autograd.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    "source", [path for path in SOURCES if path.name != "autograd.py"], ids=lambda path: path.stem
)
def test_other_files_of_the_engine_read_no_private_name(source: Path) -> None:
    tree = ast.parse(source.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    private = {
        node.attr
        for node in attributes
        if node.attr.startswith("_") and ast.unparse(node.value) not in ("self", "cls")
    }
    assert private <= ALLOWED | {"__init__", "_replace", "__getitem__"}
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [m for m in modules if m.startswith("torch") and "._" in m]
