"""DB-MTL: golden values, lengths, and what its buffer does at the start."""

from __future__ import annotations

import pytest
import torch

from moo_balance import DBMTL, BalancedOptimizer, BalanceValueError
from moo_balance.weighting import Statistics
from tests.support.naive_rows import NaiveRows
from tests.support.problems import Scene, SmallModel, flat_gradient, jacobian, sgd

NAMES = ("a", "b", "c")
G = torch.tensor(
    [[1.0, 2.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.5], [-2.0, 0.5, 0.3, 1.0]], dtype=torch.float64
)
LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def directions(weighting, scene, names=NAMES):
    """The direction of each step, and the averages that it is made of."""
    state, naive = weighting.init(names, torch.device("cpu")), NaiveRows(weighting)
    for step, (losses, rows) in enumerate(zip(scene.losses, scene.jacobians, strict=True)):
        statistics = naive.tell(Statistics(names, losses, rows @ rows.T, step), rows)
        _, coefficients, state = weighting.weights(statistics, state)
        yield naive.combine(coefficients, names, rows), dict(naive.kept)


def first(weighting, rows=G, losses=LOSSES):
    scene = Scene(NAMES, losses[None], losses[None], rows[None])
    return next(directions(weighting, scene))


def test_the_first_step_has_the_published_values():
    direction, kept = first(DBMTL())
    norms = torch.stack([*kept.values()]).norm(dim=1)
    golden = torch.tensor([0.489898, 0.075, 2.310844], dtype=torch.float64)
    torch.testing.assert_close(norms, golden, rtol=0, atol=5e-7)
    golden = torch.tensor([-1.056602, 0.846234, 1.840562, 0.826883], dtype=torch.float64)
    torch.testing.assert_close(direction, golden, rtol=0, atol=1e-6)


def test_all_averages_are_made_as_long_as_the_longest():
    for direction, kept in directions(DBMTL(beta=0.6), Scene.random()):
        averages = torch.stack([*kept.values()])
        norms = averages.norm(dim=1, keepdim=True)
        expected = (averages / norms * norms.max()).sum(0)
        torch.testing.assert_close(direction, expected, rtol=1e-12, atol=1e-14)


def test_training_is_that_of_a_naive_loop():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), DBMTL(beta=0.8, shift=0.5))
    average = 0.0
    for step in range(5):
        losses = model.losses(step)
        rows = jacobian(losses, list(model.parameters()))
        values = torch.stack([*losses.values()]).detach()
        average = 0.8 * average + 0.2 * rows / (values + 0.5)[:, None]
        norms = average.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        expected = (average / norms * norms.max()).sum(0)
        torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-10, atol=1e-12)
        optimizer.step()


def test_debiased_averages_differ_by_one_factor():
    scene = Scene.random()
    pairs = zip(directions(DBMTL(), scene), directions(DBMTL(debiased=True), scene), strict=True)
    for step, ((published, _), (debiased, _)) in enumerate(pairs, start=1):
        factor = 1 - 0.9**step
        torch.testing.assert_close(published, factor * debiased, rtol=1e-12, atol=1e-14)


def test_without_a_past_it_needs_no_state():
    weighting = DBMTL(beta=0.0)
    assert weighting.needs(0).rows is None or not weighting.keeps
    direction, kept = first(weighting)
    assert not kept
    lengths = G.norm(dim=1) / LOSSES
    expected = (G / G.norm(dim=1, keepdim=True)).sum(0) * lengths.max()
    torch.testing.assert_close(direction, expected, rtol=1e-12, atol=1e-14)
    tenth, _ = first(DBMTL())
    torch.testing.assert_close(tenth, direction / 10, rtol=1e-12, atol=1e-14)


def test_the_direction_does_not_depend_on_the_units_of_a_loss():
    scene = Scene.random()
    scaled = scene.scale([1e-6, 1.0, 1e9])
    for (one, _), (other, _) in zip(
        directions(DBMTL(), scene), directions(DBMTL(), scaled), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_lengths_come_in_proportion_to_the_preference():
    _, kept = first(DBMTL())
    averages = torch.stack([*kept.values()])
    unit = averages / averages.norm(dim=1, keepdim=True) * averages.norm(dim=1).max()
    direction, _ = first(DBMTL(preference={"a": 1.0, "b": 2.0, "c": 3.0}))
    shares = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(direction, shares @ unit, rtol=1e-12, atol=1e-14)


def test_a_loss_that_appears_late_is_debiased_by_its_own_steps():
    model = SmallModel()
    optimizer = BalancedOptimizer(sgd(model), DBMTL(debiased=True), loss_names=NAMES)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step, ("a", "b")))
        optimizer.step()
    optimizer.zero_grad()
    losses = model.losses(3, ("c",))
    (rows,) = jacobian(losses, list(model.parameters()))
    optimizer.backward(losses)
    value = losses["c"].item()
    torch.testing.assert_close(flat_gradient(model), rows / value, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_not_positive_is_refused():
    optimizer = BalancedOptimizer(sgd(model := SmallModel()), DBMTL())
    losses = {name: loss - 1000 for name, loss in model.losses().items()}
    with pytest.raises(BalanceValueError, match="larger `shift`"):
        optimizer.backward(losses)
