"""Optimizers with methods of their own: schedule-free ones, those with two steps, with closures."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    BalancedOptimizer,
    BalancedTrajectory,
    BalanceError,
    BalanceValueError,
    MovingAverage,
    Sum,
)
from moo_balance.errors import NonFiniteError
from tests.support.companions import SAM, ScheduleFree
from tests.support.problems import (
    SmallModel,
    sgd,
    snapshot,
    spoil_gradient,
    train,
    train_plainly,
    whole_state,
)
from tests.support.registry import FIRST_OF_EACH, KINDS, NAMES, over, over_kinds


def sam(model):
    return SAM(model.parameters(), torch.optim.SGD, lr=0.001, momentum=0.9)


# ---------------------------------------------------------------------- what is public


def test_modes_of_a_schedule_free_optimizer_are_reached_through_the_wrapper():
    def run(model, optimizer, step):
        for epoch in range(3):
            if hasattr(optimizer, "train"):
                optimizer.train()
            step(model, optimizer, range(3 * epoch, 3 * epoch + 3))
            if hasattr(optimizer, "eval"):
                optimizer.eval()
            yield snapshot(model.state_dict())

    model, twin = SmallModel(), SmallModel()
    wrapped = BalancedOptimizer(ScheduleFree(model.parameters(), lr=0.01), Sum())
    plain = ScheduleFree(twin.parameters(), lr=0.01)
    assert list(run(model, wrapped, train)) == list(run(twin, plain, train_plainly))
    with pytest.raises(RuntimeError, match="train mode"):
        train(model, wrapped, [0])


def test_public_attributes_of_the_wrapped_optimizer_are_forwarded_and_private_ones_are_not():
    base = sam(SmallModel())
    base._secret = 3
    optimizer = BalancedOptimizer(base, Sum())
    assert optimizer.base_optimizer is base.base_optimizer
    assert {"base_optimizer", "first_step", "backward"} <= set(dir(optimizer))
    assert not hasattr(optimizer, "_secret")
    assert "_secret" not in dir(optimizer)
    plain = BalancedOptimizer(sgd(SmallModel()), Sum())
    for name in ("train", "eval", "first_step", "second_step", "unheard_of"):
        assert not hasattr(plain, name)
        message = f"neither BalancedOptimizer nor the wrapped SGD has an attribute '{name}'"
        with pytest.raises(AttributeError, match=message):
            getattr(plain, name)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_made_without_asking_a_wrapped_optimizer_that_is_not_there_yet(duplicate):
    model = SmallModel()
    optimizer = BalancedOptimizer(ScheduleFree(model.parameters(), lr=0.01), MGDA())
    train(model, optimizer, range(2))
    other = duplicate(optimizer)
    assert type(other) is BalancedOptimizer
    other.eval()
    assert not other.param_groups[0]["train_mode"]
    empty = BalancedOptimizer.__new__(BalancedOptimizer)
    for name in ("step_", "param_groups", "first_step", "__deepcopy__"):
        assert not hasattr(empty, name)


# ---------------------------------------------------------------------- two steps


def two_steps(model, optimizer, batches, names=NAMES):
    for batch in batches:
        optimizer.backward(lambda: model.losses(batch, names))  # noqa: B023
        optimizer.first_step(zero_grad=True)
        optimizer.backward(lambda: model.losses(batch, names))  # noqa: B023
        optimizer.second_step(zero_grad=True)


def test_sharpness_aware_training_with_sum_is_plain_sharpness_aware_training():
    model, twin = SmallModel(), SmallModel()
    optimizer, plain = BalancedOptimizer(sam(model), Sum()), sam(twin)
    two_steps(model, optimizer, range(4))
    for batch in range(4):
        for step in (plain.first_step, plain.second_step):
            torch.stack([*twin.losses(batch).values()]).sum().backward()
            step(zero_grad=True)
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())
    assert optimizer.state_dict()["balance"]["steps"] == 4


def fits_two_steps(method):
    """Not if it needs the losses after the step, or takes the step for each loss."""
    rows = method.make(NAMES).needs(0).rows
    return method.kind != "observing" and not (rows and rows.steps_apart)


@over(lambda method: method in FIRST_OF_EACH and fits_two_steps(method))
def test_only_the_second_gradient_counts_as_a_step(method):
    """Against the same two gradients by hand, of which the second is a step of plain SGD."""
    model, twin = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(sam(model), method.make(NAMES))
    base = torch.optim.SGD(twin.parameters(), lr=0.001, momentum=0.9)
    other = BalancedOptimizer(base, method.make(NAMES))
    for batch in range(4):
        two_steps(model, optimizer, [batch])

        other.zero_grad()
        other.backward(lambda: twin.losses(batch))  # noqa: B023
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        before = [p.detach().clone() for p in twin.parameters()]
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        other.zero_grad()
        other.backward(lambda: twin.losses(batch))  # noqa: B023
        for p, value in zip(twin.parameters(), before, strict=True):
            p.data = value
        other.step()
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())
    assert snapshot(optimizer.state_dict()["balance"]) == snapshot(other.state_dict()["balance"])


def test_step_hooks_run_with_the_second_step_only():
    model, calls = SmallModel(), []
    optimizer = BalancedOptimizer(sam(model), FAMO(lagged=True))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    two_steps(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


@over(lambda method: method in KINDS and method.kind != "observing")
def test_steps_in_another_order_are_refused_and_change_nothing(method):
    model = SmallModel()
    optimizer = BalancedOptimizer(sam(model), method.make(NAMES))
    two_steps(model, optimizer, [0])

    def refuse(call, message):
        before = whole_state(model, optimizer)
        with pytest.raises(BalanceError, match=message):
            call()
        assert whole_state(model, optimizer) == before

    refuse(optimizer.first_step, "`first_step` should follow `backward`")
    refuse(optimizer.second_step, "`second_step` should follow `first_step`")
    for closure in (None, lambda: model.losses(1)):
        refuse(lambda closure=closure: optimizer.step(closure), "first_step.*second_step")
    optimizer.backward(lambda: model.losses(1))
    refuse(optimizer.step, "SAM takes two gradients.*first_step.*second_step")
    refuse(optimizer.second_step, "`second_step` should follow `first_step`")
    optimizer.first_step(zero_grad=True)
    refuse(optimizer.second_step, "`second_step` should follow `backward`")
    optimizer.backward(lambda: model.losses(1))
    refuse(optimizer.first_step, "would lose the parameters")
    refuse(optimizer.step, "first_step.*second_step")
    optimizer.second_step(zero_grad=True)
    with optimizer.accumulate():
        optimizer.backward(lambda: model.losses(2))
    refuse(optimizer.first_step, "closes a window")


@over(lambda method: method in KINDS and method.kind != "observing")
def test_a_gradient_scaler_is_refused_before_anything_is_scaled(method):
    model = SmallModel()
    optimizer = BalancedOptimizer(sam(model), method.make(NAMES))
    scaler = torch.amp.GradScaler("cpu")
    for call in (optimizer.backward, optimizer.combined_loss):
        with pytest.raises(BalanceError, match=r"SAM.*GradScaler.*bfloat16"):
            call(model.losses(), grad_scaler=scaler)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(model.losses(), grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    scaler.scale(torch.ones(()))  # as a loop that scales another loss
    with pytest.raises(BalanceError, match="no scale"):
        scaler.step(optimizer)


@pytest.mark.parametrize("weighting", [Sum(), MGDA()], ids=repr)
def test_a_gradient_that_is_not_finite_moves_nothing_and_can_be_repeated(weighting):
    model, twin = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(sam(model), weighting)

    def spoiled():
        optimizer.backward(spoil_gradient(model.losses(), math.nan))

    for step in (optimizer.first_step, optimizer.second_step):
        before = whole_state(model, optimizer)
        with pytest.raises(NonFiniteError):
            (spoiled(), step())
        assert whole_state(model, optimizer) == before
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        step(zero_grad=True)
    two_steps(twin, other := BalancedOptimizer(sam(twin), weighting), [0])
    assert whole_state(model, optimizer) == whole_state(twin, other)


def test_a_step_that_cannot_be_skipped_is_not_promised_to_be():
    with pytest.raises(BalanceValueError, match=r"`nonfinite`.*'raise' with SAM.*Found 'skip'"):
        BalancedOptimizer(sam(SmallModel()), Sum(), nonfinite="skip")


@pytest.mark.parametrize(
    ("weighting", "lagged"),
    [
        (FAMO(), "FAMO(lagged=True)"),
        (BalancedTrajectory(every=2), "BalancedTrajectory(lagged=True)"),
        (MovingAverage(FAMO()), "MovingAverage(FAMO(lagged=True))"),
    ],
    ids=repr,
)
def test_a_method_that_would_compare_losses_at_other_parameters_is_refused(weighting, lagged):
    base = sam(SmallModel())
    message = f"`weighting`.*SAM.*Found {type(weighting).__name__}. Choose {re.escape(lagged)}"
    with pytest.raises(BalanceValueError, match=message):
        BalancedOptimizer(base, weighting)


# ---------------------------------------------------------------------- closures


class Needs(torch.optim.SGD):
    def step(self, closure):
        raise AssertionError("not reached")


class NeedsByKeyword(torch.optim.SGD):
    def step(self, *, loss):
        raise AssertionError("not reached")


class Asks(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("Asks requires a closure.")


@pytest.mark.parametrize(("cls", "name"), [(Needs, "closure"), (NeedsByKeyword, "loss")])
def test_an_optimizer_whose_step_needs_an_argument_is_refused(cls, name):
    base = cls(SmallModel().parameters(), lr=0.1)
    with pytest.raises(BalanceValueError, match=f"`optimizer`.*{cls.__name__}.*needs `{name}`"):
        BalancedOptimizer(base, Sum())


def test_any_other_signature_is_taken():
    class Free(torch.optim.SGD):
        def step(self, *args, loss=None, **kwargs):
            return super().step(*args, **kwargs)

    model = SmallModel()
    train(model, BalancedOptimizer(Free(model.parameters(), lr=0.01), Sum()), range(2))


@over_kinds
def test_an_optimizer_that_asks_for_a_closure_in_its_step_commits_nothing(method):
    model = SmallModel()
    optimizer = BalancedOptimizer(Asks(model.parameters(), lr=0.1), method.make(NAMES))
    before = whole_state(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="requires a closure"):
            optimizer.step(model.losses)
        assert whole_state(model, optimizer) == before
    optimizer.backward(lambda: model.losses())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="requires a closure"):
            optimizer.step()
        assert whole_state(model, optimizer) == before
