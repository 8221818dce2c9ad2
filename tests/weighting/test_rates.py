"""DWA, SoftAdapt and ReLoBRaLo: windows, published figures, peers, and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import DWA, BalancedOptimizer, ReLoBRaLo, SoftAdapt, SumLog
from moo_balance.weighting import Weighting, step_generator
from tests.support.gradients import property_test
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

PREFERENCE = {"a": 1.0, "b": 2.0, "c": 5.0}
SHARES = vector((1 / 8, 2 / 8, 5 / 8))

windowed = pytest.mark.parametrize("cls", [DWA, SoftAdapt])


def run(weighting: Weighting, sequence: Tensor) -> Tensor:
    """Coefficients [T, K], losses [T, K] given."""
    return torch.stack([output.coefficients for output in run_steps(weighting, sequence)])


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


# ---------------------------------------------------------------------- DWA


def test_dwa_is_the_formula_on_means_of_windows() -> None:
    sequence = normal(23, 3).exp()
    found = run(DWA(window=5, temperature=0.7), sequence).numpy()
    means = [sequence[start : start + 5].numpy().mean(0) for start in (0, 5, 10, 15)]
    for step in range(23):
        index = step // 5
        rates = means[index - 1] / means[index - 2] if index > 1 else np.ones(3)
        assert np.allclose(found[step], 3 * softmax(rates / 0.7), rtol=1e-12)


def test_dwa_is_that_of_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    worst = 0.0
    for seed in range(20):
        sequence = normal(40, 4, seed=seed).exp()
        peer = scalarization.DWA(temperature=1.5)
        for step, found in enumerate(run(DWA(window=4, temperature=1.5), sequence)):
            losses = sequence[step].clone().requires_grad_()
            (expected,) = torch.autograd.grad(peer(losses), losses)
            worst = max(worst, float((found - expected).abs().max()))
            if step % 4 == 3:
                peer.step()
    assert worst < 1e-14


def test_a_golden_value_of_dwa() -> None:
    sequence = vector((4.0, 4.0, 1.0, 3.0, 9.0, 9.0)).view(3, 2)
    expected = 2 / (1 + math.exp(-0.25))  # rates 1/4 and 3/4 at temperature 2
    assert_near(run(DWA(window=1), sequence)[2], (2 - expected, expected), 1e-15)


@windowed
def test_weights_are_equal_for_two_windows(cls: type[Weighting]) -> None:
    total = 3.0 if cls is DWA else 1.0
    found = run(cls(window=3), normal(9, 3).exp())
    assert_near(found[:6], torch.full((6, 3), total / 3, dtype=torch.float64), 1e-15)
    assert float((found[6] - total / 3).abs().max()) > 1e-4
    assert torch.equal(found[6:], found[6:7].expand(3, -1))


@windowed
def test_windows_follow_the_run_and_each_loss_its_own_steps(cls: type[Weighting]) -> None:
    """A loss that is absent from whole windows is compared over those that had it."""
    point = torch.nn.Parameter(vector((3.0, 2.0)))
    optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=0.1), cls(window=2))
    seen: dict[str, dict[int, list[float]]] = {"a": {}, "b": {}}
    for step, present in enumerate(["ab", "b", "ab", "a", "a", "a", "ab", "b", "ab"]):
        losses = {name: point["ab".index(name)].square() + 1 for name in present}
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        for name, loss in losses.items():
            seen[name].setdefault(step // 2, []).append(float(loss.detach()))
    state = optimizer.state_dict()["balance"]["state"]
    for position, name in enumerate("ab"):
        means = [np.mean(values) for index, values in sorted(seen[name].items()) if index < 4]
        assert state["newer"][position].item() == pytest.approx(means[-1], rel=1e-14)
        assert state["older"][position].item() == pytest.approx(means[-2], rel=1e-14)


@windowed
@property_test
@given(
    st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=4),
    st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=4),
)
def test_shares_of_any_positive_losses_sum_to_one(
    cls: type[Weighting], first: list[float], second: list[float]
) -> None:
    count = min(len(first), len(second))
    sequence = torch.stack([vector(first[:count]), vector(second[:count]), vector(first[:count])])
    found = run(cls(window=1, temperature=0.1), sequence)
    assert_near(found.sum(1), torch.full((3,), float(count if cls is DWA else 1)), 1e-13)
    assert bool((found >= 0).all())


@pytest.mark.parametrize("make", [DWA, ReLoBRaLo], ids=["DWA", "ReLoBRaLo"])
def test_equal_rates_give_ones_or_the_preference(make: type[Weighting]) -> None:
    """Whatever the scales of the losses, which SumLog would remove."""
    falling = 0.99 ** torch.arange(60, dtype=torch.float64)
    sequence = falling[:, None] * vector((1e-3, 1.0, 1e4))
    arguments = {"window": 5} if make is DWA else {"lookback": 0.3}
    assert_near(run(make(**arguments), sequence), torch.ones(60, 3), 1e-12)
    preferred = run(make(**arguments, preference=PREFERENCE), sequence)
    assert_near(preferred, (3 * SHARES).expand(60, 3), 1e-12)
    logs = SumLog().weights(statistics_of(sequence[0]), {}).coefficients
    assert float(logs[0]) > 0.99


# ---------------------------------------------------------------------- SoftAdapt


@pytest.mark.parametrize("loss_weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("preference", [None, PREFERENCE], ids=["equal", "preferred"])
def test_softadapt_is_the_formula(
    loss_weighted: bool, normalize: bool, preference: dict[str, float] | None
) -> None:
    sequence = normal(12, 3).exp()
    weighting = SoftAdapt(3, 0.4, normalize, loss_weighted, preference=preference)
    shares = np.full(3, 1 / 3) if preference is None else SHARES.numpy()
    means = sequence.view(4, 3, 3).mean(1).numpy()
    for index in (2, 3):
        slopes = means[index - 1] - means[index - 2]
        if normalize:
            slopes = slopes / np.abs(slopes).sum()
        expected = shares * np.exp(slopes / 0.4)
        if loss_weighted:
            expected = expected * means[index - 1]
        found = run(weighting, sequence)[3 * index].numpy()
        assert np.allclose(found, expected / expected.sum(), rtol=1e-12)


def test_softadapt_takes_negative_losses_and_constant_ones() -> None:
    assert SoftAdapt().lower_bounds(("a",)) == [-math.inf]
    assert SoftAdapt(loss_weighted=True).lower_bounds(("a",)) == [0.0]
    constant = vector((-1.0, 2.0, 0.0)).expand(4, -1)
    for normalize in (False, True):
        found = run(SoftAdapt(1, 1.0, normalize), constant)
        assert_near(found, torch.full((4, 3), 1 / 3, dtype=torch.float64), 1e-15)


def test_normalized_slopes_ignore_a_common_unit() -> None:
    sequence = normal(4, 3).exp()
    for factor in (1e-250, 1e250):
        scaled = run(SoftAdapt(1, 0.5, normalize=True), sequence * factor)
        assert_near(scaled, run(SoftAdapt(1, 0.5, normalize=True), sequence), 1e-12)


# ---------------------------------------------------------------------- ReLoBRaLo


@pytest.mark.parametrize("lookback", [0.0, 0.4])
def test_relobralo_is_the_formula(lookback: float) -> None:
    sequence = normal(40, 3).exp()
    weighting = ReLoBRaLo(0.8, 0.6, lookback, seed=7)
    losses, weights = sequence.numpy(), np.ones(3)
    looked = 0
    for step, found in enumerate(run(weighting, sequence)):
        draw = torch.rand((), generator=step_generator(7, step), dtype=torch.float64)
        last = losses[max(step - 1, 0)]
        fresh = 3 * softmax(losses[step] / last / 0.6)
        if float(draw) < lookback:
            looked += 1
            weights = 3 * softmax(losses[step] / losses[0] / 0.6)
        weights = 0.8 * weights + 0.2 * fresh
        assert np.allclose(found.numpy(), weights, rtol=1e-12)
    assert (looked > 0) == (lookback > 0)


def test_looks_back_as_often_as_stated() -> None:
    weighting = ReLoBRaLo(lookback=0.1, seed=1)
    assert sum(weighting._looks_back(step) for step in range(5000)) == pytest.approx(500, abs=80)


def test_without_memory_relobralo_is_softadapt_with_relative_slopes() -> None:
    """A quotient is 1 plus the relative slope, and softmax ignores the 1."""
    before, after = normal(2, 3).exp()
    found = run(ReLoBRaLo(beta=0.0, temperature=0.5, lookback=0.0), torch.stack([before, after]))
    relative = torch.stack([torch.ones(3), after / before, torch.ones(3)]).double()
    slopes = run(SoftAdapt(window=1, temperature=0.5), relative)
    assert_near(found[1], 3 * slopes[2], 1e-14)
    assert_near(found[1], run(DWA(1, 0.5), torch.stack([before, after, after]))[2], 1e-14)


def test_an_absent_loss_keeps_its_part_and_a_new_one_starts_at_rate_one() -> None:
    point = torch.nn.Parameter(vector((3.0, 2.0, 1.0)))
    optimizer = BalancedOptimizer(
        torch.optim.SGD([point], lr=0.05), ReLoBRaLo(0.5, 0.1, 0.2), loss_names=["a", "b", "c"]
    )

    def step(present: str) -> Tensor:
        optimizer.zero_grad()
        optimizer.backward({name: point["abc".index(name)].square() + 1 for name in present})
        optimizer.step()
        total = torch.stack([*optimizer.metrics.coefficients.values()]).sum()
        assert total.item() == pytest.approx(len(present), rel=1e-13)
        return optimizer.state_dict()["balance"]["state"]["weights"]

    for _ in range(5):
        before = step("ab")
    after = step("bc")
    assert after[0].item() == before[0].item()
    assert after.sum().item() == pytest.approx(3.0, rel=1e-13)


def test_a_resumed_run_repeats_the_draws() -> None:
    def runner(steps: range, state: dict | None = None) -> tuple[dict, Tensor]:
        point = torch.nn.Parameter(vector((3.0, 2.0)))
        optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=0.0), ReLoBRaLo(0.5, 1.0, 0.5))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(
                {"a": point[0].exp() / (step + 1), "b": point[1].square() + step % 3}
            )
            torch.rand(3)  # of the global stream
            optimizer.step()
        return optimizer.state_dict(), torch.stack([*optimizer.metrics.coefficients.values()])

    _, whole = runner(range(12))
    middle, _ = runner(range(7))
    assert torch.equal(runner(range(7, 12), middle)[1], whole)


def test_relobralo_shares_equally_where_the_losses_present_have_no_weight_left() -> None:
    rule = ReLoBRaLo(beta=0.0)
    state = initial_state(rule, 2)
    for losses in (1.0, 1.0), (1.0, 2000.0):
        state = rule.weights(statistics_of(losses), state).state
    assert state["weights"].tolist() == [0.0, 2.0]
    alone = {key: value[:1] for key, value in state.items()}
    for _ in range(2):
        answer = rule.weights(statistics_of((1.0,)), alone)
        assert answer.coefficients.tolist() == [1.0]
        alone = answer.state
