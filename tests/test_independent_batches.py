"""The promises of methods that need gradients of several batches in each step, by their rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from benchmarks.speed.counts import HostSyncs
from moo_balance import MGDA, BalancedOptimizer, BalanceError, MovingAverage, Rescaled, Sequential
from moo_balance.engine import PerLoss
from moo_balance.weighting import Statistics
from tests.support.problems import (
    Scene,
    SmallModel,
    assert_same_parameters,
    flat_gradient,
    gradients,
    jacobian,
    play,
    setup,
    sgd,
    whole_state,
)
from tests.support.registry import NAMES, over_all

over_rows = over_all(lambda method: method.independent)

MICRO = 3


def micro_step(model, optimizer, step, present=lambda number: NAMES, **arguments):
    optimizer.zero_grad()
    for number in range(MICRO - 1):
        with optimizer.accumulate():
            optimizer.backward(model.losses(MICRO * step + number, present(number)), **arguments)
    last = MICRO - 1
    optimizer.backward(model.losses(MICRO * step + last, present(last)), **arguments)


def train(model, optimizer, steps, **arguments):
    for step in steps:
        micro_step(model, optimizer, step, **arguments)
        optimizer.step()


def naive_gramian(model, step):
    """Products of all pairs of different micro-batches, the slow obvious way; and the sum."""
    rows = [
        jacobian(model.losses(MICRO * step + k), list(model.parameters())) for k in range(MICRO)
    ]
    pairs = [a @ b.T for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return torch.stack(pairs).mean(0) * MICRO**2, torch.stack(rows).sum(0)


@over_rows
def test_the_gradient_is_that_of_the_naive_products(method):
    model, optimizer = setup(method)
    weighting = method.make(NAMES)
    state = weighting.init(NAMES, torch.device("cpu"))
    for step in range(4):
        gramian, rows = naive_gramian(model, step)
        losses = torch.stack(list(optimizer_losses(model, step).values()))
        due = step % weighting.every == 0
        statistics = Statistics(NAMES, losses, gramian if due else None, step)
        _, coefficients, state = weighting.weights(statistics, state)
        train(model, optimizer, [step])
        found = torch.stack([*optimizer.metrics.coefficients.values()])
        torch.testing.assert_close(found, coefficients, rtol=1e-8, atol=1e-10)
        expected = coefficients @ rows
        torch.testing.assert_close(
            flat_gradient(model), expected, rtol=1e-8, atol=1e-10 * float(rows.abs().max())
        )


@torch.no_grad()
def optimizer_losses(model, step):
    """The sums of a window's losses."""
    batches = [model.losses(MICRO * step + k) for k in range(MICRO)]
    return {name: sum(batch[name] for batch in batches) for name in NAMES}


@over_rows
def test_single_batches_are_refused_and_change_nothing(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)
    with pytest.raises(BalanceError, match=rf"{type(optimizer.weighting).__name__} should get"):
        optimizer.backward(model.losses())
    with pytest.raises(BalanceError, match="at least two independent batches"):
        optimizer.combined_loss(model.losses())
    assert whole_state(model, optimizer) == before
    assert gradients(model) == [None] * len(gradients(model))
    train(model, optimizer, range(2))


@over_rows
def test_a_resumed_run_is_the_same_to_the_last_bit(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    twin, other = setup(method)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(twin, other, range(3, 6))
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_rows
def test_every_parameter_that_a_loss_reaches_moves(method):
    model, optimizer = setup(method, optimizer=sgd)
    before = [param.clone() for param in model.parameters()]
    train(model, optimizer, range(2))
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved)


@over_rows
def test_absent_losses(method):
    model, optimizer = setup(method, loss_names=NAMES)
    patterns = ["abc", "ab", "bc", "a", "abc"]
    for step, names in enumerate(patterns):
        train(model, optimizer, [step], present=lambda number, names=names: tuple(names))
        coefficients = torch.stack([*optimizer.metrics.coefficients.values()])
        assert tuple(optimizer.metrics.names) == tuple(names)
        assert float(coefficients.sum()) == pytest.approx(1.0, rel=1e-12)
        weights = optimizer.state_dict()["balance"]["state"]["weights"]
        assert float(weights.sum()) == pytest.approx(1.0, rel=1e-12)


@over_rows
def test_a_loss_scale_does_not_matter(method):
    model, optimizer = setup(method)
    twin, other = setup(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        micro_step(model, optimizer, step, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        train(twin, other, [step])
    assert_same_parameters(model, twin)


@over_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_parameters(method, dtype):
    model, _ = setup(method)
    model = model.to(dtype)
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    train(model, optimizer, range(3))
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())


@over_rows
def test_a_zero_gradient_leaves_all_coefficients_finite(method):
    model, optimizer = setup(method)
    for step in range(3):
        optimizer.zero_grad()
        for number in range(2):
            losses = model.losses(2 * step + number)
            losses["a"] = losses["a"].detach() + 0 * model.trunk.weight.sum()
            if number:
                optimizer.backward(losses)
            else:
                with optimizer.accumulate():
                    optimizer.backward(losses)
        optimizer.step()
        assert all(map(math.isfinite, optimizer.log_dict().values()))


@over_rows
def test_it_is_not_projected_whatever_the_engine(method):
    model, optimizer = setup(method, engine=PerLoss(unbiased=True))
    twin, other = setup(method)
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    assert whole_state(model, optimizer) == whole_state(twin, other)
    assert optimizer.metrics.projected is None


@over_rows
def test_methods_around_it_have_its_need(method):
    inner = method.make(NAMES)
    for around in (MovingAverage(inner), Rescaled(inner, "one"), Sequential([inner], [])):
        assert around.uses_independent_batches
        assert around.needs(0).independent
        model, optimizer = setup(method)
        optimizer = BalancedOptimizer(sgd(model), around)
        with pytest.raises(BalanceError, match=f"{type(inner).__name__} should get"):
            optimizer.backward(model.losses())
        train(model, optimizer, range(2))
    phases = Sequential([MGDA(), inner], milestones=[1])
    model, _ = setup(method)
    optimizer = BalancedOptimizer(sgd(model), phases)
    optimizer.backward(model.losses())
    optimizer.step()
    with pytest.raises(BalanceError, match="at least two independent batches"):
        optimizer.backward(model.losses())


@over_rows
def test_losses_that_a_mask_leaves_out_have_no_part(method):
    """As on an accelerator, where the host does not know them."""
    weighting, scene = method.make(NAMES), Scene.random(seed=7)
    gramian = scene.jacobians[0] @ scene.jacobians[0].T
    mask = torch.tensor([False, True, False])
    hidden = gramian.masked_fill(mask[:, None] | mask, 0.0)
    marked = Statistics(NAMES, scene.losses[0], hidden, 6, satisfied=mask)
    rest = Statistics(("a", "c"), scene.losses[0][~mask], gramian[~mask][:, ~mask], 6)
    alone = {"weights": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)}
    for state in (play(weighting, scene)[-1].state, alone):
        found = weighting.weights(marked, state)
        expected = weighting.weights(rest, {"weights": state["weights"][~mask]})
        for one, other in (
            (found.coefficients, expected.coefficients),
            (found.state["weights"], expected.state["weights"]),
        ):
            torch.testing.assert_close(one[~mask], other, rtol=1e-12, atol=1e-12)


@over_rows
def test_a_step_reads_nothing_on_the_host(method):
    model = SmallModel().to("meta")
    optimizer = BalancedOptimizer(sgd(model), method.make(NAMES))
    with HostSyncs() as counted:
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.accumulate():
                optimizer.backward(losses_on_meta(model))
            optimizer.backward(losses_on_meta(model))
            optimizer.step()
    assert counted.syncs == []


def losses_on_meta(model):
    features = model.trunk(torch.zeros(2, 3, dtype=torch.float64, device="meta"))
    return {name: model.heads[k](features).mean() for k, name in enumerate(NAMES)}


@over_rows
def test_gradients_of_different_batches_that_are_orthogonal_are_not_satisfied(method):
    """As those of the rows of an embedding are."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.01), method.make(("a", "b")))
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward({"a": 3 * weight[0] ** 2, "b": weight[2] ** 2})
        optimizer.backward({"a": 3 * weight[1] ** 2, "b": weight[2] ** 2})
        assert optimizer.metrics.satisfied == ()
        assert all(c > 0 for c in optimizer.metrics.coefficients.values())
        optimizer.step()
