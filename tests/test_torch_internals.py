"""Without a private name of PyTorch the plain path is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from moo_balance import BalancedOptimizer, NonFiniteError, Sum
from moo_balance._nonfinite import all_finite
from moo_balance._torch_internals import hooks_of, scaler_device, scaler_stage


@pytest.fixture(params=[True, False], ids=["with the name", "without the name"])
def _scaler_check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr("moo_balance._nonfinite.find_nonfinite", None)


@pytest.mark.usefixtures("_scaler_check")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_among_several_tensors(value: float) -> None:
    tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(2).bfloat16()]
    assert all_finite(tensors)
    for tensor in tensors:
        spoiled = tensor.clone()
        spoiled.view(-1)[1] = value
        assert not all_finite([*tensors, spoiled])


@pytest.mark.usefixtures("_scaler_check")
def test_finite_entries_whose_sum_overflows() -> None:
    assert all_finite([torch.full((4,), 3e38), torch.full((4,), 60000.0).half()])


@pytest.mark.usefixtures("_scaler_check")
def test_complex_and_expanded_gradients_are_read_one_by_one() -> None:
    assert all_finite([torch.ones(2, dtype=torch.complex64), torch.ones(1).expand(3)])
    assert not all_finite([torch.full((1,), math.nan).expand(3)])
    assert not all_finite([torch.tensor([1.0 + 1j, complex(0.0, math.inf)])])


@pytest.mark.usefixtures("_scaler_check")
def test_a_nan_gradient_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Sum())
    optimizer.backward({"a": weight.sum(), "b": weight[0]})
    assert weight.grad is not None
    weight.grad[0] = math.nan
    with pytest.raises(NonFiniteError, match="gradient of `a` or `b`"):
        optimizer.step()


class ScalerWithoutStates:
    """A scaler of a PyTorch that keeps its states elsewhere."""


def test_a_scaler_that_does_not_tell_its_stage() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scaler: GradScaler = ScalerWithoutStates()  # type: ignore[assignment]
    assert scaler_stage(scaler, optimizer) == "UNKNOWN"
    assert scaler_device(scaler) == "cpu"


def test_a_step_under_a_scaler_that_does_not_tell_its_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checks of the order of calls pass, and the step is that of a scaler that tells."""
    steps = []
    for tells in (True, False):
        weight = nn.Parameter(torch.ones(2))
        optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Sum())
        scaler = GradScaler("cpu", init_scale=1024.0)
        if not tells:
            monkeypatch.setattr(
                "moo_balance._grad_scaler.scaler_stage", lambda scaler, optimizer: "UNKNOWN"
            )
        optimizer.backward({"a": weight.sum(), "b": 2 * weight[0]}, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        steps.append(weight.detach().clone())
    assert steps[0].tolist() == steps[1].tolist() == pytest.approx([0.7, 0.9])


def test_hooks_that_are_kept_elsewhere() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert hooks_of(optimizer, "step_pre") == {}
    assert hooks_of(optimizer, "of_another_pytorch") == {}
