"""BalancedOptimizer is an optimizer to everybody who asks, and balances what it is told to."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceError,
    FixedWeights,
    Sum,
)
from moo_balance.engine import PerLoss
from tests.problems import (
    Toy,
    adam,
    flat_gradient,
    gradients,
    jacobian,
    setup,
    sgd,
    snapshot,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over_methods, over_some


def grouped(model):
    return torch.optim.SGD(
        [{"params": model.trunk.parameters()}, {"params": model.heads.parameters(), "lr": 0.002}],
        lr=0.01,
        momentum=0.9,
    )


# ---------------------------------------------------------------------- an optimizer like any other


def test_it_is_an_optimizer_and_step_is_a_bound_method():
    optimizer = BalancedOptimizer(sgd(Toy()), Sum())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer


def test_groups_state_and_defaults_are_those_of_the_wrapped_optimizer():
    model = Toy()
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
    model = Toy()
    base = sgd(model)
    optimizer = BalancedOptimizer(base, Sum())
    for name in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(base, name))
        setattr(optimizer, name, value)
        assert getattr(base, name) is value


@over_methods
def test_nothing_is_written_into_the_wrapped_state(method):
    model, optimizer = setup(method, optimizer=adam)
    train(model, optimizer, range(2))
    plain = adam(twin := Toy())
    sum(twin.losses().values()).backward()
    plain.step()
    keys = {frozenset(entry) for entry in plain.state.values()}
    assert {frozenset(entry) for entry in optimizer.state.values()} == keys
    assert set(optimizer.state) <= set(model.parameters())
    assert set(optimizer.state_dict()) == {"state", "param_groups", "balance"}


def test_the_repr_shows_method_and_wrapped_optimizer():
    text = repr(BalancedOptimizer(adam(Toy()), AnalyticQP(projection="simplex")))
    assert text.startswith("BalancedOptimizer(AnalyticQP(projection='simplex'")
    assert "Adam (" in text


def test_hooks_are_called_once_on_the_wrapper():
    model = Toy()
    optimizer = BalancedOptimizer(adam(model), FAMO())
    calls = []

    def noted(name):
        def hook(hooked, *_):
            assert hooked is optimizer
            calls.append(name)

        return hook

    optimizer.register_step_pre_hook(noted("before step"))
    optimizer.register_step_post_hook(noted("after step"))
    optimizer.register_state_dict_pre_hook(noted("before saving"))
    optimizer.register_state_dict_post_hook(noted("after saving"))
    optimizer.register_load_state_dict_pre_hook(noted("before loading"))
    optimizer.register_load_state_dict_post_hook(noted("after loading"))
    for step in range(2):
        optimizer.step(lambda: model.losses(step))  # noqa: B023
    assert calls == ["before step", "after step"] * 2
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_a_hook_may_replace_the_arguments_of_a_step():
    model = Toy()
    optimizer = BalancedOptimizer(adam(model), Sum())
    hook = optimizer.register_step_pre_hook(lambda self, *_: ((self,), {"closure": model.losses}))
    assert optimizer.step().keys() == model.losses().keys()
    hook.remove()
    with pytest.raises(BalanceError, match="should follow"):
        optimizer.step()


def test_global_hooks_see_a_step_once():
    model, calls = Toy(), []
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
    optimizer = BalancedOptimizer(adam(Toy()), Sum())
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
    model = Toy()
    base = adam(model)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append("stepped"))
    train(model, BalancedOptimizer(base, Sum()), range(2))
    assert calls == ["stepped"] * 2


def test_a_step_returns_what_its_closure_returned():
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), FAMO())
    losses = optimizer.step(model.losses)
    assert list(losses) == list(NAMES)
    assert all(loss.requires_grad for loss in losses.values())


def test_backward_returns_the_losses():
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    losses = model.losses()
    assert optimizer.backward(losses) is losses
    assert snapshot(optimizer.backward(model.losses)) == snapshot(losses)


def test_a_trainer_may_give_a_closure_of_its_own():
    """As Lightning does: the closure has called combine and backward, and returns anything."""
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), FAMO(lagged=True))
    twin = Toy()
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


def test_a_trainer_may_leave_out_a_batch():
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    before = whole_state(model, optimizer)
    assert optimizer.step(lambda: None) is None
    assert whole_state(model, optimizer) == before


def test_a_step_at_rate_zero_needs_no_losses():
    """Distributed checkpoints make up a fresh optimizer's state that way."""
    model = Toy()
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
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    optimizer.backward(model.losses())
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert gradients(model) == [None] * len(gradients(model))
    else:
        assert all(not grad.any() for grad in gradients(model))
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()


def test_zero_grad_between_combine_and_backward_keeps_the_step():
    """Trainers clear gradients there."""
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), Sum())
    combined = optimizer.combined_loss(model.losses())
    optimizer.zero_grad()
    combined.backward()
    optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 1


# ---------------------------------------------------------------------- parameter groups


def test_groups_of_different_rates_step_at_their_own():
    model, twin = Toy(), Toy()
    optimizer, plain = BalancedOptimizer(grouped(model), Sum()), grouped(twin)
    for step in range(3):
        train(model, optimizer, [step], ("a", "b"))
        plain.zero_grad()
        sum(twin.losses(step, ("a", "b")).values()).backward()
        plain.step()
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


@over_some("Sum", "FAMO-adam", "MGDA-none")
def test_a_group_added_later_is_trained_and_measured(method):
    model = Toy()
    base = torch.optim.SGD(model.trunk.parameters(), lr=0.01)
    optimizer = BalancedOptimizer(base, method.make(NAMES))
    before = snapshot(model.heads.state_dict())
    train(model, optimizer, [0])
    assert snapshot(model.heads.state_dict()) == before
    optimizer.add_param_group({"params": list(model.heads.parameters()), "lr": 0.02})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    optimizer.zero_grad()
    train(model, optimizer, [1])
    assert snapshot(model.heads.state_dict()) != before
    if method.gramian:
        optimizer.backward(model.losses())
        rows = jacobian(model.losses(), list(model.parameters()))
        torch.testing.assert_close(optimizer.metrics.gramian, rows @ rows.T)


# ---------------------------------------------------------------------- which parameters


@over_some("MGDA-none", "AnalyticQP")
@pytest.mark.parametrize("as_module", [True, False])
def test_params_restrict_the_measure_and_nothing_else(method, as_module):
    model = Toy()
    shared = model.trunk if as_module else list(model.trunk.parameters())
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES), shared_params=shared)
    optimizer.backward(model.losses())
    inner = jacobian(model.losses(), list(model.trunk.parameters()))
    torch.testing.assert_close(optimizer.metrics.gramian, inner @ inner.T, rtol=1e-12, atol=0)
    coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
    rows = jacobian(model.losses(), list(model.parameters()))
    torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)


def test_params_survive_a_copy_as_the_copy_s_own():
    model = Toy()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), shared_params=model.trunk)
    for model, optimizer in (  # noqa: B020
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        optimizer.backward(model.losses())
        inner = jacobian(model.losses(), list(model.trunk.parameters()))
        torch.testing.assert_close(optimizer.metrics.gramian, inner @ inner.T)


def test_params_may_include_frozen_ones():
    model = Toy()
    model.trunk.bias.requires_grad_(False)
    optimizer = BalancedOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        MGDA(),
        shared_params=model.trunk,
    )
    train(model, optimizer, range(2))


@over_methods
def test_frozen_parameters_are_left_alone(method):
    model, optimizer = setup(method)
    model.trunk.weight.requires_grad_(False)
    before = snapshot(model.trunk.weight)
    train(model, optimizer, range(3))
    assert model.trunk.weight.grad is None
    assert snapshot(model.trunk.weight) == before
    model.trunk.weight.requires_grad_(True)  # a later phase of training
    train(model, optimizer, range(3, 5))
    assert snapshot(model.trunk.weight) != before


@over_methods
def test_parameters_that_no_loss_reaches_are_no_reason_to_fail(method):
    model = Toy()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = BalancedOptimizer(
        torch.optim.Adam([*model.parameters(), unused], lr=0.01), method.make(NAMES)
    )
    twin, other = setup(method, optimizer=adam)
    for step in range(3):
        train(model, optimizer, [step])
        train(twin, other, [step])
    assert unused.grad is None
    assert unused.tolist() == [1.0] * 3
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


@over_methods
def test_a_loss_that_reaches_no_trained_parameter_counts_as_zero(method):
    """Say, that of a part which another optimizer trains."""
    model = Toy()
    elsewhere = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))

    def losses(step):
        return {**model.losses(step, ("a", "b")), "c": 1 + elsewhere.square()}

    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: losses(step))  # noqa: B023
        rows = jacobian(losses(step), list(model.parameters()))
        assert not rows[2].any()
        coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
        assert bool(coefficients.isfinite().all())
        torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)
        optimizer.step()


@over_methods
def test_with_all_parameters_frozen_a_step_does_nothing(method):
    model, optimizer = setup(method)
    before = snapshot(model.state_dict())
    model.requires_grad_(False)
    elsewhere = nn.Parameter(torch.ones((), dtype=torch.float64))
    for _ in range(3):
        optimizer.step(lambda: {name: loss + elsewhere for name, loss in model.losses().items()})
    assert snapshot(model.state_dict()) == before


@over_some("Sum", "MGDA-none", "FAMO-lagged")
def test_a_parameter_shared_by_two_modules_counts_once(method):
    model = Toy()
    model.heads[1].weight = model.heads[0].weight
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    params = list(model.parameters())
    optimizer.backward(model.losses())
    rows = jacobian(model.losses(), params)
    coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
    torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- between backward and step


@over_methods
def test_clipping_between_backward_and_step(method):
    model, optimizer = setup(method, optimizer=sgd)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    optimizer.backward(model.losses())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((after - before).norm()) <= 0.01 * 0.1 * (1 + 1e-9)


@over_methods
def test_retain_graph_keeps_the_graph_and_nothing_else_does(method):
    model, optimizer = setup(method)
    losses = model.losses()
    optimizer.backward(losses, retain_graph=True)
    once = flat_gradient(model)
    optimizer.backward(losses)
    torch.testing.assert_close(flat_gradient(model), 2 * once, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses)


def test_the_gradients_handed_out_belong_to_nobody_else():
    """Autograd hands the two parts of a sum the same memory; clipping must not meet it twice."""
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    for weighting in (Sum(), MGDA()):
        optimizer = BalancedOptimizer(torch.optim.SGD([one, other], lr=0.1), weighting)
        optimizer.zero_grad()
        optimizer.backward({"a": (one + other).sum(), "b": (one + other).sum()})
        one.grad.mul_(0)
        assert other.grad.tolist() != [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_has_one_gradient():
    weight = nn.Parameter(torch.ones(3))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight, weight], lr=0.1), MGDA())
    optimizer.backward({"a": weight.sum(), "b": 2.0 * weight.sum()})
    assert optimizer.metrics.gramian.tolist() == [[3.0, 6.0], [6.0, 12.0]]
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_gradient_with_a_graph_keeps_it():
    weight, other = (nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.5), Sum())
    optimizer.backward({"a": weight.square()})
    weight.grad = weight.grad + 3.0 * other
    optimizer.step()
    assert weight.item() == -3.0
    weight.grad.backward()
    assert other.grad.item() == 3.0


def test_the_engine_may_be_chosen():
    model = Toy().float()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), engine=PerLoss(dtype=torch.float64))
    optimizer.backward(model.losses())
    assert optimizer.metrics.gramian.dtype == torch.float64


# ---------------------------------------------------------------------- accumulation


@pytest.mark.capability("gradient accumulation")
@over_methods
def test_a_window_of_micro_batches_is_one_batch_of_their_sums(method):
    model, optimizer = setup(method)
    twin, other = setup(method)

    def micro(batch):
        return lambda: model.losses(batch)

    def whole(batches):
        def losses():
            parts = [twin.losses(batch) for batch in batches]
            return {name: sum(part[name] for part in parts) for name in NAMES}

        return losses

    for first in (0, 3, 6):
        optimizer.zero_grad()
        for batch in (first, first + 1):
            with optimizer.accumulate():
                optimizer.backward(micro(batch))
        optimizer.backward(micro(first + 2))
        optimizer.step()
        other.zero_grad()
        other.backward(whole(range(first, first + 3)))
        torch.testing.assert_close(flat_gradient(model), flat_gradient(twin), rtol=1e-7, atol=1e-9)
        other.step()
        for kind in ("losses", "weights", "coefficients"):
            found = torch.stack([*getattr(optimizer.metrics, kind).values()])
            expected = torch.stack([*getattr(other.metrics, kind).values()])
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------- every, and who watches


@over_some("AnalyticQP-every", "MGDA-every", "MGDA-log-every")
def test_between_two_refreshes_no_gramian_is_taken_and_weights_stay(method, monkeypatch):
    model, optimizer = setup(method)
    every = optimizer.weighting.every
    weights = []
    for step in range(2 * every):
        train(model, optimizer, [step])
        assert (optimizer.metrics.gramian is not None) == (step % every == 0)
        assert (optimizer.metrics.cosines != {}) == (step % every == 0)
        weights.append(torch.stack([*optimizer.metrics.weights.values()]))
    for window in (weights[:every], weights[every:]):
        for later in window:
            torch.testing.assert_close(later, window[0], rtol=1e-14, atol=0)
    assert not torch.allclose(weights[0], weights[every])


@over_some("FAMO-every", "BalancedTrajectory-every")
def test_between_two_watched_steps_nothing_has_to_be_shown(method):
    model, optimizer = setup(method)
    every = optimizer.weighting.every
    for step in range(2 * every):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()
        waiting = optimizer.state_dict()["balance"]["awaiting"]
        assert waiting == (list(NAMES) if step % every == 0 else None)
        if waiting:
            optimizer.observe(model.losses(step))


def test_lagged_uses_the_losses_of_the_next_batch():
    """On one and the same batch they are the losses after the step."""
    watching, lagging = Toy(), Toy()
    one = BalancedOptimizer(sgd(watching), FAMO())
    other = BalancedOptimizer(sgd(lagging), FAMO(lagged=True))
    for _ in range(5):
        train(watching, one, [0])
        train(lagging, other, [0])
        coefficients = [snapshot(run.metrics.coefficients) for run in (one, other)]
        assert coefficients[0] == coefficients[1]
    assert snapshot(watching.state_dict()) == snapshot(lagging.state_dict())


def test_the_weighting_is_there_to_be_asked():
    weighting = FixedWeights({"a": 1.0})
    assert BalancedOptimizer(sgd(Toy()), weighting).weighting is weighting
