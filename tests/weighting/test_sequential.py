"""Phases: each method behaves as it would on its own, from the step at which it begins."""

from __future__ import annotations

import pytest
import torch

from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedOptimizer,
    BalanceValueError,
    MovingAverage,
    Sequential,
    Sum,
    SumLog,
    Weighting,
)
from moo_balance.engine.per_loss import PerLossLinearization
from tests.support.problems import SmallModel, flat_gradient, sgd as plain_sgd, snapshot
from tests.support.registry import NAMES


def sgd(model: SmallModel, weighting: Weighting) -> BalancedOptimizer:
    return BalancedOptimizer(plain_sgd(model), weighting)


def run(model: SmallModel, optimizer: BalancedOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(lambda: model.losses(step))  # noqa: B023
        optimizer.step()


def params(model: SmallModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "second", [MGDA(every=3), FAMO(every=2), MovingAverage(AnalyticQP(every=2)), Sum()], ids=repr
)
def test_a_run_with_phases_is_one_run_after_another(second) -> None:
    torch.manual_seed(0)
    whole, parts = SmallModel(), SmallModel()
    parts.load_state_dict(whole.state_dict())
    run(whole, sgd(whole, Sequential([SumLog(), second], [3])), range(9))
    run(parts, sgd(parts, SumLog()), range(3))
    run(parts, sgd(parts, second), range(3, 9))
    assert torch.equal(params(whole), params(parts))


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_phases_resume_on_either_side_of_the_change(stop) -> None:
    def make():
        torch.manual_seed(0)
        model = SmallModel()
        return model, sgd(model, Sequential([MGDA(every=2), FAMO(), Sum()], [3, 5]))

    model, optimizer = make()
    run(model, optimizer, range(stop))
    resumed, other = make()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(stop, 7))
    run(resumed, other, range(stop, 7))
    assert torch.equal(params(model), params(resumed))
    assert snapshot(optimizer.state_dict()) == snapshot(other.state_dict())


def test_a_gramian_is_computed_only_where_the_phase_needs_it(monkeypatch) -> None:
    torch.manual_seed(0)
    model, counted = SmallModel(), []
    optimizer = sgd(model, Sequential([AnalyticQP(every=2), Sum()], [4]))
    original = PerLossLinearization.gramian

    def gramian(self):
        counted.append(optimizer.state_dict()["balance"]["steps"])
        return original(self)

    monkeypatch.setattr(PerLossLinearization, "gramian", gramian)
    run(model, optimizer, range(8))
    assert counted == [0, 2]


def test_bounds_are_those_of_the_phase() -> None:
    torch.manual_seed(0)
    model = SmallModel()
    optimizer = sgd(model, Sequential([Sum(), SumLog()], [1]))

    def losses():
        return {name: -loss for name, loss in model.losses().items()}

    optimizer.backward(losses())
    optimizer.step()
    with pytest.raises(BalanceValueError, match=r"at least 0, because SumLog"):
        optimizer.backward(losses())


def test_a_loss_may_be_absent_in_the_step_of_the_change() -> None:
    torch.manual_seed(0)
    model = SmallModel()
    optimizer = BalancedOptimizer(
        plain_sgd(model),
        Sequential([SumLog(), MGDA(every=2)], [1]),
        loss_names=NAMES,
    )
    for step, names in enumerate((NAMES, NAMES[:2], NAMES)):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step, names))
        assert set(optimizer.metrics.weights) == set(names)
        assert bool(flat_gradient(model).isfinite().all())
        optimizer.step()
