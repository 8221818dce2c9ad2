"""Learning-rate annealing as printed and as coded, against plain loops, and its fixed points."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, LearningRateAnnealing
from moo_balance.weighting.rows import RowStatistics
from tests.support.problems import SmallModel, assert_same_parameters, sgd, train
from tests.support.statistics import assert_near, initial_state, statistics_of, vector

SHARES = {"a": 2.0, "b": 1.0, "c": 4.0}


def elements(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Magnitudes of all elements, zero where the loss does not reach."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads]).abs()


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("preference", [None, SHARES])
@pytest.mark.parametrize("layer", [False, True])
def test_training_is_that_of_a_plain_loop(
    form: str, preference: dict[str, float] | None, layer: bool
) -> None:
    def descent(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=1e-5)

    def compared(net: SmallModel) -> list[Tensor]:
        return [net.trunk.weight] if layer else list(net.parameters())

    model, twin = SmallModel(), SmallModel()
    rule = LearningRateAnnealing("b", form, 0.8, preference=preference, every=2)
    shared = compared(model) if layer else None
    train(model, BalancedOptimizer(descent(model), rule, shared_params=shared), range(9))

    plain, ratios = descent(twin), {"a": 1.0, "c": 1.0}
    shares = preference or dict.fromkeys("abc", 1.0)
    for step in range(9):
        losses = twin.losses(step)
        if step % 2 == 0:
            largest = elements(losses["b"], compared(twin)).amax()
            for name in ratios:
                given = losses[name] * (ratios[name] if form == "code" else 1.0)
                new = float(largest / elements(given, compared(twin)).mean())
                ratios[name] = 0.8 * ratios[name] + 0.2 * new
        plain.zero_grad()
        total = losses["b"]
        for name, ratio in ratios.items():
            total = total + shares[name] / shares["b"] * ratio * losses[name]
        total.backward()
        plain.step()
    assert_same_parameters(model, twin)


def settle(rule: LearningRateAnnealing, largest: float, mean: float, steps: int = 300) -> float:
    """The weight of the second loss after many steps with the same gradients."""
    state, coefficient = initial_state(rule, 2), 0.0
    rows = RowStatistics(vector((largest, 3 * mean)), vector((largest / 7, mean)))
    for step in range(steps):
        gramian = torch.eye(2).double() if step % rule.every == 0 else None
        statistics = statistics_of([1.0, 1.0], gramian, step)._replace(rows=rows)
        _, coefficients, state = rule.weights(statistics, state)
        assert float(coefficients[0]) == 1.0
        coefficient = float(coefficients[1])
    return coefficient


def test_the_code_settles_at_the_square_root_of_the_papers_ratio() -> None:
    paper, code = LearningRateAnnealing("a", every=1), LearningRateAnnealing("a", "code", every=1)
    assert settle(paper, 100.0, 0.01) == pytest.approx(1e4, rel=1e-9)
    assert settle(code, 100.0, 0.01) == pytest.approx(1e2, rel=1e-9)


def test_the_first_update_is_the_same_from_one_on() -> None:
    for form in ("paper", "code"):
        rule = LearningRateAnnealing("a", form)
        assert settle(rule, 100.0, 0.01, steps=1) == pytest.approx(0.9 + 0.1 * 1e4, rel=1e-12)
        assert settle(rule, 100.0, 0.01, steps=10) == settle(rule, 100.0, 0.01, steps=1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_no_unit_matters(form: str, scale: float) -> None:
    rule = LearningRateAnnealing("a", form, every=1)
    plain = settle(rule, 2.0, 0.5, 20)
    assert settle(rule, 2.0 * scale, 0.5 * scale, 20) == pytest.approx(plain, rel=1e-12)


def test_a_zero_gradient_has_no_weight_and_keeps_its_ratio() -> None:
    rule = LearningRateAnnealing("a", every=1, initial={"a": 1.0, "b": 5.0, "c": 7.0})
    rows = RowStatistics(vector((2.0, 3.0, 0.0)), vector((1.0, 0.5, 0.0)))
    statistics = statistics_of([1.0] * 3, torch.eye(3).double())._replace(rows=rows)
    answer = rule.weights(statistics, initial_state(rule, 3))
    assert_near(answer.coefficients, (1.0, 0.9 * 5 + 0.1 * 4, 0.0), 1e-12)
    assert float(answer.state["lambda"][2]) == 7.0
    still = rows._replace(largest=vector((0.0, 3.0, 1.0)), mean=vector((0.0, 0.5, 0.1)))
    answer = rule.weights(statistics._replace(rows=still), initial_state(rule, 3))
    assert_near(answer.coefficients[1:], (5.0, 7.0), 0.0)


def test_weights_stay_while_the_reference_is_absent() -> None:
    model = SmallModel()
    rule = LearningRateAnnealing("a", every=1)
    optimizer = BalancedOptimizer(sgd(model), rule, loss_names=["a", "b", "c"])
    train(model, optimizer, [0])
    before = optimizer.metrics.coefficients
    train(model, optimizer, [1], "bc")
    after = optimizer.metrics.coefficients
    assert {name: float(after[name]) for name in "bc"} == {n: float(before[n]) for n in "bc"}
