"""Satisfied losses: at their lower bound, or without a gradient. The others are balanced."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceValueError,
    History,
    NashMTL,
    SumLog,
)
from moo_balance._nonfinite import Flags, flag_gradients
from moo_balance.weighting import Statistics
from tests.support.internals import treat_cpu_as_device
from tests.support.problems import (
    as_vector,
    change_value,
    flat_gradient,
    setup,
    sgd,
    snapshot,
    whole_state,
)
from tests.support.registry import METHODS, NAMES, over, over_some

pytestmark = pytest.mark.capability("losses that are satisfied")

KINDS_OF_DEVICE = pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])


def without_gradient(losses, name="b"):
    """The losses; the gradient of one of them is zero."""
    return {**losses, name: losses[name].detach() + 0.0 * losses[name]}


def one(method):
    """Whether all steps are of one method."""
    return not method.id.startswith("Sequential")


def may_all_be_satisfied(method):
    """Whether each loss may count as satisfied, as one with a constant coefficient never does."""
    if method not in METHODS or method.make(NAMES).constant_losses:
        return False
    return (method.gramian or bounded(method)) and one(method)


def bounded(method):
    return max(method.bounds(NAMES)) > -math.inf


def at_bound(method, losses, name="b"):
    """The losses; one of them has the value of its bound, and its own gradient."""
    bound = dict(zip(NAMES, method.bounds(NAMES), strict=True))[name]
    return change_value(losses, bound, name)


def advance(optimizer, losses):
    """A step on a closure."""
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()


def compare_with_absence(method, satisfy):
    """The same run twice: with a loss that is satisfied for a while, and without it meanwhile."""
    model, optimizer = setup(method, optimizer=sgd)
    twin, other = setup(method, optimizer=sgd)
    for step in range(2):
        advance(optimizer, lambda: model.losses(step))  # noqa: B023
        advance(other, lambda: twin.losses(step))  # noqa: B023
    for step in range(2, 6):
        advance(optimizer, lambda: satisfy(model.losses(step)))  # noqa: B023
        advance(other, lambda: twin.losses(step, ("a", "c")))  # noqa: B023
        first_refresh = step >= 2 + optimizer.weighting.every - 1
        if not first_refresh:
            continue
        assert optimizer.metrics.satisfied == ("b",)
        assert optimizer.log_dict("")["satisfied"] == 1.0
        for kind in ("weights", "coefficients"):
            figures, expected = getattr(optimizer.metrics, kind), getattr(other.metrics, kind)
            assert figures["b"].item() == 0.0
            actual = torch.stack([figures["a"], figures["c"]])
            torch.testing.assert_close(actual, as_vector(expected), rtol=1e-9, atol=1e-14)
    return (model, optimizer), (twin, other)


# ---------------------------------------------------------------------- the rule


@KINDS_OF_DEVICE
@over(lambda method: method in METHODS and method.gramian and "every" not in method.kind)
def test_a_loss_without_a_gradient_is_left_out(method, on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    (model, _), (twin, _) = compare_with_absence(method, without_gradient)
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-12)


@KINDS_OF_DEVICE
@over(lambda method: method in METHODS and bounded(method) and "every" not in method.kind)
def test_a_loss_at_its_bound_is_left_out(method, on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    (model, optimizer), (twin, other) = compare_with_absence(
        method, lambda losses: at_bound(method, losses)
    )
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-12)
    before = optimizer.state_dict()["balance"]["state"]
    expected = other.state_dict()["balance"]["state"]
    assert before.keys() == expected.keys()
    for key, value in before.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-14, equal_nan=True)


@KINDS_OF_DEVICE
@over_some("SumLog", "FAMO-adam", "FAMO-lagged", "AnalyticQP-simplex", "MGDA-log", "MGDA-none")
def test_of_two_losses_the_other_is_the_only_one(method, on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    for names, name in ((("a", "b"), "b"), (("b", "c"), "b")):
        model, optimizer = setup(method, names)
        satisfy = without_gradient if method.gramian else lambda each: at_bound(method, each)
        for step in range(3):
            advance(optimizer, lambda: satisfy(model.losses(step, names)))  # noqa: B023
            assert optimizer.metrics.satisfied == (name,)
            for other, coefficient in optimizer.metrics.coefficients.items():
                expected = 0.0 if other == name else method.alone(1.0)
                assert coefficient.item() == pytest.approx(expected, rel=1e-12)


@KINDS_OF_DEVICE
@over(may_all_be_satisfied)
def test_nothing_happens_where_all_losses_are_satisfied(method, on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    model, optimizer = setup(method, optimizer=sgd)

    def satisfied():
        losses = model.losses(2)
        for name in NAMES:
            if bounded(method):
                losses = at_bound(method, losses, name)
            if method.gramian:
                losses = without_gradient(losses, name)
        return losses

    for step in range(2):
        advance(optimizer, lambda: model.losses(step))  # noqa: B023
    parameters = snapshot(model.state_dict())
    state = snapshot(optimizer.state_dict()["balance"]["state"])
    period = optimizer.weighting.every
    for _ in range(2 * period):
        advance(optimizer, satisfied)
    if period == 1:
        assert snapshot(model.state_dict()) == parameters
        assert snapshot(optimizer.state_dict()["balance"]["state"]) == state
    assert optimizer.metrics.satisfied == NAMES
    assert as_vector(optimizer.metrics.coefficients).tolist() == [0.0] * 3
    assert not flat_gradient(model).any()
    advance(optimizer, lambda: model.losses(3))
    assert bool(flat_gradient(model).isfinite().all())


@over_some("SumLog", "FAMO-adam", "AnalyticQP-no-shift")
def test_below_its_bound_a_loss_is_still_refused_by_name(method):
    model, optimizer = setup(method)
    below = change_value(at_bound(method, model.losses(), "a"), -1e-300)
    with pytest.raises(BalanceValueError, match="`b` should be at least 0"):
        optimizer.backward(below)


def test_the_bound_and_the_gradient_may_each_satisfy_a_loss():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA(normalize="log"))
    hinge = (weight[1] - 9.0).clamp(min=0.0)
    losses = {"at bound": hinge, "flat": (0.0 * weight).sum() + 1.0, "live": weight[0] ** 2}
    optimizer.backward(losses)
    assert optimizer.metrics.satisfied == ("at bound", "flat")
    assert optimizer.log_dict("")["satisfied"] == 2.0
    assert weight.grad.tolist() == [2.0, 0.0, 0.0]


def test_a_hinge_inside_its_margin_does_not_stop_the_others():
    """Its gradient is zero, and so is the shortest combination of all."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    for method in (MGDA(), MGDA("l2"), AnalyticQP(projection="exact")):
        with torch.no_grad():
            weight.copy_(torch.tensor([3.0, 1.0]))
        optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), method)
        for _ in range(50):
            hinge = (1.0 - weight[0]).clamp(min=0.0)
            advance(optimizer, {"hinge": hinge, "pull": weight.square().sum()})
        assert weight[0].item() <= 1.1
        assert abs(weight[1].item()) < 0.1


@KINDS_OF_DEVICE
@pytest.mark.parametrize(("scale", "satisfied"), [(1e-37, ()), (1e-39, ("a",))])
def test_a_gradient_of_subnormal_numbers_counts_as_zero(scale, satisfied, on_device, monkeypatch):
    """One over its length, the coefficient of many methods, may not be a number of float32."""
    if on_device:
        treat_cpu_as_device(monkeypatch)
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), NashMTL())
    optimizer.backward({"a": scale * weight[0], "b": weight[1]})
    assert optimizer.metrics.satisfied == satisfied
    assert weight.grad.tolist() == pytest.approx([0.0 if satisfied else 1.0, 1.0])


@pytest.mark.parametrize("squares", [[math.nan, 0.0], [0.0, math.nan]])
def test_a_zero_gradient_is_found_beside_one_that_is_not_finite(squares):
    gramian = torch.diag(torch.tensor(squares, dtype=torch.float64))
    flags = flag_gradients(Flags(), ("a", "b"), gramian, scaled=True)
    assert flags.satisfied.tolist() == [square == 0.0 for square in squares]


# ---------------------------------------------------------------------- every n-th step


@KINDS_OF_DEVICE
@over_some("MGDA-every", "AnalyticQP-every", "MGDA-log-every")
def test_a_loss_stays_satisfied_until_the_next_refresh(method, on_device, monkeypatch):
    """What was kept of the last solution has no weight for it."""
    if on_device:
        treat_cpu_as_device(monkeypatch)
    model, optimizer = setup(method)
    twin, other = setup(method, loss_names=NAMES)
    period = optimizer.weighting.every
    for step in range(2 * period):
        refreshes = step % period == 0
        losses = (lambda: without_gradient(model.losses(step))) if refreshes else model.losses  # noqa: B023
        advance(optimizer, losses if refreshes else lambda: model.losses(step))  # noqa: B023
        advance(other, lambda: twin.losses(step, ("a", "c")))  # noqa: B023
        assert optimizer.metrics.satisfied == ("b",)
        coefficients = optimizer.metrics.coefficients
        actual = torch.stack([coefficients["a"], coefficients["c"]])
        torch.testing.assert_close(actual, as_vector(other.metrics.coefficients), rtol=1e-9, atol=0)
    advance(optimizer, lambda: model.losses(9))
    assert optimizer.metrics.satisfied == ()
    assert optimizer.metrics.gramian is not None


@KINDS_OF_DEVICE
@over_some("MGDA-every", "FAMO-adam", "FAMO-lagged", "AnalyticQP")
def test_a_run_with_satisfied_losses_resumes_bit_by_bit(method, on_device, monkeypatch):
    if on_device:
        treat_cpu_as_device(monkeypatch)

    def losses(model, step):
        given = model.losses(step)
        if step % 4 not in (0, 3):
            return given
        given = without_gradient(given)
        return at_bound(method, given) if bounded(method) else given

    model, optimizer = setup(method)
    for step in range(5):
        advance(optimizer, lambda: losses(model, step))  # noqa: B023
    twin, other = setup(method)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state_dict()["balance"]["satisfied"] == ["b"]
    for step in range(5, 10):
        advance(optimizer, lambda: losses(model, step))  # noqa: B023
        advance(other, lambda: losses(twin, step))  # noqa: B023
    assert whole_state(twin, other) == whole_state(model, optimizer)


def test_a_checkpoint_without_the_entry_has_no_satisfied_loss():
    method = next(row for row in METHODS if row.id == "MGDA-every")
    model, optimizer = setup(method)
    advance(optimizer, lambda: without_gradient(model.losses()))
    saved = optimizer.state_dict()
    del saved["balance"]["satisfied"]
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["balance"]["satisfied"] == []
    for entry in (["zzz"], 3, ["a", "a"]):
        broken = {**saved, "balance": {**saved["balance"], "satisfied": entry}}
        with pytest.raises(BalanceValueError, match="`satisfied` in entry `balance`"):
            optimizer.load_state_dict(broken)


def test_an_absent_loss_stays_satisfied():
    method = next(row for row in METHODS if row.id == "MGDA-every")
    model, optimizer = setup(method)
    advance(optimizer, lambda: without_gradient(model.losses()))
    advance(optimizer, lambda: model.losses(1, ("a", "c")))
    assert optimizer.metrics.satisfied == ()
    advance(optimizer, lambda: model.losses(2))
    assert optimizer.metrics.satisfied == ("b",)


# ---------------------------------------------------------------------- the losses after a step


@KINDS_OF_DEVICE
@over_some("FAMO-adam", "FAMO-sgd", "MovingAverage-FAMO")
def test_a_loss_that_reaches_its_bound_in_a_step_leaves_the_logits_finite(
    method, on_device, monkeypatch
):
    if on_device:
        treat_cpu_as_device(monkeypatch)
    model, optimizer = setup(method)
    advance(optimizer, lambda: model.losses(0))
    before = copy.deepcopy(optimizer.state_dict()["balance"]["state"])
    optimizer.zero_grad()
    optimizer.backward(model.losses(1))
    optimizer.step()
    optimizer.observe(change_value(model.losses(1), 0.0))
    after = optimizer.state_dict()["balance"]["state"]
    key = next(key for key in after if key.endswith("logits"))
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert after[key][1] == before[key][1]
    assert after[key][0] != before[key][0]
    advance(optimizer, lambda: model.losses(2))


@KINDS_OF_DEVICE
@over_some("FAMO-adam", "FAMO-sgd")
def test_a_loss_that_leaves_its_bound_in_a_step_is_compared_from_the_next_one(
    method, on_device, monkeypatch
):
    """Its distance before the step is not known to the method."""
    if on_device:
        treat_cpu_as_device(monkeypatch)
    model, optimizer = setup(method)
    advance(optimizer, lambda: model.losses(0))
    before = copy.deepcopy(optimizer.state_dict()["balance"]["state"])
    optimizer.zero_grad()
    optimizer.backward(change_value(model.losses(1), 0.0))
    optimizer.step()
    optimizer.observe(model.losses(1))
    after = optimizer.state_dict()["balance"]["state"]
    for key, value in after.items():
        assert value[1] == before[key][1]


@pytest.mark.parametrize("logit_optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("lagged", [False, True])
def test_a_constant_loss_gets_no_weight_for_being_slow(logit_optimizer, lagged):
    """Free bits: a term that is constant below its threshold."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    method = FAMO(lr=0.5, decay=0.0, logit_optimizer=logit_optimizer, lagged=lagged)
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.01), method)

    def losses():
        free = (0.0 * weight[0]).clamp(min=0.5)
        return {"a": weight[0] ** 2, "b": 4 * weight[1] ** 2, "free": free}

    for _ in range(100):
        advance(optimizer, losses)
    logits = optimizer.state_dict()["balance"]["state"]["logits"]
    assert logits[2].item() == 0.0
    assert not bool((logits[:2] == 0.0).any())


# ---------------------------------------------------------------------- what is told of it


def test_metrics_and_history_tell_how_many_losses_are_satisfied():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.25), SumLog())
    history = History()
    for value in (0.0, 1.0, 0.0):
        optimizer.zero_grad()
        losses = {"a": weight[0] ** 2, "b": weight[1] ** 2}
        optimizer.backward(change_value(losses, value))
        history.append(optimizer.metrics)
        assert optimizer.metrics.satisfied == (("b",) if value == 0.0 else ())
        optimizer.step()
    assert history.series("satisfied") == ([0, 1, 2], [1.0, 0.0, 1.0])


def test_nothing_is_told_of_a_step_that_was_skipped():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.25), SumLog(), nonfinite="skip")
    optimizer.backward({"a": weight[0] * math.nan, "b": 0.0 * weight[1]})
    assert optimizer.metrics.satisfied == ()
    assert "satisfied" not in optimizer.log_dict("")


@over_some("MGDA-none", "MGDA-log", "AnalyticQP", "AnalyticQP-exact", "SumLog", "FAMO-lagged")
def test_a_method_itself_is_finite_for_a_zero_row(method):
    weighting = method.make(NAMES)
    gramian = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    statistics = Statistics(NAMES, torch.ones(3, dtype=torch.float64), gramian)
    state = weighting.init(NAMES, torch.device("cpu"))
    assert bool(weighting.weights(statistics, state).coefficients.isfinite().all())
