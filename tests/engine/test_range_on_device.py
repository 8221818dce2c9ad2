"""Gradients of any length on an accelerator, where the host does not see what leaves a range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.speed.counts import HostSyncs
from moo_balance.engine import Engine, PerLoss, jacobian, products
from moo_balance.engine.products import products_in_range, scaled_products, vector_products
from tests.support.engine_graphs import drawn, naive_jacobian, parameter
from tests.support.engines import over_engines
from tests.support.lengths import (
    SCALES,
    Build,
    assert_close,
    over_builds,
    scale_losses,
    small,
)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply as on an accelerator, where the host does not see what leaves a range."""
    for module in (products, jacobian):
        monkeypatch.setattr(module, "READABLE", ())


@pytest.mark.usefixtures("unreadable")
@over_engines
@over_builds
def test_no_gradient_is_lost(engine: Engine, build: Build) -> None:
    for scales in SCALES.values():
        exact = naive_jacobian(build(scales))
        assert_close(engine.linearize(build(scales).problem()).gramian(), exact)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
@over_builds
def test_a_loss_scale_loses_nothing(build: Build, factor: float) -> None:
    exact = naive_jacobian(build((1.0, 1e16, 1e-16)))
    problem = build((1.0, 1e16, 1e-16)).problem(scale=torch.tensor(factor))
    assert_close(PerLoss().linearize(problem).gramian(), exact)


@pytest.mark.usefixtures("unreadable")
def test_features_and_windows_lose_nothing() -> None:
    for scales in SCALES.values():
        weight = parameter(4, 3, dtype=torch.float32)
        features = torch.tanh(drawn(5, 4, seed=2).float() @ weight)
        built = scale_losses(features, scales, [weight])
        rows = [torch.autograd.grad(x, features, retain_graph=True)[0] for x in built.losses]
        exact = torch.stack([row.double().reshape(-1) for row in rows])
        assert_close(PerLoss().linearize(built.problem(features=[features])).gramian(), exact)
        for unbiased in (False, True):
            window, graph = PerLoss(unbiased=unbiased).window(), small(scales)
            window.add(graph.problem(retain_graph=True))
            found = window.close(graph.problem()).gramian()
            assert_close(found, 2 * naive_jacobian(small(scales)))


@pytest.mark.usefixtures("unreadable")
def test_products_are_taken_once_and_in_float64() -> None:
    asked: list[torch.dtype] = []

    def take(dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return vector_products(drawn(2, 3).float().unbind())

    assert products_in_range(take, torch.float32).dtype == torch.float64
    assert asked == [torch.float32]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -3, 0, 60, 100, 120])
def test_scaled_products_are_those_of_float64(count: int, exponent: int) -> None:
    """Exact where the entries are whole numbers: powers of two take no digit."""
    whole = torch.randint(-15, 16, (count, 9), generator=torch.Generator().manual_seed(0))
    whole[:, 0] = 15
    vectors = (whole.double() * 2.0**exponent).float()
    vectors[-1] *= 2.0  # each has a factor of its own
    found = scaled_products(vectors.unbind())
    assert found.dtype == torch.float64
    assert torch.equal(found, vectors.double() @ vectors.double().T)


def test_scaled_products_of_what_has_no_largest_entry() -> None:
    zero, empty = torch.zeros(2, 3), torch.zeros(2, 0)
    for matrix in (zero, empty):
        found = scaled_products(matrix.unbind())
        assert found.dtype == torch.float64
        assert found.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    for value in (float("inf"), float("nan")):
        spoiled = torch.tensor([[1.0, 2.0], [value, 1.0]])
        found = scaled_products(spoiled.unbind())
        assert found.diagonal().isfinite().tolist() == [True, False]
    mixed = torch.tensor([[1e38, -3e38], [1e-45, 1e-44]])
    found = scaled_products(mixed.unbind())
    torch.testing.assert_close(found, mixed.double() @ mixed.double().T, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("count", [2, 12])
def test_products_on_a_device_are_not_read(count: int) -> None:
    vectors = torch.ones(count, 4, device="meta").unbind()
    with HostSyncs() as counted:
        assert vector_products(vectors).dtype == torch.float64
    assert counted.syncs == []
