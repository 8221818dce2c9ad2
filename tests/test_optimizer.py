"""BalancedOptimizer: which parameters it balances, and what it does between backward and step."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moo_balance import FAMO, MGDA, BalancedOptimizer, BalanceError, FixedWeights, Sum
from moo_balance.engine import PerLoss
from moo_balance.integrations.accelerate import backward as accelerate_backward
from tests.support.problems import (
    SmallModel,
    adam,
    as_vector,
    flat_gradient,
    gradients,
    grouped,
    jacobian,
    setup,
    sgd,
    snapshot,
    train,
    train_plainly,
)
from tests.support.registry import NAMES, over, over_kinds, over_some

# ---------------------------------------------------------------------- parameter groups


def test_groups_of_different_rates_step_at_their_own():
    model, twin = SmallModel(), SmallModel()
    optimizer, plain = BalancedOptimizer(grouped(model), Sum()), grouped(twin)
    train(model, optimizer, range(3))
    train_plainly(twin, plain, range(3))
    assert snapshot(model.state_dict()) == snapshot(twin.state_dict())


@over_some("Sum", "FAMO-adam", "MGDA-none")
def test_a_group_added_later_is_trained_and_part_of_the_gramian(method):
    model = SmallModel()
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
def test_shared_params_restrict_the_gramian_and_nothing_else(method, as_module):
    model = SmallModel()
    shared = model.trunk if as_module else list(model.trunk.parameters())
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES), shared_params=shared)
    optimizer.backward(model.losses())
    inner = jacobian(model.losses(), list(model.trunk.parameters()))
    torch.testing.assert_close(optimizer.metrics.gramian, inner @ inner.T, rtol=1e-12, atol=0)
    coefficients = as_vector(optimizer.metrics.coefficients)
    rows = jacobian(model.losses(), list(model.parameters()))
    torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)


def test_shared_params_of_a_copy_are_its_own():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), shared_params=model.trunk)
    for model, optimizer in (  # noqa: B020
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        optimizer.backward(model.losses())
        inner = jacobian(model.losses(), list(model.trunk.parameters()))
        torch.testing.assert_close(optimizer.metrics.gramian, inner @ inner.T)


def test_shared_params_may_be_frozen():
    model = SmallModel()
    model.trunk.bias.requires_grad_(False)
    optimizer = BalancedOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        MGDA(),
        shared_params=model.trunk,
    )
    train(model, optimizer, range(2))


@over_kinds
def test_frozen_parameters_get_no_gradient_until_they_are_released(method):
    model, optimizer = setup(method)
    model.trunk.weight.requires_grad_(False)
    before = snapshot(model.trunk.weight)
    train(model, optimizer, range(3))
    assert model.trunk.weight.grad is None
    assert snapshot(model.trunk.weight) == before
    model.trunk.weight.requires_grad_(True)  # a later phase of training
    train(model, optimizer, range(3, 5))
    assert snapshot(model.trunk.weight) != before


@over_kinds
def test_parameters_that_no_loss_reaches_get_no_gradient(method):
    model = SmallModel()
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


@over_kinds
def test_a_loss_that_reaches_no_trained_parameter_counts_as_zero(method):
    """For example that of a part which another optimizer trains."""
    model = SmallModel()
    elsewhere = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))

    def losses(step):
        return {**model.losses(step, ("a", "b")), "c": 1 + elsewhere.square()}

    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: losses(step))  # noqa: B023
        rows = jacobian(losses(step), list(model.parameters()))
        assert not rows[2].any()
        coefficients = as_vector(optimizer.metrics.coefficients)
        assert bool(coefficients.isfinite().all())
        torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)
        optimizer.step()


@over_kinds
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
    model = SmallModel()
    model.heads[1].weight = model.heads[0].weight
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    params = list(model.parameters())
    optimizer.backward(model.losses())
    rows = jacobian(model.losses(), params)
    coefficients = as_vector(optimizer.metrics.coefficients)
    torch.testing.assert_close(flat_gradient(model), coefficients @ rows, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- between backward and step


@over_kinds
def test_clipping_between_backward_and_step(method):
    model, optimizer = setup(method, optimizer=sgd)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    optimizer.backward(model.losses())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((after - before).norm()) <= 0.01 * 0.1 * (1 + 1e-9)


@over_kinds
def test_retain_graph_keeps_the_graph_and_nothing_else_does(method):
    model, optimizer = setup(method)
    losses = model.losses()
    optimizer.backward(losses, retain_graph=True)
    once = flat_gradient(model)
    optimizer.backward(losses)
    torch.testing.assert_close(flat_gradient(model), 2 * once, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses)


def test_gradients_share_no_memory():
    """Autograd gives the two parts of a sum the same memory, which clipping would scale twice."""
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


def test_a_gradient_that_was_assigned_with_a_graph_keeps_it():
    weight, other = (nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.5), Sum())
    optimizer.backward({"a": weight.square()})
    weight.grad = weight.grad + 3.0 * other
    optimizer.step()
    assert weight.item() == -3.0
    weight.grad.backward()
    assert other.grad.item() == 3.0


def test_the_engine_may_be_chosen():
    model = SmallModel().float()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), engine=PerLoss(dtype=torch.float64))
    optimizer.backward(model.losses())
    assert optimizer.metrics.gramian.dtype == torch.float64


# ---------------------------------------------------------------------- every, lagged


@over_some("AnalyticQP-every", "MGDA-every", "MGDA-log-every")
def test_between_two_refreshes_no_gramian_is_taken_and_weights_stay(method, monkeypatch):
    model, optimizer = setup(method)
    every = optimizer.weighting.every
    weights = []
    for step in range(2 * every):
        train(model, optimizer, [step])
        assert (optimizer.metrics.gramian is not None) == (step % every == 0)
        assert (optimizer.metrics.cosines != {}) == (step % every == 0)
        weights.append(as_vector(optimizer.metrics.weights))
    for window in (weights[:every], weights[every:]):
        for later in window:
            torch.testing.assert_close(later, window[0], rtol=1e-14, atol=0)
    assert not torch.allclose(weights[0], weights[every])


@over_some("FAMO-every", "BalancedTrajectory-every")
def test_between_two_observed_steps_nothing_has_to_be_observed(method):
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
    watching, lagging = SmallModel(), SmallModel()
    one = BalancedOptimizer(sgd(watching), FAMO())
    other = BalancedOptimizer(sgd(lagging), FAMO(lagged=True))
    for _ in range(5):
        train(watching, one, [0])
        train(lagging, other, [0])
        coefficients = [snapshot(run.metrics.coefficients) for run in (one, other)]
        assert coefficients[0] == coefficients[1]
    assert snapshot(watching.state_dict()) == snapshot(lagging.state_dict())


def test_the_weighting_is_an_attribute():
    weighting = FixedWeights({"a": 1.0})
    assert BalancedOptimizer(sgd(SmallModel()), weighting).weighting is weighting


# ---------------------------------------------------------------------- losses in separate calls


@over(lambda method: type(method.make(NAMES)) not in (Sum, FixedWeights))
def test_losses_that_come_in_separate_calls_are_warned_of(method):
    """Their gradients are added up, each balanced by itself: a plain sum."""
    model, optimizer = setup(method, loss_names=NAMES)
    optimizer.backward(model.losses(0, ["a"]))
    with pytest.warns(UserWarning, match=r"Found \['b', 'c'\] after \['a'\]") as caught:
        optimizer.backward(model.losses(0, ["b", "c"]))
    assert [warning.filename for warning in caught] == [__file__]


@over_some("Sum", "FixedWeights")
def test_losses_may_come_in_separate_calls_where_each_has_a_coefficient_of_its_own(method):
    model, optimizer = setup(method, loss_names=NAMES)
    optimizer.backward(model.losses())
    expected = [grad.clone() for grad in gradients(model)]
    optimizer.zero_grad()
    optimizer.backward(model.losses(0, ["a"]))
    optimizer.backward(model.losses(0, ["b", "c"]))
    torch.testing.assert_close(gradients(model), expected)


def test_a_warning_points_to_the_line_of_the_loop():
    """Through a closure, a scheduler's wrapper of `step`, and Accelerate's backward."""
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MGDA(), nonfinite="skip")
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(9):
        optimizer.step(lambda: {"a": model.losses()["a"] * math.nan})
    with pytest.warns(UserWarning, match="10 steps in a row") as caught:
        optimizer.step(lambda: {"a": model.losses()["a"] * math.nan})
    accelerator = SimpleNamespace(gradient_accumulation_steps=1, sync_gradients=True, scaler=None)
    optimizer.backward(lambda: model.losses(0, ["a"]))
    with pytest.warns(UserWarning, match="should come in one `backward`") as more:
        accelerate_backward(accelerator, optimizer, lambda: model.losses(0, ["b"]))
    assert [warning.filename for warning in (*caught, *more)] == [__file__] * 2


@over_kinds
def test_the_same_losses_twice_or_in_a_window_or_after_a_step_are_not_warned_of(method):
    model, optimizer = setup(method, loss_names=NAMES)
    for _ in range(2):
        optimizer.backward(model.losses(0))
    optimizer.zero_grad()
    optimizer.backward(model.losses(0, ["a", "b"]))
    optimizer.zero_grad()
    if method.kind != "known":  # which needs the same losses throughout a window
        with optimizer.accumulate():
            optimizer.backward(model.losses(0, ["a"]))
        optimizer.backward(model.losses(0, ["b", "c"]))
        optimizer.zero_grad()
    optimizer.combined_loss(model.losses(0, ["a"])).backward()
    optimizer.backward(model.losses(0, ["b"]))


@over_kinds
def test_losses_that_reach_no_parameter_of_the_optimizer_combine_to_a_scalar_with_a_graph(method):
    """As a plain sum does, whose backward pass then reaches other leaves."""
    optimizer = BalancedOptimizer(sgd(SmallModel()), method.make(NAMES))
    theirs = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    losses = {name: 1.0 + (theirs * (k + 1)).square().sum() for k, name in enumerate(NAMES)}
    optimizer.combined_loss(losses).backward()
    optimizer.step()


@over_kinds
def test_a_combined_loss_whose_gradients_were_cleared_is_no_step(method):
    model, optimizer = setup(method)
    optimizer.combined_loss(model.losses()).backward()
    optimizer.zero_grad()
    with pytest.raises(BalanceError, match="should follow `backward`"):
        optimizer.step()
    assert optimizer.state_dict()["balance"]["steps"] == 0
