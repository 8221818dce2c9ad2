"""BalancedOptimizer is a torch optimizer: groups, state and hooks are those of the wrapped one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from moo_balance import FAMO, BalancedOptimizer, BalanceError, GradientNorms, Sum
from tests.support.problems import (
    SmallModel,
    adam,
    gradients,
    grouped,
    setup,
    sgd,
    snapshot,
    train,
    train_plainly,
    whole_state,
)
from tests.support.registry import NAMES, over_kinds


def test_the_wrapper_is_an_optimizer_and_step_is_a_bound_method():
    optimizer = BalancedOptimizer(sgd(SmallModel()), Sum())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer


def test_groups_state_and_defaults_are_those_of_the_wrapped_optimizer():
    model = SmallModel()
    base = grouped(model)
    optimizer = BalancedOptimizer(base, Sum())
    train(model, optimizer, [0])
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(base, name)
    base.load_state_dict(copy.deepcopy(base.state_dict()))  # makes new lists and dicts
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(base, name)


def test_assigned_groups_and_state_reach_the_wrapped_optimizer():
    """Some frameworks assign them anew when they move a model."""
    model = SmallModel()
    base = sgd(model)
    optimizer = BalancedOptimizer(base, Sum())
    for name in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(base, name))
        setattr(optimizer, name, value)
        assert getattr(base, name) is value


@over_kinds
def test_nothing_is_written_into_the_wrapped_state(method):
    model, optimizer = setup(method, optimizer=adam)
    train(model, optimizer, range(2))
    plain = adam(twin := SmallModel())
    train_plainly(twin, plain, [0])
    keys = {frozenset(entry) for entry in plain.state.values()}
    assert {frozenset(entry) for entry in optimizer.state.values()} == keys
    assert set(optimizer.state) <= set(model.parameters())
    assert set(optimizer.state_dict()) == {"state", "param_groups", "balance"}


def test_hooks_are_called_once_on_the_wrapper():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), FAMO())
    calls = []

    def note(name):
        def hook(hooked, *_):
            assert hooked is optimizer
            calls.append(name)

        return hook

    optimizer.register_step_pre_hook(note("before step"))
    optimizer.register_step_post_hook(note("after step"))
    optimizer.register_state_dict_pre_hook(note("before saving"))
    optimizer.register_state_dict_post_hook(note("after saving"))
    optimizer.register_load_state_dict_pre_hook(note("before loading"))
    optimizer.register_load_state_dict_post_hook(note("after loading"))
    for step in range(2):
        optimizer.step(lambda: model.losses(step))  # noqa: B023
    assert calls == ["before step", "after step"] * 2
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_a_hook_may_replace_the_arguments_of_a_step():
    model = SmallModel()
    optimizer = BalancedOptimizer(adam(model), Sum())
    hook = optimizer.register_step_pre_hook(lambda self, *_: ((self,), {"closure": model.losses}))
    assert optimizer.step().keys() == model.losses().keys()
    hook.remove()
    with pytest.raises(BalanceError, match="should follow"):
        optimizer.step()


def test_global_hooks_see_a_step_once():
    model, calls = SmallModel(), []
    base = adam(model)
    optimizer = BalancedOptimizer(base, Sum())
    hooks = [
        register_optimizer_step_pre_hook(lambda hooked, *_: calls.append(hooked)),
        register_optimizer_step_post_hook(lambda hooked, *_: calls.append(hooked)),
    ]
    optimizer.step(model.losses)
    for hook in hooks:
        hook.remove()
    assert calls == [base, base]


def test_hooks_may_replace_what_is_saved_and_loaded():
    optimizer = BalancedOptimizer(adam(SmallModel()), Sum())
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "rate": 0.5})

    def with_rate(_, state):
        groups = [{**group, "lr": state["rate"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(with_rate)
    saved = optimizer.state_dict()
    assert saved["rate"] == 0.5
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    assert [group["lr"] for group in saved["param_groups"]] == [0.01]


def test_hooks_of_the_wrapped_optimizer_still_run():
    model = SmallModel()
    base = adam(model)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append("stepped"))
    train(model, BalancedOptimizer(base, Sum()), range(2))
    assert calls == ["stepped"] * 2


def test_a_step_returns_what_its_closure_returned():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), FAMO())
    losses = optimizer.step(model.losses)
    assert list(losses) == list(NAMES)
    assert all(loss.requires_grad for loss in losses.values())


def test_backward_returns_the_losses():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    losses = model.losses()
    assert optimizer.backward(losses) is losses
    assert snapshot(optimizer.backward(model.losses)) == snapshot(losses)


def test_a_trainer_may_give_a_closure_of_its_own():
    """As Lightning does: it has called combined_loss and backward, and returns anything."""
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), FAMO(lagged=True))
    twin = SmallModel()
    other = BalancedOptimizer(sgd(twin), FAMO(lagged=True))
    for step in range(3):

        def closure(step=step):
            combined = optimizer.combined_loss(model.losses(step))
            optimizer.zero_grad()
            combined.backward()
            return combined.detach()

        assert isinstance(optimizer.step(closure), torch.Tensor)
        train(twin, other, [step])
    assert whole_state(model, optimizer) == whole_state(twin, other)


def test_a_closure_may_return_nothing_to_leave_out_a_batch():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    before = whole_state(model, optimizer)
    assert optimizer.step(lambda: None) is None
    assert whole_state(model, optimizer) == before


def test_a_step_at_rate_zero_needs_no_losses():
    """Distributed checkpoints make up a fresh optimizer's state that way."""
    model = SmallModel()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=0.0), FAMO())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = snapshot(model.state_dict())
    optimizer.step(closure=None)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert snapshot(model.state_dict()) == before
    assert optimizer.state_dict()["balance"]["steps"] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_like_the_wrapped_optimizer(set_to_none):
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    optimizer.backward(model.losses())
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert gradients(model) == [None] * len(gradients(model))
    else:
        assert all(not grad.any() for grad in gradients(model))
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()


def test_zero_grad_between_combined_loss_and_backward_keeps_the_step():
    """Trainers clear gradients there."""
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    combined = optimizer.combined_loss(model.losses())
    optimizer.zero_grad()
    combined.backward()
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 1


@pytest.mark.parametrize("call", ["zero_grad", "backward"])
def test_a_step_of_the_optimizer_inside_is_told(call):
    model = SmallModel()
    inner = sgd(model)
    optimizer = BalancedOptimizer(inner, GradientNorms(every=2))
    for _ in range(3):
        optimizer.backward(model.losses())
        inner.step()
    following = {"zero_grad": (), "backward": (model.losses(),)}[call]
    with pytest.warns(UserWarning, match="Found parameters that have changed without it"):
        getattr(optimizer, call)(*following)


def test_gradients_may_be_discarded_without_a_step():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), GradientNorms(every=2))
    for _ in range(2):
        optimizer.backward(model.losses())
        optimizer.zero_grad()
