"""GradDrop: by expectation, by coordinate, and its draws."""

from __future__ import annotations

import copy

import pytest
import torch

from moo_balance import BalancedOptimizer, GradDrop
from moo_balance.weighting._random import draw_coordinates, step_generator
from tests.support.problems import SmallModel, flat_gradient, jacobian, setup, sgd, train
from tests.support.registry import METHODS, NAMES

G = torch.tensor(
    [[1.0, 2.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.5], [-2.0, 0.5, 0.3, 1.0]], dtype=torch.float64
)


def directions(weighting, count, rows=G):
    """Gradients of as many steps with the same rows, and nothing that moves."""
    params = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    optimizer = BalancedOptimizer(torch.optim.SGD([params], lr=0.0), weighting)
    found = []
    for _ in range(count):
        optimizer.zero_grad()
        optimizer.backward({str(k): row @ params for k, row in enumerate(rows)})
        found.append(params.grad.clone())
        optimizer.step()
    return torch.stack(found)


def expectation(rows):
    positive, negative = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
    purity = (1 + rows.sum(0) / rows.abs().sum(0)) / 2
    return purity * positive + (1 - purity) * negative, purity


def test_each_coordinate_has_the_gradients_of_one_sign():
    positive, negative = G.clamp(min=0).sum(0), G.clamp(max=0).sum(0)
    found = directions(GradDrop(), 50)
    assert bool(((found == positive) | (found == negative)).all())
    assert bool((found[:, 2] == 1.3).all())  # no conflict there


def test_the_mean_is_the_expectation():
    count = 4000
    found, (expected, purity) = directions(GradDrop(), count), expectation(G)
    span = G.abs().sum(0)
    error = span * (purity * (1 - purity) / count).sqrt()
    assert bool(((found.mean(0) - expected).abs() <= 4 * error + 1e-12).all())


def test_with_the_same_draws_it_is_that_of_torchjd():
    aggregation = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        rows = torch.randn(4, 16, generator=generator, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = aggregation.GradDrop()(rows)
            torch.manual_seed(seed)
            draws = torch.rand(16, dtype=torch.float64)
        found = GradDrop().combine(list(rows), lambda: draws)  # noqa: B023
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_leak_lets_the_sum_through():
    total = G.sum(0)
    torch.testing.assert_close(directions(GradDrop(leak=1.0), 1)[0], total, rtol=1e-14, atol=1e-14)
    dropped, leaking = directions(GradDrop(), 5), directions(GradDrop(leak=0.25), 5)
    torch.testing.assert_close(leaking, 0.75 * dropped + 0.25 * total, rtol=1e-12, atol=1e-14)


def test_a_single_gradient_passes_whole():
    model, optimizer = setup(next(row for row in METHODS if row.id == "GradDrop"))
    optimizer.backward(model.losses())
    for k, name in enumerate(NAMES):
        (own,) = torch.autograd.grad(model.losses(0, (name,))[name], [model.heads[k].weight])
        assert torch.equal(model.heads[k].weight.grad, own)


def test_preferences_weight_gradients_before_signs_are_drawn():
    shares = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    weighted = directions(GradDrop(preference={"0": 1.0, "1": 2.0, "2": 3.0}), 5)
    expected = directions(GradDrop(), 5, G * shares[:, None])
    torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=1e-14)


def test_draws_depend_on_seed_step_and_parameter_only():
    first = directions(GradDrop(), 20)
    torch.rand(100)  # of another stream
    assert torch.equal(directions(GradDrop(), 20), first)
    assert not torch.equal(directions(GradDrop(seed=1), 20), first)
    assert len({tuple(row.tolist()) for row in first}) > 1
    before = torch.get_rng_state()
    directions(GradDrop(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_parameters_have_draws_of_their_own():
    a, b = (torch.nn.Parameter(torch.zeros(64, dtype=torch.float64)) for _ in range(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([a, b], lr=0.1), GradDrop())
    optimizer.backward({"up": a.sum() + b.sum(), "down": -a.sum() - b.sum()})
    assert not torch.equal(a.grad, b.grad)


def test_draws_of_all_steps_and_parameters_differ():
    shape, like = torch.Size([4]), torch.zeros(())
    first = {tuple(torch.rand(4, generator=step_generator(0, step)).tolist()) for step in range(9)}
    draws = {
        tuple(draw_coordinates(0, step, position, shape, like).tolist())
        for step in range(9)
        for position in range(9)
    }
    assert len(draws | first) == 90


def test_a_resumed_run_draws_what_the_first_would_have_drawn():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), GradDrop())
    train(model, optimizer, range(3))
    twin, state = copy.deepcopy(model), optimizer.state_dict()
    train(model, optimizer, range(3, 6))
    other = BalancedOptimizer(sgd(twin), GradDrop())
    other.load_state_dict(state)
    train(twin, other, range(3, 6))
    assert torch.equal(flat_gradient(model), flat_gradient(twin))


def test_zero_gradients_stay_zero():
    rows = G.clone()
    rows[:, 1] = 0.0
    found = directions(GradDrop(), 10, rows)
    assert bool((found[:, 1] == 0).all())
    assert bool(found.isfinite().all())


def test_every_parameter_that_a_loss_reaches_has_a_gradient():
    model = SmallModel()
    rows = jacobian(model.losses(), list(model.parameters()))
    BalancedOptimizer(sgd(model), GradDrop()).backward(model.losses())
    assert bool(((rows != 0).any(0) == (flat_gradient(model) != 0)).all())
