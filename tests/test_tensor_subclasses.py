"""Losses of a class of their own: plain tensors inside, with the graph of the loss."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import moo_balance._torch_internals as internals
from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceValueError, Sum
from moo_balance._validation import read_losses
from tests.support.problems import SmallModel, setup, sgd, snapshot, whole_state
from tests.support.registry import NAMES, over_each_method, over_kinds


class Tagged(Tensor):
    """A class that passes itself on to every result."""


class Labelled(Tensor):
    """Columns with names, as for a physics-informed network: a result of an operation has none."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, Labelled):
                value._labels  # noqa: B018  # raises where there are none
        return super().__torch_function__(function, types, args, kwargs or {})


def labelled(loss):
    """What remains of a labelled tensor after a reduction: the class, without labels."""
    return loss.as_subclass(Labelled)


class Shown(Tensor):
    """A class that acts on operators, and so may hold other values than it shows."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return super().__torch_dispatch__(function, types, args, kwargs or {})


CLASSES = {"Tagged": lambda loss: loss.as_subclass(Tagged), "Labelled": labelled}
over_classes = pytest.mark.parametrize("convert", CLASSES.values(), ids=CLASSES)


def train(method, convert):
    """All forms of a step; what autograd and the checkpoint hold at the end."""
    model, optimizer = setup(method)

    def losses(batch, names=NAMES):
        return {name: convert(loss) for name, loss in model.losses(batch, names).items()}

    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: losses(batch))  # noqa: B023
        optimizer.step()
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(lambda: losses(3))
    optimizer.backward(losses(4, "ab") if not method.observes else lambda: losses(4))
    optimizer.step()
    optimizer.zero_grad()
    combined = optimizer.combined_loss(losses(5))
    combined.backward()
    optimizer.step()
    optimizer.observe(losses(5))
    return model, optimizer, combined


def tensors_of(model, optimizer, combined):
    yield combined
    yield from optimizer.state_dict()["balance"]["state"].values()
    yield from optimizer.metrics.as_dict().values()
    for figures in (optimizer.metrics.losses, optimizer.metrics.weights):
        yield from figures.values()
    yield from (p.grad for p in model.parameters())
    for entry in optimizer.state.values():
        yield from entry.values()


@over_classes
@over_each_method
def test_training_is_that_of_plain_losses_with_plain_tensors_inside(method, convert):
    run, plain = train(method, convert), train(method, lambda loss: loss)
    assert whole_state(*run[:2]) == whole_state(*plain[:2])
    assert {type(tensor) for tensor in tensors_of(*run)} == {Tensor}
    file = io.BytesIO()
    torch.save(run[1].state_dict(), file)
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@over_kinds
def test_under_no_grad_the_graph_is_kept(method):
    model, optimizer = setup(method)
    losses = {name: labelled(loss) for name, loss in model.losses().items()}
    with torch.no_grad():
        optimizer.backward(losses)
    assert all(p.grad is not None for p in model.heads.parameters())


def test_faults_of_such_losses_are_named_as_of_plain_ones():
    optimizer = BalancedOptimizer(sgd(SmallModel()), Sum())
    for bad, message in (
        (labelled(torch.ones(3)), "shape"),
        (labelled(torch.ones(())), "attached"),
        (labelled(torch.zeros(())), "Leave it out"),
        (labelled(torch.ones((), dtype=torch.int64)), "int64"),
    ):
        with pytest.raises(BalanceValueError, match=f"`a`.*{message}"):
            optimizer.backward({"a": bad})


def test_a_parameter_is_a_loss_and_a_loss_keeps_its_place_in_the_graph():
    w = nn.Parameter(torch.tensor(2.0))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), MGDA())
    optimizer.backward({"a": w, "b": labelled(w.square())})
    assert type(w.grad) is Tensor
    assert w.grad == 1.0


def test_parameters_of_a_class_have_plain_gradients():
    class Noted(nn.Parameter):
        pass

    w = Noted(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1, momentum=0.9), MGDA())
    optimizer.step(lambda: {"a": w[0] ** 2, "b": labelled(w.sum())})
    assert type(w) is Noted
    assert type(w.grad) is Tensor
    assert type(optimizer.metrics.gramian) is Tensor


def test_a_class_that_acts_on_operators_stays():
    loss = torch.ones((), requires_grad=True).as_subclass(Shown)
    assert read_losses({"a": loss}, None)["a"] is loss


def test_plain_losses_are_passed_on_as_they_are():
    losses = SmallModel().losses()
    assert all(losses[name] is loss for name, loss in read_losses(losses, None).items())


def test_a_checkpoint_that_holds_such_a_state_loads_as_plain():
    method, convert = next(iter(over_each_method.args[1])), CLASSES["Tagged"]
    _, optimizer, _ = train(method, convert)
    saved = optimizer.state_dict()
    state = saved["balance"]["state"]
    saved["balance"]["state"] = {key: convert(value) for key, value in state.items()}
    optimizer.load_state_dict(saved)
    values = optimizer.state_dict()["balance"]["state"].values()
    assert {type(value) for value in values} <= {Tensor}


def test_without_the_private_name_a_class_is_asked(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(internals, "_no_subclass", nullcontext)
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), Sum())
    optimizer.backward({"a": CLASSES["Tagged"](w[0] ** 2), "b": w.sum()})
    assert snapshot(w.grad) == snapshot(torch.tensor([3.0, 1.0]))
    assert type(optimizer.metrics.losses["a"]) is Tensor


class Constructed(Tensor):
    """A subclass that is made in a way that PyTorch refuses under a dispatch mode."""

    def __new__(cls, values):
        return Tensor.__new__(cls, values)


def test_a_note_tells_why_a_subclass_cannot_be_constructed_where_writes_are_watched():
    weight = nn.Parameter(torch.ones(2))

    def losses(construct):
        one, other = (construct(torch.ones(2)).as_subclass(Tensor) * weight).square()
        return {"a": one, "b": other}

    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), FAMO())
    with pytest.raises(RuntimeError, match="new Tensor subclass") as caught:
        optimizer.step(partial(losses, Constructed))
    assert "construct it before, or by `tensor.as_subclass`" in caught.value.__notes__[0]
    optimizer.step(partial(losses, lambda values: values.as_subclass(Constructed)))
    assert weight.tolist() != [1.0, 1.0]
