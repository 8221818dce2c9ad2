"""Uncertainty weighting and IMTL-L: closed-form gradients, fixed points, and their traps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moo_balance import IMTLL, BalancedOptimizer, BalanceValueError, SumLog, UncertaintyWeighting
from moo_balance.weighting import State, Weighting
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

over_both = pytest.mark.parametrize("cls", [UncertaintyWeighting, IMTLL])


def run(weighting: Weighting, sequence: Tensor, state: State | None = None) -> list[Tensor]:
    """Coefficients of each step, losses [T, K] given."""
    return [output.coefficients for output in run_steps(weighting, sequence, state=state)]


def settle(weighting: Weighting, losses: Tensor, steps: int = 1000) -> Tensor:
    return run(weighting, losses.expand(steps, -1))[-1]


@pytest.mark.parametrize("factors", [(0.5, 0.5, 0.5), (0.5, 1.0, 0.5)])
@pytest.mark.parametrize("start", [0.0, -0.5])
def test_uncertainty_is_adam_on_the_published_sum(factors: tuple[float, ...], start: float) -> None:
    """Against autograd and torch's Adam, on losses that change in each step."""
    names = [name for name, factor in zip("abc", factors, strict=True) if factor == 1.0]
    weighting = UncertaintyWeighting(lr=0.05, initial=start, classification=names)
    sequence, scale = normal(100, 3).exp(), vector(factors)
    variances = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([variances], lr=0.05)
    for losses, found in zip(sequence, run(weighting, sequence), strict=True):
        losses = losses.clone().requires_grad_()
        adam.zero_grad()
        (scale * losses * (-variances).exp() + variances / 2).sum().backward()
        assert losses.grad is not None
        assert_near(found, losses.grad, 1e-12)
        adam.step()


def test_imtl_l_is_adam_on_the_published_sum() -> None:
    weighting, sequence = IMTLL(lr=0.05, initial=0.3), normal(100, 3).exp()
    scales = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scales], lr=0.05)
    for losses, found in zip(sequence, run(weighting, sequence), strict=True):
        losses = losses.clone().requires_grad_()
        adam.zero_grad()
        (losses * scales.exp() - scales).sum().backward()
        assert losses.grad is not None
        assert_near(found, losses.grad, 1e-12)
        adam.step()


@pytest.mark.parametrize(("cls", "peer"), [(UncertaintyWeighting, "UW"), (IMTLL, "IMTLL")])
def test_a_run_of_training_is_that_of_torchjd(cls: type[Weighting], peer: str) -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")

    def losses_of(point: Tensor) -> list[Tensor]:
        return [(point - 1).square().sum() + 0.1, 30 * (point[0] + 2).square() + 1, point[1].exp()]

    own = torch.nn.Parameter(vector((0.5, -0.3)))
    optimizer = BalancedOptimizer(torch.optim.SGD([own], lr=0.01), cls(lr=0.025))
    other = torch.nn.Parameter(own.detach().clone())
    scalarizer = getattr(scalarization, peer)(3).double()
    sgd = torch.optim.SGD([other], lr=0.01)
    adam = torch.optim.Adam(scalarizer.parameters(), lr=0.025)
    for _ in range(100):
        optimizer.zero_grad()
        optimizer.backward(dict(zip("abc", losses_of(own), strict=True)))
        optimizer.step()
        for each in (sgd, adam):
            each.zero_grad()
        scalarizer(torch.stack(losses_of(other))).backward()
        for each in (sgd, adam):
            each.step()
    assert_near(own.detach(), other.detach(), 1e-11)


def test_the_stationary_point_is_the_sum_of_logs() -> None:
    losses = vector((0.05, 0.7, 3.0, 20.0))
    inverse = SumLog(renormalize=False).weights(statistics_of(losses), {}).coefficients
    for weighting, factor in (
        (UncertaintyWeighting(lr=0.1), 0.5),
        (UncertaintyWeighting(lr=0.1, classification=["a"]), 0.5),
        (IMTLL(lr=0.1), 1.0),
    ):
        torch.testing.assert_close(settle(weighting, losses), factor * inverse, rtol=1e-3, atol=0.0)


def test_the_stationary_value_is_half_of_one_plus_the_log() -> None:
    loss = 3.7
    coefficient = float(settle(UncertaintyWeighting(lr=0.1), vector((loss,))))
    variance = -math.log(2 * coefficient)
    value = loss * math.exp(-variance) / 2 + variance / 2
    assert value == pytest.approx((1 + math.log(loss)) / 2, abs=1e-6)


@over_both
def test_started_at_the_first_losses_it_is_the_raw_sum_of_logs_at_once(
    cls: type[Weighting],
) -> None:
    losses = vector((1e-300, 1.0, 1e6, 1e300))
    found = run(cls(initial="first"), losses.expand(50, -1))
    factor = 1.0 if cls is IMTLL else 0.5
    torch.testing.assert_close(found[0], factor / losses, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found[-1], factor / losses, rtol=1e-2, atol=0.0)


def test_imtl_l_is_twice_uncertainty_weighting() -> None:
    sequence = normal(100, 3).exp()
    for one, two in zip(
        run(UncertaintyWeighting(initial=-0.5), sequence),
        run(IMTLL(initial=0.5), sequence),
        strict=True,
    ):
        assert_near(two, 2 * one, 1e-6)  # Adam's 1e-8 is not relative to the gradient


@over_both
def test_a_preference_multiplies_the_coefficients(cls: type[Weighting]) -> None:
    sequence = normal(50, 3).exp()
    preferred = cls(preference={"a": 1.0, "b": 2.0, "c": 5.0})
    for one, other in zip(run(cls(), sequence), run(preferred, sequence), strict=True):
        assert_near(other, 3 * vector((1 / 8, 2 / 8, 5 / 8)) * one, 1e-15)


@over_both
def test_the_step_uses_the_scales_from_before_its_batch(cls: type[Weighting]) -> None:
    weighting = cls()
    assert not weighting.uses_losses
    first, other = (
        weighting.weights(statistics_of(losses), initial_state(weighting, 2))
        for losses in ((1.0, 2.0), (5.0, 1e-3))
    )
    assert torch.equal(first.coefficients, other.coefficients)
    assert cls(initial="first").uses_losses


@over_both
def test_weight_decay_of_the_model_leaves_the_scales_alone(cls: type[Weighting]) -> None:
    scales = []
    for decay in (0.0, 10.0):
        point = torch.nn.Parameter(vector((1.0, 2.0)))
        base = torch.optim.SGD([point], lr=0.0, weight_decay=decay)
        optimizer = BalancedOptimizer(base, cls(lr=0.3))
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.backward({"a": point[0].square() + 5, "b": point[1].square()})
            optimizer.step()
        scales.append(optimizer.state_dict()["balance"]["state"]["log_scales"])
    assert torch.equal(scales[0], scales[1])
    assert float(scales[0].abs().min()) > 0.1


@over_both
def test_a_loss_below_its_bound_is_refused_by_name(cls: type[Weighting]) -> None:
    point = torch.nn.Parameter(vector((1.0,)))
    base = torch.optim.SGD([point], lr=0.1)
    losses = {"density": -3 * point.sum(), "b": point.square().sum()}
    with pytest.raises(BalanceValueError, match=r"`density`.*learns the scale"):
        BalancedOptimizer(base, cls()).backward(losses)
    BalancedOptimizer(base, cls(bounds={"density": -10.0})).backward(losses)


@over_both
def test_huge_losses_leave_the_moments_finite(cls: type[Weighting]) -> None:
    weighting = cls()
    state = initial_state(weighting, 2)
    for step in range(20):
        answer = weighting.weights(statistics_of((1e300, 1e-300), step=step), state)
        state = answer.state
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert float(answer.coefficients[0]) < float(answer.coefficients[1])


@over_both
def test_an_absent_loss_keeps_its_scale_and_starts_with_its_first_loss(
    cls: type[Weighting],
) -> None:
    point = torch.nn.Parameter(vector((1.0, 2.0, 3.0)))
    optimizer = BalancedOptimizer(
        torch.optim.SGD([point], lr=0.01), cls(initial="first"), loss_names=["a", "b", "c"]
    )

    def step(present: str) -> dict[str, float]:
        optimizer.zero_grad()
        optimizer.backward({name: point["abc".index(name)].square() for name in present})
        optimizer.step()
        return {name: float(value) for name, value in optimizer.metrics.coefficients.items()}

    factor = 1.0 if cls is IMTLL else 0.5
    step("ab")
    kept = optimizer.state_dict()["balance"]["state"]["log_scales"][0].item()
    value = point[2].item() ** 2
    assert step("bc")["c"] == pytest.approx(factor / value, rel=1e-12)
    assert optimizer.state_dict()["balance"]["state"]["log_scales"][0].item() == kept
