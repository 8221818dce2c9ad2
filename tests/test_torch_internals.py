"""Without a private name of PyTorch the plain path is taken."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from moo_balance import FAMO, BalancedOptimizer, NonFiniteError, Sum
from moo_balance._nonfinite import all_finite
from moo_balance._reevaluation.writes import _hide_from_compilers, version_of, weak_reference
from moo_balance._torch_internals import (
    broadcasts_buffers,
    entries_of,
    hooks_of,
    request_buffer_broadcast,
    scaler_device,
    scaler_stage,
)


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


def scaled_step() -> list[float]:
    """The weights after a step under a scaler, with its checks of the order of calls."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Sum())
    scaler = GradScaler("cpu", init_scale=1024.0)
    optimizer.backward({"a": weight.sum(), "b": 2 * weight[0]}, grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    return weight.tolist()


def hooked_step() -> list[object]:
    """What step hooks of the wrapper and of the wrapped optimizer see, and the checkpoint's."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), Sum())
    calls = list[object]()
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("step", len(args))))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("state_dict"))
    optimizer.backward({"a": weight.sum()})
    optimizer.step()
    optimizer.state_dict()
    return [*calls, *weight.tolist()]


class Counting(nn.Module):
    """With batch norm, and a parameter that the forward pass writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        outputs = self.layers(inputs)
        return {"a": outputs.square().mean(), "b": outputs.abs().mean()}


def reevaluated_steps() -> dict[str, list[float]]:
    """The model after steps whose losses are evaluated again."""
    torch.manual_seed(0)
    model = Counting()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FAMO(shift=1.0))
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    for _ in range(6):
        optimizer.step(partial(model, inputs))
    return {name: value.tolist() for name, value in model.state_dict().items()}


class Hidden:
    """A scaler or module seen through a PyTorch that does not have some names."""

    def __init__(self, inner: object, hidden: str) -> None:
        self._inner, self._hidden = inner, hidden

    def __getattr__(self, name: str) -> object:
        if name == self._hidden:
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("name", ["_per_optimizer_states", "_device"])
def test_a_step_under_a_scaler_without_a_private_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scaled_step()
    for function in (scaler_stage, scaler_device):
        monkeypatch.setattr(
            f"moo_balance._grad_scaler.{function.__name__}",
            lambda scaler, *rest, function=function: function(Hidden(scaler, name), *rest),
        )
    assert scaled_step() == expected == pytest.approx([0.7, 0.9])


def test_what_is_said_of_a_scaler_without_private_names() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scaler = GradScaler("cpu")
    assert scaler_stage(scaler, optimizer) is None
    without_states: GradScaler = Hidden(scaler, "_per_optimizer_states")  # type: ignore[assignment]
    without_device: GradScaler = Hidden(scaler, "_device")  # type: ignore[assignment]
    assert scaler_stage(without_states, optimizer) == "UNKNOWN"
    assert scaler_device(without_device) is None


@pytest.mark.parametrize("kind", ["step_post", "state_dict_pre"])
def test_hooks_that_are_kept_under_another_name_do_not_run(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_hooks = hooked_step()

    def hooks_of_another_pytorch(optimizer: torch.optim.Optimizer, asked: str) -> object:
        return {} if asked == kind else hooks_of(optimizer, asked)

    monkeypatch.setattr("moo_balance._wrapper.hooks_of", hooks_of_another_pytorch)
    without = hooked_step()
    assert with_hooks[-2:] == without[-2:] == pytest.approx([0.9, 0.9])
    assert with_hooks[:-2] == [("step", 1), "state_dict"]
    assert len(without) == len(with_hooks) - 1


def test_hooks_that_an_optimizer_does_not_have() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert hooks_of(optimizer, "of_another_pytorch") == {}


def test_entries_of_a_sparse_gradient_without_their_private_accessor() -> None:
    values = torch.tensor([1.0, 2.0, math.inf])
    with torch.sparse.check_sparse_tensor_invariants(True):
        gradient = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1]]), values, (3,))
    assert entries_of(gradient).tolist() == [1.0, 2.0, math.inf]
    hidden = Hidden(gradient, "_values")
    assert entries_of(hidden).tolist() == [1.0, math.inf]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"_push_mode": None},
        {"_revive_storage": None},
        {"_BETWEEN": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_losses_are_evaluated_again_without_a_private_name(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reevaluated_steps()
    for name, value in change.items():
        monkeypatch.setattr(f"moo_balance._reevaluation.writes.{name}", value)
    assert reevaluated_steps() == expected
    assert expected["calls"] == expected["layers.1.num_batches_tracked"] == 6


def test_a_tensor_without_a_version() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(1)
    assert version_of(tensor) == 0
    assert version_of(Hidden(tensor, "_version")) == 0  # type: ignore[arg-type]


def test_a_storage_is_kept_where_there_are_no_weak_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weak = weak_reference(torch.zeros(3).untyped_storage())
    assert weak() is None
    monkeypatch.setattr("moo_balance._reevaluation.writes._revive_storage", None)
    kept = weak_reference(torch.zeros(3).untyped_storage())()
    assert kept is not None
    assert kept.nbytes() == 12


def test_a_function_is_hidden_from_compilers_without_private_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._dynamo", None)

    def negate(number: int) -> int:
        return -number

    assert _hide_from_compilers(negate)(1) == -1


def test_a_module_without_the_flag_of_data_parallelism() -> None:
    module = nn.Linear(1, 1)
    assert not broadcasts_buffers(module)
    request_buffer_broadcast(module)
    assert broadcasts_buffers(module)
