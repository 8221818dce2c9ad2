"""Gradients so long or short that their squared norms leave the range of float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from moo_balance import MGDA, AnalyticQP, BalancedOptimizer, NonFiniteError, SumLog
from moo_balance.engine import Engine, PerLoss
from moo_balance.engine.products import is_all_zero, narrow, products_in_range
from tests.support.engine_graphs import Graph, drawn, gradient, naive_jacobian, parameter
from tests.support.engines import over_engines, over_engines_and_dtypes
from tests.support.lengths import (
    SCALES,
    Build,
    assert_close,
    factored,
    over_builds,
    over_scales,
    scale_losses,
    small,
    sparse,
)


@over_engines
@over_builds
@over_scales
def test_no_gradient_is_lost(engine: Engine, build: Build, scales: Sequence[float]) -> None:
    jacobian = naive_jacobian(build(scales))
    found = engine.linearize(build(scales).problem()).gramian()
    assert_close(found, jacobian)


@over_engines_and_dtypes
@over_builds
@pytest.mark.parametrize("factor", [2.0**16, 2.0**80], ids=["usual", "large"])
def test_no_gradient_is_lost_to_a_loss_scale(
    engine: Engine, dtype: torch.dtype, build: Build, factor: float
) -> None:
    """The Gramian has the scale twice on its way, and none in the end."""
    scales = (1.0, 1e16, 1e-3) if factor < 2.0**20 else (1.0, 1e-3, 1e-6)
    jacobian = naive_jacobian(build(scales))
    problem = build(scales).problem(scale=torch.tensor(factor))
    found = engine.linearize(problem).gramian()
    assert_close(found, jacobian)
    assert found.dtype == dtype


@over_builds
def test_at_features_no_gradient_is_lost(build: Build) -> None:
    for scales in SCALES.values():
        weight = parameter(4, 3, dtype=torch.float32)
        features = torch.tanh(drawn(5, 4, seed=2).float() @ weight)
        built = scale_losses(features, scales, [weight])
        rows = [torch.autograd.grad(x, features, retain_graph=True)[0] for x in built.losses]
        jacobian = torch.stack([row.double().reshape(-1) for row in rows])
        assert_close(PerLoss().linearize(built.problem(features=[features])).gramian(), jacobian)


@over_engines
def test_a_gradient_of_zero_takes_no_other_precision(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    once = products_in_range

    def record(products: Callable[[torch.dtype], Tensor], *arguments: object) -> Tensor:
        def recorded(dtype: torch.dtype) -> Tensor:
            asked.append(dtype)
            return products(dtype)

        return once(recorded, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("moo_balance.engine.linear.products_in_range", record)
    for build in (small, factored, sparse):
        gramian = engine.linearize(build((0.0, 1.0, 2.0)).problem()).gramian()
        assert gramian[0].tolist() == [0.0] * 3
    assert len(set(asked)) == 1


@over_engines
def test_a_gradient_that_is_not_finite_stays_so(engine: Engine) -> None:
    for value in (float("inf"), float("nan")):
        gramian = engine.linearize(small((1.0, value, 1.0)).problem()).gramian()
        assert gramian.diagonal().isfinite().tolist() == [True, False, True]


# ---------------------------------------------------------------------- the pieces


def test_a_gramian_stays_wide_only_if_it_has_to() -> None:
    fits = torch.diag(torch.tensor([1e38, 1e-30, 0.0], dtype=torch.float64))
    assert narrow(fits, torch.float32).dtype == torch.float32
    for square in (1e39, 1e-33):
        gramian = torch.diag(torch.tensor([1.0, square], dtype=torch.float64))
        assert narrow(gramian, torch.float32) is gramian


def test_only_the_cpu_is_read() -> None:
    def products(dtype: torch.dtype) -> Tensor:
        assert dtype == torch.float32
        return torch.zeros(2, 2, dtype=dtype, device="meta")

    assert products_in_range(products, torch.float32).device.type == "meta"


def test_without_a_way_to_tell_a_zero_counts_as_an_underflow() -> None:
    found = products_in_range(lambda dtype: torch.full((1, 1), 1e-60, dtype=dtype), torch.float32)
    assert found.tolist() == [[1e-60]]


def test_zero_gradients_are_told_from_others() -> None:
    assert is_all_zero(torch.zeros(3))
    assert is_all_zero(torch.zeros(0, 3))
    assert is_all_zero(torch.zeros(3, dtype=torch.complex64))
    assert not is_all_zero(torch.tensor([0.0, float("nan")]))
    indices = torch.tensor([[1, 1]])
    assert is_all_zero(
        torch.sparse_coo_tensor(indices, torch.tensor([1.0, -1.0]), (3,), check_invariants=True)
    )
    assert not is_all_zero(
        torch.sparse_coo_tensor(indices, torch.ones(2), (3,), check_invariants=True)
    )


# ---------------------------------------------------------------------- through the optimizer


@pytest.mark.parametrize("scale", [1e22, 1e-22, 1e-30])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_do_not_depend_on_a_common_scale(scale: float, count: int) -> None:
    weights = []
    for factor in (1.0, scale):
        built = small([factor] * 3)
        sgd = torch.optim.SGD(built.params, lr=0.1)
        optimizer = BalancedOptimizer(sgd, MGDA())
        optimizer.backward({f"loss {k}": built.losses[k] for k in range(count)})
        weights.append([float(w) for w in optimizer.metrics.weights.values()])
        optimizer.step()
    assert weights[0] == pytest.approx(weights[1], rel=1e-4, abs=1e-5)
    assert min(weights[0]) != pytest.approx(max(weights[0]))


def test_only_what_is_not_finite_is_called_so() -> None:
    built = small((1e22, 1.0, float("inf")))
    optimizer = BalancedOptimizer(torch.optim.SGD(built.params, lr=0.1), MGDA())
    losses = dict(zip("abc", built.losses, strict=True))
    with pytest.raises(NonFiniteError, match="`c`"):
        optimizer.backward(losses)
    assert all(param.grad is None for param in built.params)
    optimizer.backward({"a": losses["a"], "b": losses["b"]})
    assert gradient(Graph([], built.params)).isfinite().all()


def test_no_gradient_is_lost_in_a_window() -> None:
    scales = (1e22, 1e-25, 1.0)
    jacobian = naive_jacobian(small(scales))
    built = small(scales)
    optimizer = BalancedOptimizer(torch.optim.SGD(built.params, lr=0.1), MGDA())
    losses = {f"loss {k}": loss for k, loss in enumerate(built.losses)}
    with optimizer.accumulate():
        optimizer.backward(losses, retain_graph=True)
    optimizer.backward(losses)
    assert optimizer.metrics.gramian is not None
    assert_close(optimizer.metrics.gramian, 2 * jacobian)


def test_tiny_losses_write_no_nan() -> None:
    for method in (MGDA(normalize="log"), MGDA(normalize="loss"), AnalyticQP(shift=0.0), SumLog()):
        weight = nn.Parameter(drawn(3))
        optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.0), method)
        optimizer.backward({"a": 1e-315 * weight.exp().sum(), "b": weight.square().sum()})
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        optimizer.step()
