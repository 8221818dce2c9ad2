"""The Gramian of expected gradients: unbiased, projected, and what it is refused for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from benchmarks.speed.counts import HostSyncs, PeakElements
from moo_balance import (
    MGDA,
    BalancedOptimizer,
    BalanceError,
    BalanceValueError,
    NonFiniteError,
    SumLog,
)
from moo_balance.engine import PerLoss, Problem, Streaming
from moo_balance.engine.independent import BatchProducts, project_semidefinite
from tests.support.engine_graphs import GRAPHS, assert_same, unhooked_jacobian
from tests.support.noisy import (
    MEANS,
    NAMES,
    SIZE,
    NoisyLosses,
    Recording,
    deviation,
    draw_gramians,
    expected_gramian,
    gramian_of_step,
)
from tests.support.problems import spoil_gradient

DRAWS, LIMIT = 200, 4.5

PATTERNS = {
    "all": lambda number: NAMES,
    "uneven": lambda number: ("abc", "ab", "ac", "ca")[number],
    "never together": lambda number: ("ab", "c", "c", "ba")[number],
}
over_patterns = pytest.mark.parametrize("present", PATTERNS.values(), ids=PATTERNS)


# ---------------------------------------------------------------------- expectation


@pytest.mark.parametrize("window", [2, 4])
def test_the_estimate_is_unbiased_and_the_plain_gramian_is_not(window: int) -> None:
    losses, plain = NoisyLosses(seed=1), NoisyLosses(seed=1)
    expected = expected_gramian(window)
    estimates = draw_gramians(losses, losses.optimizer(), DRAWS, window)
    assert deviation(estimates, expected) < LIMIT
    measured = draw_gramians(plain, plain.optimizer(PerLoss()), DRAWS, window)
    assert deviation(measured, expected) > 2 * LIMIT


@pytest.mark.parametrize("present", [PATTERNS["uneven"], PATTERNS["never together"]])
def test_absent_losses_leave_the_estimate_unbiased(present) -> None:
    losses, plain = NoisyLosses(seed=2), NoisyLosses(seed=2)
    expected = expected_gramian(4, present)
    estimates = draw_gramians(losses, losses.optimizer(), DRAWS, 4, present)
    assert deviation(estimates, expected) < LIMIT
    measured = draw_gramians(plain, plain.optimizer(PerLoss()), DRAWS, 4, present)
    assert deviation(measured, expected) > 2 * LIMIT


def test_little_noise_is_not_projected_and_so_stays_unbiased() -> None:
    losses = NoisyLosses(seed=3, noise=0.1)
    optimizer = losses.optimizer(PerLoss(unbiased=True))
    estimates = draw_gramians(losses, optimizer, DRAWS, 4)
    assert deviation(estimates, expected_gramian(4)) < LIMIT
    assert float(optimizer.metrics.projected) < 1e-12


# ---------------------------------------------------------------------- against the slow twin


def pairs(batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The estimate by its definition: the mean over all pairs of different batches."""
    result = torch.zeros(3, 3, dtype=torch.float64)
    for j, one in enumerate(NAMES):
        for k, other in enumerate(NAMES):
            products = [
                left[one] @ right[other]
                for a, left in enumerate(batches)
                for b, right in enumerate(batches)
                if a != b and one in left and other in right
            ]
            counts = [sum(name in batch for batch in batches) for name in (one, other)]
            result[j, k] = torch.stack(products).mean() * counts[0] * counts[1]
    return result


@over_patterns
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_mean_over_all_pairs_of_different_batches(present, dtype: torch.dtype) -> None:
    losses, twin = NoisyLosses(seed=4, dtype=dtype), NoisyLosses(seed=4)
    found = gramian_of_step(losses.optimizer(), losses, 4, present)
    rows = [dict(zip(NAMES, twin.rows().to(dtype).double(), strict=True)) for _ in range(4)]
    batches = [{name: rows[k][name] for name in present(k)} for k in range(4)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, pairs(batches), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_gradients_of_any_size(scale: float) -> None:
    losses, twin = (NoisyLosses(seed=5, dtype=torch.float32) for _ in range(2))
    optimizer, other = losses.optimizer(), twin.optimizer()
    found = _window(optimizer, [_times(losses.batch(), scale) for _ in range(3)])
    plain = _window(other, [twin.batch() for _ in range(3)])
    torch.testing.assert_close(found.double() / scale / scale, plain.double(), rtol=1e-4, atol=1e-3)


def _times(losses: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: loss * factor for name, loss in losses.items()}


def _window(optimizer: BalancedOptimizer, batches: Sequence[dict[str, Tensor]], **last) -> Tensor:
    for losses in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(losses, **last)
    optimizer.backward(batches[-1], **last)
    assert optimizer.metrics.gramian is not None
    return optimizer.metrics.gramian


def test_the_loss_scale_is_removed_from_both_parts() -> None:
    losses, twin = NoisyLosses(seed=6), NoisyLosses(seed=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = _window(losses.optimizer(), [losses.batch() for _ in range(3)], grad_scaler=scaler)
    plain = _window(twin.optimizer(), [twin.batch() for _ in range(3)])
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


def test_only_compared_parameters_count() -> None:
    losses, twin = NoisyLosses(seed=7), NoisyLosses(seed=7)
    optimizer = losses.optimizer(shared_params=losses.params[:1])
    found = gramian_of_step(optimizer, losses, 3, PATTERNS["all"])
    rows = [dict(zip(NAMES, twin.rows()[:, :2], strict=True)) for _ in range(3)]
    torch.testing.assert_close(found, pairs(rows), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_is_frozen_within_a_window() -> None:
    losses, twin = NoisyLosses(seed=8), NoisyLosses(seed=8)
    optimizer = losses.optimizer()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    rows = [twin.rows() for _ in range(3)]
    for number in range(3):
        losses.params[0].requires_grad_(number != 1)
        if number < 2:
            with optimizer.accumulate():
                optimizer.backward(losses.batch())
        else:
            optimizer.backward(losses.batch())
    rows[1][:, :2] = 0.0
    batches = [dict(zip(NAMES, row, strict=True)) for row in rows]
    torch.testing.assert_close(optimizer.metrics.gramian, pairs(batches), rtol=1e-12, atol=1e-12)


def test_equal_batches_give_the_plain_gramian() -> None:
    losses = NoisyLosses(noise=0.0)
    found = gramian_of_step(losses.optimizer(), losses, 2, PATTERNS["all"])
    torch.testing.assert_close(found, expected_gramian(2), rtol=1e-12, atol=1e-12)
    projecting = NoisyLosses(noise=0.0)
    optimizer = projecting.optimizer(PerLoss(unbiased=True))
    found = gramian_of_step(optimizer, projecting, 2, PATTERNS["all"])
    torch.testing.assert_close(found, expected_gramian(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
def test_every_graph_in_a_window_of_equal_batches(build) -> None:
    graph, window = build(), PerLoss(unbiased=True).window()
    expected = 2 * unhooked_jacobian(graph)
    window.add(graph.problem(retain_graph=True))
    assert_same(window.close(graph.problem()).gramian(), expected @ expected.T)


def test_linear_layers_are_multiplied_out_in_a_window() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 24, dtype=torch.float64)
    inputs = torch.randn(3, 2, 24, dtype=torch.float64)

    def batch(k: int) -> dict[str, Tensor]:
        output = layer(inputs[k])
        return {"a": output.sum(), "b": output.square().sum(), "c": output.sin().sum()}

    def row(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, [*layer.parameters()], retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    expected = pairs([{name: row(loss) for name, loss in batch(k).items()} for k in range(3)])
    optimizer = BalancedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), Recording())
    found = _window(optimizer, [batch(k) for k in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_order_of_the_losses_may_differ_between_micro_batches() -> None:
    weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    losses = NoisyLosses(seed=11)
    rows = [dict(zip(NAMES, losses.rows(), strict=True)) for _ in range(4)]
    orders = ["bd", "abcd", "dcba", "cadb"]  # "d" is another name for a
    for row in rows:
        row["d"] = row["a"]
    made = [
        Problem(tuple(order), [weight @ row[name] for name in order], [weight])
        for order, row in zip(orders, rows, strict=True)
    ]
    window = PerLoss(unbiased=True).window()
    for problem in made[:-1]:
        window.add(problem._replace(independent="a test"))
    found = window.close(made[-1]._replace(independent="a test")).gramian()
    batches = [{n: row[n] for n in order} for row, order in zip(rows, orders, strict=True)]
    names = ["bdac".index(name) for name in NAMES]
    torch.testing.assert_close(found[names][:, names], pairs(batches), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", [None, PerLoss(unbiased=True)])
@pytest.mark.parametrize("count", [2, 3])
def test_a_gradient_that_is_not_finite_is_reported_by_its_name(engine, count: int) -> None:
    for bad in range(2):
        losses = NoisyLosses(seed=12)
        optimizer = losses.optimizer(engine)
        for number in range(2):
            batch = losses.batch(NAMES[:count])
            if number == bad:
                batch = spoil_gradient(batch, math.inf)
            if number:
                with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
                    optimizer.backward(batch)
            else:
                with optimizer.accumulate():
                    optimizer.backward(batch)


# ---------------------------------------------------------------------- projection


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), decades=st.floats(-60, 60))
def test_the_projection_is_nearest_and_semidefinite(seed: int, count: int, decades: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, count, generator=generator, dtype=torch.float64)
    unit = (draw + draw.T) / 2
    scales = torch.randn(count, generator=generator, dtype=torch.float64).exp() * 10**decades
    estimate = unit * scales[:, None] * scales
    projected, removed = project_semidefinite(estimate, scales.square())
    relative = projected / scales[:, None] / scales
    values, vectors = torch.linalg.eigh(unit)
    expected = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    if float(values[-1]) < 1e-12:  # nothing is left
        torch.testing.assert_close(relative, torch.eye(count).double() * 2.0**-20)
        return
    torch.testing.assert_close(relative, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(projected, projected.T)
    assert float(removed) == pytest.approx(float((unit - expected).norm() / unit.norm()), abs=1e-9)


def test_the_projection_does_not_depend_on_the_units_of_the_losses() -> None:
    unit = torch.tensor([[1.0, 0.9, 0.2], [0.9, 0.1, 0.5], [0.2, 0.5, -0.1]]).double()
    scales = torch.tensor([1e-9, 1.0, 1e9]).double()
    one, removed = project_semidefinite(unit, torch.ones(3))
    other, same = project_semidefinite(unit * scales[:, None] * scales, scales.square())
    torch.testing.assert_close(other / scales[:, None] / scales, one, rtol=1e-12, atol=1e-12)
    assert float(same) == pytest.approx(float(removed), rel=1e-12)
    assert 0.0 < float(removed) < 1.0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_not_finite_stays_with_its_loss(count: int) -> None:
    estimate = torch.eye(count, dtype=torch.float64)
    estimate[-1, -1] = float("nan")
    projected, _ = project_semidefinite(estimate, torch.ones(count))
    assert projected.diagonal().isfinite().tolist() == [True] * (count - 1) + [False]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_gradient_in_the_noise_does_not_count_as_satisfied(count: int) -> None:
    """But a gradient of zero does."""
    estimate = -torch.eye(count, dtype=torch.float64)
    estimate[-1] = 0.0
    squares = torch.ones(count)
    squares[-1] = 0.0
    projected, _ = project_semidefinite(estimate, squares)
    expected = torch.eye(count).double() * 2.0**-20
    expected[-1] = 0.0
    assert torch.equal(projected, expected)


def test_nothing_measured_has_nothing_removed() -> None:
    for count in (1, 2, 3):
        zero = torch.zeros(count, count, dtype=torch.float64)
        projected, removed = project_semidefinite(zero, torch.zeros(count))
        assert projected.tolist() == zero.tolist()
        assert float(removed) == 0.0


def test_the_metrics_say_how_much_was_removed() -> None:
    losses = NoisyLosses(seed=9, noise=20.0)
    optimizer = losses.optimizer(PerLoss(unbiased=True))
    gramian = gramian_of_step(optimizer, losses, 2, PATTERNS["all"])
    removed = optimizer.log_dict()["moo/gramian/projected"]
    assert 0.0 < removed < 1.0
    assert removed == pytest.approx(float(optimizer.metrics.projected), rel=1e-6)
    assert float(torch.linalg.eigvalsh(gramian)[0]) >= -1e-9 * float(gramian.trace())
    plain = NoisyLosses()
    other = plain.optimizer(PerLoss())
    gramian_of_step(other, plain, 2, PATTERNS["all"])
    assert other.metrics.projected is None
    assert "moo/gramian/projected" not in other.log_dict()


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("count", [2, 3])
def test_two_losses_do_not_synchronize_and_more_read_the_gramian_once(count: int) -> None:
    weight = nn.Parameter(torch.zeros(4, device="meta"))
    engine = PerLoss(unbiased=True)
    with HostSyncs() as counted:
        window = engine.window()
        for _ in range(2):
            window.add(_problem(weight, count))
        window.close(_problem(weight, count)).gramian()
    assert len(counted.syncs) == (count > 2)


def _problem(weight: nn.Parameter, count: int) -> Problem:
    losses = [(weight * (k + 1)).sum() for k in range(count)]
    return Problem([f"loss {k}" for k in range(count)], losses, [weight])


def test_it_takes_the_memory_of_a_window() -> None:
    peaks = []
    for unbiased in (False, True):
        params = [nn.Parameter(torch.ones(2**14)) for _ in range(64)]  # small ones are copied
        engine, peak = PerLoss(unbiased=unbiased), PeakElements()
        with peak:
            window = engine.window()
            for _ in range(3):
                window.add(_many(params))
            window.close(_many(params)).gramian()
        peaks.append(peak.peak)
    assert peaks[1] < 1.15 * peaks[0]


def _many(params: Sequence[nn.Parameter]) -> Problem:
    losses = [sum((p * (k + 1)).sum() for p in params) for k in range(3)]
    return Problem(NAMES, losses, params)


def test_a_step_between_two_refreshes_takes_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    once = BatchProducts.plus
    monkeypatch.setattr(BatchProducts, "plus", lambda *args: taken.append(1) or once(*args))
    losses = NoisyLosses()
    sgd = torch.optim.SGD(losses.params, lr=0.0)
    optimizer = BalancedOptimizer(sgd, MGDA(every=2), engine=PerLoss(unbiased=True))
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(losses.batch())
        optimizer.backward(losses.batch())
        optimizer.step()
        assert len(taken) == 2 * (1 + step // 2)
        assert (optimizer.metrics.projected is None) == (step % 2 == 1)
    optimizer.zero_grad()
    other = BalancedOptimizer(sgd, SumLog(), engine=PerLoss(unbiased=True))
    positive = [{"a": losses.batch()["a"].exp(), "b": losses.batch()["b"].exp()} for _ in range(3)]
    with other.accumulate():
        other.backward(positive[0])
    other.backward(positive[1])
    other.zero_grad()
    other.backward(positive[2])
    assert len(taken) == 4


# ---------------------------------------------------------------------- refusals


def test_one_batch_is_refused() -> None:
    losses = NoisyLosses()
    for optimizer, what in (
        (losses.optimizer(), "Recording"),
        (losses.optimizer(PerLoss(unbiased=True)), r"PerLoss\(unbiased=True\)"),
    ):
        refused = partial(
            pytest.raises, BalanceError, match=rf"{what} .*two independent.*accumulate"
        )
        with refused():
            optimizer.backward(losses.batch())
        with refused():
            optimizer.combined_loss(losses.batch())


def test_a_loss_in_one_micro_batch_is_refused_by_name() -> None:
    losses = NoisyLosses()
    with pytest.raises(BalanceError, match="Found `c` in one micro-batch of 3"):
        gramian_of_step(losses.optimizer(), losses, 3, lambda number: ("ab", "abc", "ab")[number])


def test_features_and_streaming_are_refused() -> None:
    losses = NoisyLosses()
    weight = losses.params[0]
    for engine in (None, PerLoss(unbiased=True)):
        features = weight * 2.0
        batch = {name: features.sum() * (k + 1) for k, name in enumerate(NAMES)}
        with pytest.raises(BalanceError, match="`features` should be left out"):
            losses.optimizer(engine).backward(batch, features=features)
    with pytest.raises(BalanceValueError, match="`engine` should be `PerLoss"):
        BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Recording(), engine=Streaming())


def test_means_are_as_far_from_zero_as_the_tests_assume() -> None:
    assert float(MEANS.norm(dim=1).min()) > 1.0
