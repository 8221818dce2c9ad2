"""Gradient norms: the formula, its presets against plain loops, and what may go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, GradientNorms
from moo_balance.weighting import State, Weighting
from tests.support.problems import Losses, SmallModel, assert_same_parameters, sgd, train
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

Norms = Sequence[float]


def gramian_of(norms: Norms, seed: int = 0) -> Tensor:
    """A Gramian of gradients of these norms, in random directions."""
    rows = normal(len(norms), 7, seed=seed)
    rows = rows / rows.norm(dim=1, keepdim=True) * vector(norms)[:, None]
    return rows @ rows.T


def run(weighting: Weighting, norms: Sequence[Norms]) -> tuple[list[Tensor], State]:
    """Coefficients of successive steps with gradients of these norms."""
    gramians = [
        gramian_of(row, step) if step % weighting.every == 0 else None
        for step, row in enumerate(norms)
    ]
    outputs = run_steps(weighting, gramians=gramians)
    return [output.coefficients for output in outputs], outputs[-1].state


def first(weighting: Weighting, norms: Norms) -> Tensor:
    return run(weighting, [norms])[0][0]


# ---------------------------------------------------------------------- the formula

POSITIVE = st.lists(st.floats(-3, 3).map(lambda e: 10.0**e), min_size=1, max_size=5)
SHARES = {"a": 1.0, "b": 3.0, "c": 4.0}


@given(norms=POSITIVE)
def test_weighted_gradients_have_the_reference_length(norms: list[float]) -> None:
    total = sum(norms)
    for reference, length in (
        ("mean", total / len(norms)),
        ("total", total),
        ("a", norms[0]),
        (3.0, 3.0 / len(norms)),
    ):
        lengths = first(GradientNorms(reference), norms) * vector(norms)
        torch.testing.assert_close(lengths, torch.full_like(lengths, length))


@pytest.mark.parametrize(
    ("reference", "lengths"),
    [
        ("mean", (0.375 * 4, 1.125 * 4, 1.5 * 4)),
        ("total", (0.375 * 12, 1.125 * 12, 1.5 * 12)),
        ("b", (1.0, 3.0, 4.0)),
        (16.0, (2.0, 6.0, 8.0)),
    ],
)
def test_shares_divide_the_reference(reference: str | float, lengths: Norms) -> None:
    norms = (1.0, 3.0, 8.0)
    weights = first(GradientNorms(reference, preference=SHARES), norms)
    assert_near(weights * vector(norms), lengths, 1e-14)


def test_the_reference_loss_keeps_weight_one_whatever_is_added_to_norms() -> None:
    rule = GradientNorms("b", 0.9, "weights", 0.5, eps=1.0, max_weight=0.1)
    for weights in run(rule, [(1.0, 3.0), (2.0, 1.0), (5.0, 1.0)])[0]:
        assert float(weights[1]) == 1.0
        assert float(weights[0]) < 1.0


@given(norms=st.lists(st.tuples(*[st.floats(0.01, 100)] * 3), min_size=1, max_size=6))
def test_averages_start_without_bias(norms: list[Norms]) -> None:
    """The first average is the first value, and later ones weigh all values they have met."""
    beta, table = 0.9, torch.tensor(norms, dtype=torch.float64)
    decay = vector(beta**age for age in reversed(range(len(norms))))
    averages = decay @ table / decay.sum()
    of_norms = run(GradientNorms(beta=beta), norms)[0][-1]
    torch.testing.assert_close(of_norms, averages.mean() / averages)
    ratios = decay @ (table.mean(1, keepdim=True) / table) / decay.sum()
    of_weights = run(GradientNorms(beta=beta, smooth="weights"), norms)[0][-1]
    torch.testing.assert_close(of_weights, ratios)


def test_an_average_of_weights_is_not_the_inverse_of_an_average_of_norms() -> None:
    norms = [(1.0, 1.0), (1.0, 99.0)]
    of_norms = run(GradientNorms(beta=0.5), norms)[0][-1]
    of_weights = run(GradientNorms(beta=0.5, smooth="weights"), norms)[0][-1]
    assert_near(of_norms, (101 / 3, 101 / 199), 1e-12)
    assert_near(of_weights, (101 / 3, (1 + 2 * 50 / 99) / 3), 1e-12)


def test_between_two_measurements_weights_stay() -> None:
    for smooth in ("norms", "weights"):
        rule = GradientNorms(smooth=smooth, every=3)
        seen, _ = run(rule, [(1.0, 2.0), (5.0, 1.0), (7.0, 1.0), (2.0, 1.0)])
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[0], seen[3])


# ---------------------------------------------------------------------- zeros, extremes, absences


@pytest.mark.parametrize("smooth", ["norms", "weights"])
@pytest.mark.parametrize("reference", ["mean", "total", "b", 2.0])
def test_a_zero_gradient_has_no_weight_and_changes_no_other(
    reference: str | float, smooth: str
) -> None:
    rule = GradientNorms(reference, 0.5, smooth)
    with_zero, state = run(rule, [(1.0, 3.0, 0.0), (2.0, 5.0, 0.0)])
    without, _ = run(rule, [(1.0, 3.0), (2.0, 5.0)])
    for more, less in zip(with_zero, without, strict=True):
        factor = 2 / 3 if reference == 2.0 else 1.0  # a number is divided among all
        torch.testing.assert_close(more[:2], factor * less)
        assert float(more[2]) == 0.0
    assert all(bool(value.isfinite().all()) for value in state.values())


@pytest.mark.parametrize("reference", ["mean", "total", "a", 2.0])
def test_a_loss_that_came_to_rest_is_weighted_by_its_norms_when_it_moves_again(
    reference: str | float,
) -> None:
    rule = GradientNorms(reference, 0.5)
    weights = run(rule, [(1.0, 3.0), (1.0, 0.0), (1.0, 3.0)])[0]
    torch.testing.assert_close(weights[2], weights[0])


def test_all_zero_gradients_are_finite_and_leave_the_averages() -> None:
    for rule in (GradientNorms(), GradientNorms("a", smooth="weights"), GradientNorms.jaxpi()):
        (before, after), state = run(rule, [(0.0, 0.0), (0.0, 0.0)])
        assert bool(before.isfinite().all() & after.isfinite().all())
        untouched = initial_state(rule, 2)
        assert all(torch.equal(state[k].nan_to_num(), untouched[k].nan_to_num()) for k in state)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_unit_matters(scale: float) -> None:
    norms = [(1.0, 1e-30, 1e30), (3.0, 1e-29, 1e30)]
    for rule in (GradientNorms(), GradientNorms("a"), GradientNorms.jaxpi(every=1)):
        plain, scaled = (run(rule, [[f * n for n in row] for row in norms])[0] for f in (1, scale))
        for one, other in zip(plain, scaled, strict=True):
            torch.testing.assert_close(one, other)
            assert bool(one.isfinite().all())


def test_a_weight_beyond_float32_is_the_largest_float32() -> None:
    statistics = statistics_of([1.0, 1.0], torch.diag(torch.tensor([1e38, 1e-44])))
    rule = GradientNorms("a")
    weights = rule.weights(statistics, initial_state(rule, 2)).coefficients
    assert weights.dtype == torch.float32
    assert bool(weights.isfinite().all())
    rule = GradientNorms("total", preference={"a": 1e-30, "b": 1e30})
    assert bool(rule.weights(statistics, initial_state(rule, 2)).coefficients.isfinite().all())


def steps(
    weighting: GradientNorms, present: Sequence[Sequence[str]], batches: Sequence[int]
) -> BalancedOptimizer:
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), weighting, loss_names=["a", "b", "c"])
    for names, batch in zip(present, batches, strict=True):
        train(model, optimizer, [batch], names)
    return optimizer


def test_an_absent_reference_is_remembered() -> None:
    optimizer = steps(GradientNorms("a", 0.0), ["abc", "bc"], [0, 0])
    model = SmallModel()
    reference = norm_of(model.losses(0)["a"], list(model.parameters()))
    gramian = optimizer.metrics.gramian
    assert gramian is not None
    for name, square in zip("bc", gramian.diagonal(), strict=True):
        length = optimizer.metrics.coefficients[name] * square.sqrt()
        assert float(length) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("smooth", ["norms", "weights"])
def test_a_loss_that_no_measurement_has_met_has_the_weight_of_a_plain_sum(smooth: str) -> None:
    rule = GradientNorms("mean", smooth=smooth, every=2)
    optimizer = steps(rule, ["ab", "c"], [0, 0])
    assert float(optimizer.metrics.coefficients["c"]) == 1.0
    unknown = steps(GradientNorms("a", smooth=smooth), ["bc"], [0])
    assert [*map(float, unknown.metrics.coefficients.values())] == [1.0, 1.0]


# ---------------------------------------------------------------------- presets, and plain loops


def norm_of(loss: Tensor, params: Sequence[Tensor]) -> float:
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))


def descent(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def train_by_hand(
    model: SmallModel,
    weigh: Callable[[int, Mapping[str, float]], Mapping[str, float]],
    params: Sequence[Tensor],
    steps: int,
    names: str = "abc",
) -> None:
    """A plain loop: norms, weights from them, a weighted sum, a step of gradient descent."""
    optimizer = descent(model)
    for step in range(steps):
        losses: Losses = model.losses(step, names)
        weights = weigh(step, {name: norm_of(loss, params) for name, loss in losses.items()})
        optimizer.zero_grad()
        torch.stack([weights[name] * losses[name] for name in losses]).sum().backward()
        optimizer.step()


def compare(
    rule: GradientNorms,
    weigh: Callable[[int, Mapping[str, float]], Mapping[str, float]],
    *,
    steps: int = 12,
    last_layer: bool = False,
    names: str = "abc",
) -> None:
    model, twin = SmallModel(), SmallModel()

    def compared(net: SmallModel) -> list[nn.Parameter]:
        return [net.trunk.weight] if last_layer else list(net.parameters())

    shared = compared(model) if last_layer else None
    optimizer = BalancedOptimizer(descent(model), rule, shared_params=shared)
    train(model, optimizer, range(steps), names)
    train_by_hand(twin, weigh, compared(twin), steps, names)
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("reference", ["mean", "total"])
def test_jaxpi(reference: str) -> None:
    """Weights from 1 on, averaged with 0.9, each fourth step."""
    weights = dict.fromkeys("abc", 1.0)

    def weigh(step: int, norms: Mapping[str, float]) -> Mapping[str, float]:
        if step % 4 == 0:
            length = sum(norms.values()) / (len(norms) if reference == "mean" else 1)
            for name, norm in norms.items():
                ratio = length / (norm + 1e-5 * length)
                weights[name] = 0.9 * weights[name] + 0.1 * ratio
        return weights

    assert GradientNorms.jaxpi().every == 1000
    compare(GradientNorms.jaxpi(reference=reference, every=4), weigh)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_pina(beta: float) -> None:
    """All norms over the own one; with `beta` averaged with the weights before, from 1 on."""
    weights = dict.fromkeys("abc", 1.0)

    def weigh(step: int, norms: Mapping[str, float]) -> Mapping[str, float]:
        for name, norm in norms.items():
            weights[name] = beta * weights[name] + (1 - beta) * sum(norms.values()) / norm
        return weights

    compare(GradientNorms.pina(beta=beta), weigh)


@pytest.mark.parametrize("most", [1e4, 0.5])
def test_vqgan(most: float) -> None:
    """The ratio of norms at one layer, clamped, for all but the reference."""

    def weigh(step: int, norms: Mapping[str, float]) -> Mapping[str, float]:
        ratio = min(max(norms["a"] / (norms["b"] + 1e-4), 0.0), most)
        return {"a": 1.0, "b": 0.8 * ratio}

    preference = {"a": 1.0, "b": 0.8}
    rule = GradientNorms.vqgan("a", preference=preference, max_weight=most)
    compare(rule, weigh, last_layer=True, names="ab")


def test_encodec() -> None:
    """Shares of a total norm over averages that begin without bias."""
    shares, totals, fixes = {"a": 1.0, "b": 3.0, "c": 4.0}, {}, {}

    def weigh(step: int, norms: Mapping[str, float]) -> Mapping[str, float]:
        weights = {}
        for name, norm in norms.items():
            totals[name] = totals.get(name, 0.0) * 0.999 + norm
            fixes[name] = fixes.get(name, 0.0) * 0.999 + 1.0
            share = shares[name] / sum(shares.values())
            weights[name] = share * 2.0 / (totals[name] / fixes[name])
        return weights

    compare(GradientNorms.encodec(shares, total_norm=2.0), weigh)


def test_encodec_balances_opposite_losses_a_hundred_apart() -> None:
    """The check that comes with EnCodec's code: the plain sum has the gradient 99."""
    output = nn.Parameter(torch.zeros(1))
    losses = {"1": (output - 1).abs().mean(), "2": 100 * (output + 1).abs().mean()}
    optimizer = BalancedOptimizer(torch.optim.SGD([output], lr=0.1), GradientNorms.encodec())
    optimizer.backward(losses)
    assert output.grad is not None
    assert_near(output.grad, [0.0], 1e-6)
    assert_near(torch.stack([*optimizer.metrics.coefficients.values()]), (0.5, 0.005), 1e-9)


def test_norms_may_be_measured_at_features() -> None:
    model = SmallModel()
    inputs = normal(8, 3)
    features = torch.tanh(model.trunk(inputs))
    losses = {
        name: 9.0**k * model.heads[k](features).square().mean() for k, name in enumerate("abc")
    }
    expected = {name: norm_of(loss, [features]) for name, loss in losses.items()}
    optimizer = BalancedOptimizer(sgd(model), GradientNorms.encodec())
    optimizer.backward(losses, features=features)
    for name, weight in optimizer.metrics.coefficients.items():
        assert float(weight) == pytest.approx(1 / (3 * expected[name]), rel=1e-9)


# ---------------------------------------------------------------------- first order


@given(seed=st.integers(0, 10_000), decades=st.floats(-6, 6))
def test_two_losses_in_equal_shares_never_rise(seed: int, decades: float) -> None:
    rows = normal(2, 5, seed=seed) * vector((1.0, 10**decades))[:, None]
    rule = GradientNorms()
    statistics = statistics_of([1.0, 1.0], rows @ rows.T)
    slopes = rows @ (rule.weights(statistics, initial_state(rule, 2)).coefficients @ rows)
    assert bool((slopes >= -1e-9 * slopes.abs().max()).all())


def test_of_three_losses_one_may_rise() -> None:
    rows = torch.tensor([[1.0, 0.2], [1.0, -0.2], [-1.0, 0.0]], dtype=torch.float64)
    rule = GradientNorms()
    statistics = statistics_of([1.0] * 3, rows @ rows.T)
    slopes = rows @ (rule.weights(statistics, initial_state(rule, 3)).coefficients @ rows)
    assert float(slopes.min()) < 0
