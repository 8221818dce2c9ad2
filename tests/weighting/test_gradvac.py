"""GradVac against explicit vectors, PCGrad, and an independent implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import BalancedOptimizer, GradVac, PCGrad
from moo_balance.functional._surgery import draw_order
from moo_balance.weighting import State, step_generator
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.oracle import coefficients_of, deviation, random_jacobians
from tests.support.statistics import (
    assert_near,
    initial_state,
    normal,
    run_steps,
    statistics_of,
    vector,
)

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)


def by_vectors(rows: Tensor, targets: Tensor, step: int, beta: float) -> Tensor:
    """The algorithm as printed, on whole gradients; changes the targets."""
    total = torch.zeros_like(rows[0])
    for i, others in enumerate(draw_order(len(rows), step_generator(0, step))):
        corrected = rows[i].clone()
        for j in others:
            cosine, target = torch.cosine_similarity(corrected, rows[j], 0), targets[i, j].clone()
            if cosine < target:
                sine, aim = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).sqrt()
                factor = (target * sine - cosine * aim) / (rows[j].norm() * aim)
                corrected = corrected + corrected.norm() * factor * rows[j]
            targets[i, j] = beta * target + (1 - beta) * cosine
        total += corrected
    return total


def run(weighting: GradVac, batches: list[Tensor]) -> list[tuple[Tensor, State]]:
    """Coefficients and state after each batch."""
    outputs = run_steps(weighting, gramians=list(map(gramian_of, batches)))
    return [(output.coefficients, output.state) for output in outputs]


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_coefficients_are_those_of_the_algorithm_on_vectors(count: int, beta: float) -> None:
    common = normal(2 * count, seed=99)
    batches = [normal(count, 2 * count, seed=step) + step / 10 * common for step in range(20)]
    targets = torch.zeros(count, count, dtype=torch.float64)
    for step, (coefficients, state) in enumerate(run(GradVac(beta), batches)):
        expected = by_vectors(batches[step], targets, step, beta)
        assert_near(coefficients @ batches[step], expected, 1e-10 * float(expected.norm()))
        assert_near(state["cosines"], targets, 1e-12)


def test_it_agrees_with_torchjd_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    worst = 0.0
    for rows in random_jacobians():
        count = len(rows)
        peer = aggregation.GradVacWeighting(beta=0.5, eps=0.0)
        batches = [rows, rows.flip(0) + 0.5 * rows.mean(0), rows.abs(), rows]
        for step, (coefficients, _) in enumerate(run(GradVac(beta=0.5), batches)):
            order = draw_order(count, step_generator(0, step))
            # The peer draws for each gradient a permutation of the list of the others.
            drawn = iter([torch.from_numpy(o - (o > i)) for i, o in enumerate(order)])
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randperm", lambda _, drawn=drawn: next(drawn))
                expected = peer(gramian_of(batches[step]))
            worst = max(worst, deviation(batches[step], coefficients, expected))
    assert worst < 1e-10


def test_the_golden_values_are_those_of_pcgrad() -> None:
    coefficients = coefficients_of(GradVac(), gramian_of(TWO))
    assert_near(coefficients @ TWO, (0.584795, 3.801170, 3.801170), 1e-6)


@property_test
@given(jacobians(decades=3.0), st.integers(0, 100))
def test_the_first_step_is_that_of_pcgrad(rows: Tensor, seed: int) -> None:
    gramian = gramian_of(rows)
    expected = coefficients_of(PCGrad(seed=seed), gramian)
    assert deviation(rows, coefficients_of(GradVac(seed=seed), gramian), expected) < 1e-12


def test_a_cosine_is_raised_to_its_target() -> None:
    rows, target = vector([2, 0, 0, 3]).reshape(2, 2), 0.6
    state = {"cosines": vector([0, target, target, 0]).reshape(2, 2)}
    statistics = statistics_of([1.0, 1.0], gramian_of(rows))
    coefficients = GradVac().weights(statistics, state).coefficients
    second = coefficients[1] - 1  # what the first gradient got of the second
    corrected = rows[0] + second * rows[1]
    assert torch.cosine_similarity(corrected, rows[1], 0).item() == pytest.approx(target)


@pytest.mark.parametrize("count", [2, 4])
def test_a_target_below_zero_tolerates_a_conflict(count: int) -> None:
    rows = torch.eye(count).double() - 0.3
    target = gramian_of(rows)[0, 1] / gramian_of(rows)[0, 0] - 0.1
    state = {"cosines": torch.full((count, count), float(target)).double()}
    found = GradVac().weights(statistics_of([1.0] * count, gramian_of(rows)), state)
    assert found.coefficients.tolist() == [1.0] * count


@pytest.mark.parametrize("count", [3, 4])
def test_targets_of_a_pair_wait_while_one_of_the_two_is_absent(count: int) -> None:
    parameters = torch.nn.Parameter(normal(4, seed=5))
    rows, names = normal(count, 4), "abcd"[:count]
    weighting = GradVac(beta=0.5)
    optimizer = BalancedOptimizer(torch.optim.SGD([parameters], lr=0.0), weighting)

    def take(present: str) -> Tensor:
        losses = {name: rows[names.index(name)] @ parameters for name in present}
        optimizer.step(lambda: losses)
        return optimizer.state_dict()["balance"]["state"]["cosines"].clone()

    before = take(names)
    after = take(names[1:])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.equal(after[1:, 1:], before[1:, 1:])
    # As if the absent one had never been there.
    others = run(weighting, [rows[1:]])[0][1]["cosines"]
    fresh = BalancedOptimizer(
        torch.optim.SGD([parameters], lr=0.0), weighting, loss_names=list(names)
    )
    fresh.step(lambda: {name: rows[names.index(name)] @ parameters for name in names[1:]})
    kept = fresh.state_dict()["balance"]["state"]["cosines"]
    assert_near(kept[1:, 1:], others, 1e-12)
    assert not kept[0].any()
    assert not kept[:, 0].any()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_zero_gradient_moves_no_target(count: int) -> None:
    rows = normal(count, 4)
    rows[0] = 0.0
    coefficients, state = run(GradVac(beta=0.5), [rows])[0]
    assert bool(coefficients.isfinite().all())
    assert not state["cosines"][0].any()
    assert not state["cosines"][:, 0].any()
    if count > 2:
        assert bool((state["cosines"][1:, 1:] != 0).any())


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_left_of_opposite_gradients_has_no_direction(count: int) -> None:
    rows = torch.cat([TWO[:1], -TWO[:1], TWO[1:]])[:count]
    found = coefficients_of(GradVac(), gramian_of(rows)) @ rows
    expected = coefficients_of(PCGrad(), gramian_of(rows)) @ rows
    assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_losses_keep_coefficients_of_one(count: int, dtype: torch.dtype) -> None:
    """Their cosine is 1 up to rounding, and so is the target."""
    rows = normal(1, 7).expand(count, 7).to(dtype)
    for coefficients, _ in run(GradVac(beta=0.5), [rows * (1 + k / 7) for k in range(100)]):
        assert_near(coefficients, [1.0] * count, 1e-3 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_that_were_equal_for_long_may_part(count: int) -> None:
    rows = normal(1, 7).expand(count, 7)
    batches = [rows] * 200 + [normal(count, 7, seed=1)]
    coefficients, _ = run(GradVac(beta=0.5), batches)[-1]
    assert bool(coefficients.isfinite().all())


@pytest.mark.parametrize("count", [2, 5])
def test_norms_may_lie_sixty_decades_apart(count: int) -> None:
    rows = normal(count, 4, seed=3)
    factors = 10.0 ** torch.linspace(-30, 30, count, dtype=torch.float64)
    plain, scaled = (
        run(GradVac(beta=0.5), [rows, rows]),
        run(GradVac(beta=0.5), [rows * factors[:, None]] * 2),
    )
    for (_, one), (found, other) in zip(plain, scaled, strict=True):
        assert bool(found.isfinite().all())
        assert_near(other["cosines"], one["cosines"], 1e-12)


@pytest.mark.parametrize("count", [2, 4])
def test_a_preference_is_the_share_of_a_corrected_gradient(count: int) -> None:
    """In the first step the corrected gradients are those of PCGrad."""
    names = "abcd"[:count]
    preference = {name: 1.0 + k for k, name in enumerate(names)}
    gramian = gramian_of(normal(count, 3))
    for reduction in ("sum", "mean"):
        expected = coefficients_of(PCGrad(reduction, preference=preference), gramian)
        found = coefficients_of(GradVac(0.5, reduction, preference=preference), gramian)
        assert_near(found, expected, 1e-12)


def test_between_two_refreshes_targets_and_coefficients_are_kept() -> None:
    weighting = GradVac(every=2)
    rows = normal(3, 3)
    state = initial_state(weighting, 3)
    first = weighting.weights(statistics_of([1.0] * 3, gramian_of(rows)), state)
    second = weighting.weights(statistics_of([1.0] * 3, step=1), first.state)
    assert torch.equal(second.coefficients, first.coefficients)
    assert torch.equal(second.state["cosines"], first.state["cosines"])
