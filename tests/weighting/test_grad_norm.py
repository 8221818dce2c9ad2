"""GradNorm: against a plain loop with autograd, its fixed points, and what may go wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from moo_balance import BalancedOptimizer, GradientNorms, GradNorm
from moo_balance.weighting import State, Weighting
from tests.support.problems import SmallModel, as_vector, train
from tests.support.statistics import assert_near, initial_state, statistics_of, vector

SHARES = {"a": 1.0, "b": 3.0, "c": 4.0}


def descent(params: nn.Module | Sequence[Tensor], lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(params.parameters() if isinstance(params, nn.Module) else params, lr=lr)


def train_by_hand(
    steps: int, alpha: float, lr: float, adam: bool, shares: Tensor, layer: bool
) -> tuple[SmallModel, list[Tensor]]:
    """The algorithm of the paper, with autograd for the weights and an optimizer that lasts."""
    model = SmallModel()
    params = [model.trunk.weight] if layer else list(model.parameters())
    weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
    of_weights = torch.optim.Adam([weights], lr=lr) if adam else descent([weights], lr)
    optimizer, first, seen = descent(model, 1e-4), None, []
    for step in range(steps):
        losses = torch.stack([*model.losses(step).values()])
        first = losses.detach() if first is None else first
        norms = []
        for loss in losses:
            grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            norms.append(torch.cat([g.reshape(-1) for g in grads if g is not None]).norm())
        lengths = weights * torch.stack(norms)
        rates = losses.detach() / first
        mean = lengths.mean().detach()
        target = mean * 3 * shares * (rates / rates.mean()) ** alpha
        objective = (lengths - target).abs().sum() / (1.0 if adam else mean)
        seen.append(weights.detach().clone())
        optimizer.zero_grad()
        (seen[-1] @ losses).backward()
        of_weights.zero_grad()
        objective.backward()
        of_weights.step()
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(min=0.0).mul_(3 / weights.sum())
    return model, seen


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("preference", [None, SHARES])
@pytest.mark.parametrize(
    ("alpha", "lr", "optimizer"), [(1.5, 0.025, "adam"), (0.12, 0.1, "adam"), (1.0, 0.02, "sgd")]
)
def test_weights_are_those_of_a_plain_loop(
    alpha: float, lr: float, optimizer: str, preference: dict[str, float] | None, layer: bool
) -> None:
    rule = GradNorm(alpha, lr, optimizer, preference=preference)
    model = SmallModel()
    balanced = BalancedOptimizer(
        descent(model, 1e-4), rule, shared_params=[model.trunk.weight] if layer else None
    )
    shares = vector((1 / 3,) * 3 if preference is None else (1 / 8, 3 / 8, 4 / 8))
    twin, expected = train_by_hand(20, alpha, lr, optimizer == "adam", shares, layer)
    for step, weights in enumerate(expected):
        train(model, balanced, [step])
        assert_near(as_vector(balanced.metrics.coefficients), weights, 1e-7)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(own.detach(), other.detach(), 1e-8)


def settle(
    rule: GradNorm, norms: Sequence[float], losses: Sequence[float], steps: int = 500
) -> tuple[Tensor, State]:
    """Coefficients after many steps with the same norms; the first losses are ones."""
    gramian, state = torch.diag(vector(norms)).square(), initial_state(rule, len(norms))
    coefficients = vector(norms)
    for step in range(steps):
        values = losses if step else [1.0] * len(norms)
        _, coefficients, state = rule.weights(statistics_of(values, gramian, step), state)
    return coefficients, state


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("preference", [None, SHARES])
def test_with_alpha_zero_it_settles_where_gradient_norms_are(
    optimizer: str, preference: dict[str, float] | None
) -> None:
    norms = (1.0, 2.0, 8.0)
    rule = GradNorm(0.0, 5e-3, optimizer, preference=preference)
    learned, _ = settle(rule, norms, (1.0, 1.0, 1.0))
    rule = GradientNorms(preference=preference)
    statistics = statistics_of([1.0] * 3, torch.diag(vector(norms)).square())
    direct = rule.weights(statistics, initial_state(rule, 3)).coefficients
    assert_near(learned, 3 * direct / direct.sum(), 0.06)


def test_losses_that_train_slowly_get_longer_gradients() -> None:
    norms = vector((1.0, 3.0, 2.0))
    weights, _ = settle(GradNorm(0.5, 5e-3), norms.tolist(), (0.2, 0.4, 0.9))
    assert (weights * norms).argsort().tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_unit_matters(optimizer: str, scale: float) -> None:
    rule = GradNorm(1.5, 0.01, optimizer)
    plain, _ = settle(rule, (1.0, 3.0), (0.5, 0.9), 30)
    scaled, _ = settle(rule, (scale, 3 * scale), (0.5, 0.9), 30)
    assert_near(scaled, plain, 1e-12)


def test_norms_decades_apart_move_all_weights_alike() -> None:
    """Adam's epsilon is no length that gradients are compared with."""
    weights, _ = settle(GradNorm(0.0, 0.01), (1e-12, 1.0, 1e12), (1.0, 1.0, 1.0), 2)
    assert_near(weights, (1.01 * 3 / 3.01, 1.01 * 3 / 3.01, 0.99 * 3 / 3.01), 1e-9)


def test_weights_stay_nonnegative_and_sum_to_the_number_of_losses() -> None:
    rule = GradNorm(0.0, 0.3)
    for steps in range(1, 60):
        weights, _ = settle(rule, (1.0, 1e6), (1.0, 1.0), steps)
        assert bool((weights >= 0).all())
        assert float(weights.sum()) == pytest.approx(2.0, rel=1e-12)


def test_a_zero_gradient_changes_nothing_for_the_others() -> None:
    rule: Weighting = GradNorm()
    full, small = initial_state(rule, 3), initial_state(rule, 2)
    for step in range(5):
        losses, norms = (1.0 / (step + 1), 1.0, 2.0), vector((1.0, 2.0, 0.0))
        gramian = torch.diag(norms).square()
        more = rule.weights(statistics_of(losses, gramian, step), full)
        less = rule.weights(statistics_of(losses[:2], gramian[:2, :2], step), small)
        full, small = more.state, less.state
        torch.testing.assert_close(more.coefficients[:2], less.coefficients)
        assert float(more.coefficients[2]) == 0.0
        assert float(full["learned"][2]) == 1.0
    zero = rule.weights(statistics_of([1.0, 1.0, 1.0], torch.zeros(3, 3).double()), full)
    assert bool(zero.coefficients.isfinite().all())
    assert torch.equal(zero.state["learned"], full["learned"])


def test_a_loss_that_appears_later_is_compared_with_its_own_first_value() -> None:
    model = SmallModel()
    rule = GradNorm(1.5)
    optimizer = BalancedOptimizer(descent(model, 1e-4), rule, loss_names=["a", "b", "c"])
    train(model, optimizer, [0, 1], "ab")
    first = model.losses(2)["c"].item()
    train(model, optimizer, [2], "abc")
    state = optimizer.state_dict()["balance"]["state"]
    assert float(state["first_losses"][2]) == first
    assert float(as_vector(optimizer.metrics.coefficients).sum()) == pytest.approx(3.0)
    train(model, optimizer, [3], "c")
    assert float(optimizer.metrics.coefficients["c"]) == pytest.approx(1.0)
