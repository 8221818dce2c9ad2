"""Activation checkpoints: how often each engine computes a block again, and what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moo_balance import MGDA, BalancedOptimizer, BalanceError
from moo_balance.engine import Engine, PerLoss, Streaming, autograd
from moo_balance.engine.autograd import nodes_above
from moo_balance.engine.linear import find_linear_layers
from moo_balance.engine.streaming.partition import GraphCosts
from tests.support.engine_graphs import Graph, assert_same, drawn, gradient, naive_jacobian
from tests.support.engines import CutAt, everywhere

SAMPLES, WIDTH, DEPTH = 4, 16, 5
Wrapper = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Wide layers on few samples, for which factors would be cheaper; counts its own runs."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(DEPTH)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        self.runs = self.most_alive = 0
        self.measures = False

    def forward(self, value: Tensor) -> Tensor:
        self.runs += 1
        for layer in self.layers:
            value = torch.tanh(layer(value))
        if self.measures:
            self.most_alive = max(self.most_alive, alive())
        return self.norm(value)  # type: ignore[no-any-return]


def alive() -> int:
    """How many tensors have the shape of an activation."""
    tensors = [each for each in gc.get_objects() if type(each) is Tensor]
    return sum(tensor.shape == (SAMPLES, WIDTH) for tensor in tensors)


class Model(nn.Module):
    """Two blocks, each computed through `wrap`, and heads."""

    def __init__(self, wrap: Wrapper, heads: int = 3) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1).double() for _ in range(heads))
        self.wrap = wrap
        with torch.no_grad():
            for k, param in enumerate(self.parameters()):
                param.copy_(drawn(*param.shape, seed=k) / 4 + (param.ndim == 1))

    def built(self) -> Graph:
        self.features = self.wrap(
            self.second, self.wrap(self.first, drawn(SAMPLES, WIDTH, seed=99))
        )
        losses = [(head(self.features) - k).square().mean() for k, head in enumerate(self.heads)]
        return Graph(losses, list(self.parameters()))


def recomputed(block: nn.Module, value: Tensor) -> Tensor:
    return checkpoint(block, value, use_reentrant=False)  # type: ignore[no-any-return]


def counts(model: Model) -> dict[str, int]:
    """Recomputations of the two blocks, as they and as their batch norms counted them."""
    return {
        f"{name} {what}": int(number) - 1
        for name, block in (("first", model.first), ("second", model.second))
        for what, number in (("runs", block.runs), ("batches", block.norm.num_batches_tracked))
    }


ENGINES: dict[str, tuple[Engine, bool]] = {
    "per_loss": (PerLoss(), False),
    "per_loss-features": (PerLoss(), True),
    "streaming": (Streaming(), False),
    "streaming-cut": (CutAt(everywhere), False),
}
over_all = pytest.mark.parametrize(("engine", "at_features"), ENGINES.values(), ids=ENGINES)


@over_all
def test_a_checkpoint_is_computed_again_once_for_each_pass(
    engine: Engine, at_features: bool
) -> None:
    """A pass per loss, one more for the weighted sum of Streaming; at features only that one."""
    plain = Model(recomputed)
    jacobian = naive_jacobian(plain.built())
    assert set(counts(plain).values()) == {3}  # as K plain backward passes
    model = Model(recomputed)
    built, weights = model.built(), drawn(3, seed=5)
    features = [model.features] if at_features else []
    linearization = engine.linearize(built.problem(features=features))
    gramian = linearization.gramian()
    if not at_features:
        assert_same(gramian, jacobian @ jacobian.T)
    linearization.add_to_grad(weights)
    expected = 1 if at_features else 3 + (not isinstance(engine, PerLoss))
    assert set(counts(model).values()) == {expected}
    assert_same(gradient(built), weights @ jacobian)


@pytest.mark.parametrize("engine", [PerLoss(), CutAt(everywhere)], ids=["per_loss", "streaming"])
def test_no_more_activations_are_alive_than_in_plain_passes(engine: Engine) -> None:
    plain = Model(recomputed)
    plain.first.measures = plain.second.measures = True
    naive_jacobian(plain.built())
    model = Model(recomputed)
    before = alive()
    built = model.built()
    model.first.measures = model.second.measures = True
    linearization = engine.linearize(built.problem())
    linearization.gramian()
    # What enters a block, and the gradients of K losses where a block begins.
    assert alive() - before <= 3 + 2 * 3
    linearization.add_to_grad(torch.ones(3))
    for block, reference in ((model.first, plain.first), (model.second, plain.second)):
        assert block.most_alive - before <= reference.most_alive + 2 * 3


@pytest.mark.parametrize("engine", [PerLoss(), Streaming()], ids=["per_loss", "streaming"])
def test_an_optimizer_recomputes_as_often_as_plain_passes(engine: Engine) -> None:
    model = Model(recomputed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = BalancedOptimizer(sgd, MGDA(), engine=engine)
    losses = model.built().losses
    optimizer.backward({str(k): loss for k, loss in enumerate(losses)})
    optimizer.step()
    assert set(counts(model).values()) == {3 + isinstance(engine, Streaming)}


def selected(block: nn.Module, value: Tensor) -> Tensor:
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return checkpoint(block, value, use_reentrant=False, context_fn=keep)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", [PerLoss(), Streaming()], ids=["per_loss", "streaming"])
def test_a_selective_checkpoint_is_explained(engine: Engine) -> None:
    """PyTorch allows one backward pass through it. With features one is enough."""
    with pytest.raises(BalanceError, match="`features=`"):
        engine.linearize(Model(selected).built().problem()).gramian()
    model = Model(selected)
    problem = model.built().problem(features=[model.features])
    assert engine.linearize(problem).gramian().isfinite().all()


@pytest.mark.parametrize("engine", [PerLoss(), Streaming()], ids=["per_loss", "streaming"])
def test_the_explanation_needs_the_text_of_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "_SELECTIVE", "a text that pytorch does not have")
    with pytest.raises(RuntimeError, match="extra time"):
        engine.linearize(Model(selected).built().problem()).gramian()


# ---------------------------------------------------------------------- what is probed


def kept(block: nn.Module, value: Tensor) -> Tensor:
    return block(value)  # type: ignore[no-any-return]


def half_precision(block: nn.Module, value: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda tensor: tensor.float(), lambda packed: packed.double()):
        return block(value)  # type: ignore[no-any-return]


def on_host(block: nn.Module, value: Tensor) -> Tensor:
    with save_on_cpu():
        return block(value)  # type: ignore[no-any-return]


def nested(block: nn.Module, value: Tensor) -> Tensor:
    return checkpoint(  # type: ignore[no-any-return]
        lambda value: recomputed(block, value).tanh(), value, use_reentrant=False
    )


def factored(model: Model) -> int:
    problem = model.built().problem()
    return len(find_linear_layers(problem, nodes_above(problem.losses)))


@pytest.mark.parametrize("wrap", [recomputed, half_precision, on_host, nested])
def test_layers_whose_input_is_packed_are_not_factored(wrap: Wrapper) -> None:
    """What a hook packed is not read outside of a backward pass."""
    assert factored(Model(kept)) == 2 * DEPTH
    model = Model(wrap)
    assert factored(model) == 0
    assert model.first.runs == model.second.runs == 1


def test_hooks_that_pack_are_called_once_for_each_pass() -> None:
    """A hook of the user sees each saved tensor as often as K plain passes would show it."""
    unpacked = [0]

    def count(packed: Tensor) -> Tensor:
        unpacked[0] += 1
        return packed

    def counting(block: nn.Module, value: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: tensor, count):
            return block(value)  # type: ignore[no-any-return]

    naive_jacobian(Model(counting).built())
    expected, unpacked[0] = unpacked[0], 0
    PerLoss().linearize(Model(counting).built().problem()).gramian()
    assert unpacked[0] == expected


@pytest.mark.parametrize("name", ["_RAW", "_UNPACK"])
def test_without_the_private_names_checkpoints_are_not_probed_either(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    autograd._saved_names.cache_clear()
    monkeypatch.setattr(autograd, name, "a_name_that_pytorch_does_not_have")
    assert factored(Model(kept)) == 0
    model = Model(recomputed)
    jacobian = naive_jacobian(Model(recomputed).built())
    assert_same(PerLoss().linearize(model.built().problem()).gramian(), jacobian @ jacobian.T)
    assert model.first.runs == model.second.runs == 1 + 3


@pytest.fixture(autouse=True)
def _forget_names() -> Iterator[None]:
    yield
    autograd._saved_names.cache_clear()


# ---------------------------------------------------------------------- where Streaming cuts


def cuts_within(model: Model) -> int:
    """Cuts between the first and the last node of a block that are possible."""
    built = model.built()
    costs = GraphCosts(built.problem(), nodes_above(built.losses))
    return len(everywhere(costs))


def test_no_cut_is_made_within_a_checkpoint() -> None:
    """Each side of it would compute the whole block again."""
    outside = cuts_within(Model(recomputed))
    assert 0 < outside < cuts_within(Model(kept))
    assert cuts_within(Model(on_host)) > outside


def test_a_block_with_random_numbers_is_recomputed_with_the_same() -> None:
    def dropped(block: nn.Module, value: Tensor) -> Tensor:
        return recomputed(nn.Sequential(block, nn.Dropout(0.5)), value)

    torch.manual_seed(0)
    jacobian = naive_jacobian(Model(dropped).built())
    for engine in (PerLoss(), CutAt(everywhere)):
        torch.manual_seed(0)
        gramian = engine.linearize(Model(dropped).built().problem()).gramian()
        assert_same(gramian, jacobian @ jacobian.T)
