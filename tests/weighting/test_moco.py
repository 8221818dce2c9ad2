"""MoCo against a plain loop over dense rows."""

from __future__ import annotations

import pytest
import torch

from moo_balance import MGDA, BalancedOptimizer, MoCo
from moo_balance.functional import min_norm_weights, project_simplex
from moo_balance.weighting import RowStatistics, Statistics
from tests.support.naive_rows import NaiveRows
from tests.support.problems import Scene, SmallModel, flat_gradient, jacobian, play, sgd

NAMES = ("a", "b", "c")
G = torch.tensor(
    [[1.0, 2.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.5], [-2.0, 0.5, 0.3, 1.0]], dtype=torch.float64
)
LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def steps(weighting, count, rows=G, losses=LOSSES):
    state, naive = weighting.init(NAMES, torch.device("cpu")), NaiveRows(weighting)
    for step in range(count):
        statistics = naive.tell(Statistics(NAMES, losses, rows @ rows.T, step), rows)
        weights, coefficients, state = weighting.weights(statistics, state)
    return weights, naive.combine(coefficients, NAMES, rows)


def test_each_step_is_the_published_rule():
    scene, beta, gamma, rho = Scene.random(), 0.7, 0.02, 0.3
    tracked, weights = (
        torch.zeros_like(scene.jacobians[0]),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    for rows, answer in zip(scene.jacobians, play(MoCo(beta, gamma, rho), scene), strict=True):
        tracked = beta * tracked + (1 - beta) * rows
        matrix = tracked @ tracked.T + rho * torch.eye(3, dtype=torch.float64)
        weights = project_simplex(weights - gamma * matrix @ weights)
        torch.testing.assert_close(answer.weights, weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("length", ["gradient", "loss"])
def test_training_is_that_of_a_naive_loop(length):
    model, twin = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MoCo(lr=0.01, length=length))
    params = list(twin.parameters())
    tracked = weights = None
    for step in range(5):
        losses = twin.losses(step)
        rows = jacobian(losses, params)
        if length == "loss":
            values = torch.stack([*losses.values()]).detach()
            rows = rows / rows.norm(dim=1, keepdim=True) * values[:, None]
        tracked = rows / 2 if tracked is None else (tracked + rows) / 2
        weights = torch.full((3,), 1 / 3, dtype=torch.float64) if weights is None else weights
        weights = project_simplex(weights - 0.01 * tracked @ tracked.T @ weights)
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        expected = weights @ tracked
        torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-10, atol=1e-12)
        optimizer.step()
        with torch.no_grad():
            for own, other in zip(params, model.parameters(), strict=True):
                own.copy_(other)


def test_it_approaches_the_min_norm_point():
    weights, direction = steps(MoCo(lr=0.05), 3000)
    expected = min_norm_weights(G @ G.T)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(direction, expected @ G, rtol=1e-9, atol=1e-9)
    assert float(direction @ direction) == pytest.approx(0.371471454, abs=1e-8)


def test_the_projection_is_no_softmax():
    """A dominated loss gets nothing; a softmax of numbers in [0, 1] would leave it a quarter."""
    rows = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    weighting, names = MoCo(lr=1.0), ("a", "b")
    state, naive = weighting.init(names, torch.device("cpu")), NaiveRows(weighting)
    for step in range(20):
        statistics = naive.tell(Statistics(names, LOSSES[:2], rows @ rows.T, step), rows)
        weights, _, state = weighting.weights(statistics, state)
    assert weights.tolist() == [1.0, 0.0]


def test_rho_pulls_towards_equal_weights():
    free, _ = steps(MoCo(lr=0.05), 500)
    pulled, _ = steps(MoCo(lr=0.05, rho=2.0), 500)
    assert float(pulled.std()) < 0.8 * float(free.std())


def test_improvements_come_in_proportion_to_the_preference():
    preference = {"a": 1.0, "b": 2.0, "c": 4.0}
    _, direction = steps(MoCo(lr=0.01, preference=preference), 5000)
    shares = G @ direction / torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(shares, shares.mean().expand(3), rtol=1e-6, atol=1e-8)
    _, expected = steps(MoCo(lr=0.05), 5000)
    assert torch.allclose(G @ expected, (G @ expected).mean().expand(3), rtol=1e-6)


def test_averages_remove_noise_that_batches_share_with_their_own_weights():
    """The direction of expected gradients, where the exact solution per batch misses it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[1.0, 0.0], [0.0, 1.5]], dtype=torch.float64)
    names = ("a", "b")

    def mean_direction(weighting):
        state, naive = weighting.init(names, torch.device("cpu")), NaiveRows(weighting)
        total, count = torch.zeros(2, dtype=torch.float64), 0
        for step in range(2000):
            noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
            rows = true + noise
            statistics = naive.tell(Statistics(names, LOSSES[:2], rows @ rows.T, step), rows)
            _, coefficients, state = weighting.weights(statistics, state)
            if step >= 500:
                total, count = total + naive.combine(coefficients, names, rows), count + 1
        return total / count

    expected = min_norm_weights(true @ true.T) @ true
    error = {
        type(w).__name__: float((mean_direction(w) - expected).norm() / expected.norm())
        for w in (MGDA(), MoCo(beta=0.99, lr=0.01))
    }
    assert error["MoCo"] < 0.1
    assert error["MGDA"] > 3 * error["MoCo"]


def test_an_absent_loss_finds_its_share_again():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), MoCo(lr=1e-12))
    for present in (NAMES, ("a",), ("a", "c"), NAMES):
        optimizer.zero_grad()
        optimizer.backward(model.losses(0, present))
        optimizer.step()
        weights = torch.stack([*optimizer.metrics.weights.values()])
        torch.testing.assert_close(
            weights, torch.full_like(weights, 1 / len(present)), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("learned", [(0.2, 0.5, 0.3), (0.0, 1.0, 0.0)])
def test_a_loss_that_a_mask_leaves_out_has_no_part(learned):
    weighting, mask = MoCo(rho=0.1), torch.tensor([False, True, False])
    learned = torch.tensor(learned, dtype=torch.float64)
    gramian = G @ G.T
    hidden = gramian.masked_fill(mask[:, None] | mask, 0.0)
    marked = Statistics(NAMES, LOSSES, hidden, 1, RowStatistics(gramian=gramian), mask)
    kept = gramian[~mask][:, ~mask]
    rest = Statistics(("a", "c"), LOSSES[~mask], kept, 1, RowStatistics(gramian=kept))
    found = weighting.weights(marked, {"learned": learned})
    expected = weighting.weights(rest, {"learned": learned[~mask]})
    torch.testing.assert_close(found.coefficients[~mask], expected.coefficients)
    torch.testing.assert_close(found.state["learned"][~mask], expected.state["learned"])


def test_a_preferred_loss_has_more_of_the_gradient_from_the_first_step_on():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    method = MoCo(preference={"a": 4.0, "b": 1.0, "c": 1.0}, lr=1e-9)
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), method)
    optimizer.backward({"a": w[0] ** 2, "b": w[1] ** 2, "c": w[2] ** 2})
    torch.testing.assert_close(w.grad / w.grad.sum(), torch.tensor([4.0, 1.0, 1.0]).double() / 6)
    assert optimizer.metrics.coefficients["a"].item() == pytest.approx(4 / 6)
