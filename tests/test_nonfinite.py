"""Losses and gradients that are not finite, or losses below their bound, never reach the balance.

On the CPU they are reported at once. On a device, where reading them would synchronize, the step
is masked, and reported when the metrics are read.
"""

from __future__ import annotations

import math

import pytest
import torch

from moo_balance import MGDA, BalancedOptimizer, NonFiniteError, Sum
from moo_balance.engine import Streaming
from moo_balance.weighting import GramianWeighting
from tests.support.internals import treat_cpu_as_device
from tests.support.problems import (
    SmallModel,
    as_vector,
    change_value,
    flat_gradient,
    gradients,
    setup,
    sgd,
    snapshot,
    spoil_gradient,
    train,
    whole_state,
)
from tests.support.registry import KINDS, NAMES, over, over_each_method, over_kinds, over_some

pytestmark = pytest.mark.capability("gradients that are not finite are refused or skipped")

over_bounded = over(lambda method: method in KINDS and max(method.bounds(NAMES)) > -math.inf)


def one_step(optimizer, losses):
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()


def balance_of(optimizer):
    return optimizer.state_dict()["balance"]


def learned(optimizer):
    """The state of the method, without the counters of steps."""
    balance = balance_of(optimizer)
    return snapshot({key: balance[key] for key in ("names", "state")})


# ---------------------------------------------------------------------- losses, on the CPU


@over_kinds
def test_nonfinite_losses_are_skipped_and_counted_and_change_nothing_else(method):
    model, optimizer = setup(method, nonfinite="skip")
    twin, other = setup(method, nonfinite="skip")
    for step, value in enumerate((math.nan, math.inf, -math.inf)):
        train(model, optimizer, [step])
        train(twin, other, [step])
        before = whole_state(model, optimizer)
        one_step(optimizer, change_value(model.losses(step), value))
        before["optimizer"]["balance"]["skipped"] += 1
        assert whole_state(model, optimizer) == before
    assert optimizer.log_dict()["moo/skipped"] == 3.0
    end, expected = whole_state(model, optimizer), whole_state(twin, other)
    assert end["optimizer"]["balance"].pop("skipped") == 3
    assert expected["optimizer"]["balance"].pop("skipped") == 0
    assert end == expected


def test_the_message_names_each_loss_that_is_not_finite():
    model, optimizer = setup_sgd(MGDA())
    losses = {name: loss * math.nan for name, loss in model.losses().items()}
    with pytest.raises(NonFiniteError, match=r"Loss `a`.*Found nan \(and in `b`, `c`\)\. Skip"):
        optimizer.backward(losses)


@over_kinds
def test_nonfinite_losses_of_a_closure_or_a_combined_loss_are_skipped(method):
    model, optimizer = setup(method, nonfinite="skip")
    train(model, optimizer, [0])
    before = snapshot(model.state_dict())
    losses = optimizer.step(lambda: change_value(model.losses(1), math.nan))
    assert math.isnan(losses["b"].item())
    optimizer.combined_loss(change_value(model.losses(1), math.nan)).backward()
    optimizer.step()
    assert snapshot(model.state_dict()) == before
    assert balance_of(optimizer)["skipped"] == 2
    train(model, optimizer, [1])


@over_bounded
def test_a_loss_below_its_bound_is_refused_even_if_steps_may_be_skipped(method):
    """It is not an accident of one batch: the method does not fit the loss."""
    model, optimizer = setup(method, nonfinite="skip")
    with pytest.raises(ValueError, match="`b` should be at least"):
        optimizer.backward(change_value(model.losses(), -9.0))


@over_some("FAMO-adam")
def test_nonfinite_observed_losses_are_refused_and_block_nothing(method):
    """The step is taken and the losses are what they are: no use to wait for better ones."""
    model, optimizer = setup(method)
    optimizer.backward(model.losses())
    optimizer.step()
    before = balance_of(optimizer)
    assert before["awaiting"] == list(NAMES)
    with pytest.raises(NonFiniteError, match=r"`b` should be finite. Found nan"):
        optimizer.observe({**model.losses(), "b": torch.tensor(math.nan)})
    assert snapshot(balance_of(optimizer)) == snapshot({**before, "awaiting": None})
    train(model, optimizer, range(1, 3))


@over_some("FAMO-adam")
def test_nonfinite_observed_losses_are_skipped_on_request(method):
    model, optimizer = setup(method, nonfinite="skip")
    optimizer.backward(model.losses())
    optimizer.step()
    before = learned(optimizer)
    optimizer.observe({**model.losses(), "b": torch.tensor(math.nan)})
    assert learned(optimizer) == before
    train(model, optimizer, [1])


# ---------------------------------------------------------------------- gradients, on the CPU


def check_refused(method, value):
    model, optimizer = setup(method)
    twin, other = setup(method)
    train(model, optimizer, range(1))
    before = whole_state(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"gradient of .*`b`.* should be finite"):
        one_step(optimizer, lambda: spoil_gradient(model.losses(1), value))
    assert whole_state(model, optimizer) == before
    train(model, optimizer, [2])
    train(twin, other, [0, 2])
    assert whole_state(model, optimizer) == whole_state(twin, other)


@over_each_method
def test_a_nan_gradient_is_refused_before_the_step(method):
    check_refused(method, math.nan)


@over_kinds
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_gradient_is_refused_before_the_step(method, value):
    check_refused(method, value)


@over_kinds
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_is_skipped_on_request(method, value):
    model, optimizer = setup(method, nonfinite="skip")
    before = whole_state(model, optimizer)
    one_step(optimizer, lambda: spoil_gradient(model.losses(), value))
    after = whole_state(model, optimizer)
    assert after["model"] == before["model"]
    assert after["optimizer"]["state"] == before["optimizer"]["state"]
    assert after["optimizer"]["balance"] == {**before["optimizer"]["balance"], "skipped": 1}
    train(model, optimizer, range(1, 3))
    assert optimizer.log_dict()["moo/skipped"] == 1.0


@over_some("AnalyticQP", "MGDA-none")
def test_a_nonfinite_gram_matrix_is_refused_before_gradients_are_written(method):
    model, optimizer = setup(method)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    before = whole_state(model, optimizer)
    losses = model.losses(1)
    losses["b"] = losses["b"] + (model.trunk.weight[0, 0] * 0).sqrt()  # 0, of infinite slope
    with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
        optimizer.backward(losses)
    assert whole_state(model, optimizer) == before
    assert all(grad is None for grad in gradients(model))


@over(lambda method: method in KINDS and not method.gramian)
def test_a_gradient_that_was_repaired_before_the_step_is_taken(method):
    model, optimizer = setup(method)
    optimizer.zero_grad()
    optimizer.backward(lambda: spoil_gradient(model.losses(), math.nan))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_()
    optimizer.step()
    assert balance_of(optimizer)["steps"] == 1


@over_kinds
def test_a_nonfinite_gradient_of_a_combined_loss_is_refused(method):
    model, optimizer = setup(method)
    before = whole_state(model, optimizer)

    def step():
        optimizer.combined_loss(spoil_gradient(model.losses(), math.nan)).backward()
        optimizer.step()

    with pytest.raises(NonFiniteError, match=r"gradient of .*`b`"):
        step()
    assert whole_state(model, optimizer) == before


def setup_sgd(weighting, **options):
    model = SmallModel()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, BalancedOptimizer(base, weighting, **options)


def add_by_backward(parameter):
    (parameter.sum() * math.nan).backward()


def replace(parameter):
    parameter.grad = parameter.grad * math.nan


def write(parameter):
    parameter.grad[0] = math.nan


def write_unseen_by_autograd(parameter):
    parameter.grad.data[0] = math.nan


def write_through_numpy(parameter):
    parameter.grad.numpy()[0] = math.nan


@pytest.mark.parametrize(
    "spoil", [add_by_backward, replace, write, write_unseen_by_autograd, write_through_numpy]
)
def test_a_gradient_spoiled_after_a_finite_gramian_is_refused(spoil):
    model, optimizer = setup_sgd(MGDA())
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    spoil(model.heads[2].bias)
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_a_nonfinite_gradient_from_before_backward_is_refused():
    model, optimizer = setup_sgd(MGDA())
    model.heads[2].bias.grad = torch.full_like(model.heads[2].bias, math.nan)
    optimizer.backward(model.losses())
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_a_gradient_that_a_hook_spoils_after_accumulation_is_refused():
    model, optimizer = setup_sgd(MGDA(), engine=Streaming())
    model.heads[2].bias.register_post_accumulate_grad_hook(write)
    with pytest.raises(NonFiniteError):
        one_step(optimizer, model.losses())


def test_a_nonfinite_gradient_outside_of_the_shared_parameters_is_refused():
    """A Gramian over some parameters does not contain the others."""
    model, optimizer = setup_sgd(MGDA())
    optimizer = BalancedOptimizer(optimizer.optimizer, MGDA(), shared_params=model.trunk)
    optimizer.backward(model.losses())
    model.heads[2].bias.grad.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        optimizer.step()


class PowerOfLength(GramianWeighting):
    """Multiplies each gradient by a power of its length."""

    def __init__(self, power):
        self.power = power

    def solve(self, statistics, gramian, state):
        return {"weights": gramian.diagonal() ** (self.power / 2)}

    def coefficients(self, statistics, state):
        return state["weights"]


def test_infinite_coefficients_are_refused():
    """The method divides by a power of a length whose inverse overflows."""
    model, optimizer = setup_sgd(PowerOfLength(-9))
    losses = model.losses()
    with pytest.raises(NonFiniteError):
        one_step(optimizer, {**losses, "b": losses["b"] * 1e-36})


def test_finite_gradients_whose_sum_overflows_are_refused():
    weight = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), PowerOfLength(0))
    slope = torch.tensor([4e4, 0.0, 0.0], dtype=torch.float16)
    with pytest.raises(NonFiniteError):
        one_step(optimizer, {"a": weight @ slope, "b": weight @ slope})


def test_gradients_may_be_made_in_inference_mode():
    model, optimizer = setup_sgd(MGDA())
    optimizer.backward(model.losses())
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.grad = 0.5 * parameter.grad
    optimizer.step()
    assert balance_of(optimizer)["steps"] == 1


# ---------------------------------------------------------------------- large is not infinite


def step_with(parameter, gradient):
    """A step whose gradient is replaced by this one."""
    optimizer = BalancedOptimizer(torch.optim.SGD([parameter], lr=0.0), Sum())
    optimizer.backward({"a": parameter.abs().sum()})
    parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_the_largest_gradients_of_a_dtype_are_finite(dtype):
    gradient = torch.full((5,), torch.finfo(dtype).max, dtype=dtype)
    parameter = torch.ones(5, dtype=dtype, requires_grad=True)
    step_with(parameter, gradient)
    for bad in (math.nan, math.inf):
        gradient[3] = bad
        with pytest.raises(NonFiniteError):
            step_with(parameter, gradient)


def test_a_parameter_without_elements_is_finite():
    step_with(torch.ones(0, requires_grad=True), torch.ones(0))


def test_infinities_that_cancel_are_refused():
    with pytest.raises(NonFiniteError):
        step_with(torch.ones(2, requires_grad=True), torch.tensor([math.inf, -math.inf]))


def test_gradients_whose_entries_share_memory_are_read():
    step_with(torch.ones(4, requires_grad=True), torch.ones(1).expand(4))
    with pytest.raises(NonFiniteError):
        step_with(torch.ones(4, requires_grad=True), torch.full((1,), math.nan).expand(4))


def test_only_the_values_of_a_sparse_gradient_are_read():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = BalancedOptimizer(torch.optim.SGD(table.parameters(), lr=0.0), Sum())
    for factor in (1.0, math.nan):
        optimizer.zero_grad()
        loss = table(torch.tensor([0, 0, 2])).sum()
        optimizer.backward(spoil_gradient({"b": loss}, factor))
        assert table.weight.grad.is_sparse
        if factor == 1.0:
            optimizer.step()
    with pytest.raises(NonFiniteError):
        optimizer.step()


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=1.0)])
def test_a_gramian_whose_trace_overflows_is_no_reason_to_refuse(scaler):
    """Each squared length is finite in float32, their sum is not."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=1e-20), MGDA())
    slopes = torch.diag(torch.tensor([1.7e19, 1.7e19, 1.0]))
    losses = {name: weight @ slope for name, slope in zip(NAMES, slopes, strict=True)}
    optimizer.backward(losses, grad_scaler=scaler)
    assert math.isinf(optimizer.metrics.gramian.trace().item())
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    assert balance_of(optimizer)["steps"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_nonfinite_gradient_is_named_where_another_only_makes_the_trace_overflow(value):
    weight = torch.ones(3, requires_grad=True)
    optimizer = BalancedOptimizer(torch.optim.SGD([weight], lr=0.1), MGDA())
    losses = {"a": weight[0], "b": weight[1], "c": 1.7e19 * weight[2]}
    with pytest.raises(NonFiniteError, match="gradient of loss `b`"):
        optimizer.backward(spoil_gradient(losses, value))


@over_kinds
def test_a_closure_after_one_with_a_nan_gradient_is_accepted(method):
    """Such a loop never calls `zero_grad`, so nothing may stay of the step that was refused."""
    model, optimizer = setup(method)
    with pytest.raises(NonFiniteError):
        optimizer.step(lambda: spoil_gradient(model.losses(), math.nan))
    optimizer.step(model.losses)


# ---------------------------------------------------------------------- many in a row


def spoiled_parameters(**arguments):
    """A model that only has NaN left to give."""
    model, optimizer = setup_sgd(Sum(), nonfinite="skip", **arguments)
    with torch.no_grad():
        model.trunk.weight.fill_(math.nan)
    return model, optimizer


def test_the_tenth_skipped_step_in_a_row_warns_and_the_last_allowed_one_raises_no_error():
    model, optimizer = spoiled_parameters(max_skips=12)
    for step in range(9):
        one_step(optimizer, model.losses(step))
    message = "10 steps in a row were skipped, the last because loss `a` was nan. If a parameter"
    with pytest.warns(UserWarning, match=message):
        one_step(optimizer, model.losses(9))
    for step in (10, 11):
        one_step(optimizer, model.losses(step))
    message = "13 steps .* more than `max_skips=12`, the last because loss `a` was nan.*checkpoint"
    with pytest.raises(NonFiniteError, match=message):
        one_step(optimizer, model.losses(12))
    assert optimizer.log_dict()["moo/skipped"] == 13


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(change_value, "loss `b` was inf"), (spoil_gradient, "a gradient was not finite")],
)
@over_some("Sum", "FAMO-lagged", "MGDA-none")
def test_skips_are_explained_by_the_loss_or_the_gradient(method, spoil, reason):
    model, optimizer = setup(method, nonfinite="skip", max_skips=0)
    with pytest.raises(NonFiniteError, match=reason):
        one_step(optimizer, spoil(model.losses(), math.inf))


@over_kinds
def test_metrics_of_a_skipped_step_are_its_own(method):
    model, optimizer = setup(method, nonfinite="skip")
    for _ in range(2):  # skipped as the first step, and after one that was taken
        skipped = change_value(model.losses(1), math.nan)
        one_step(optimizer, skipped)
        figures = optimizer.log_dict(prefix="")
        assert set(figures) == {"loss/a", "loss/b", "loss/c", "skipped"}
        assert figures["loss/a"] == pytest.approx(skipped["a"].item())
        assert math.isnan(figures["loss/b"])
        train(model, optimizer, [0])
        assert math.isfinite(optimizer.log_dict(prefix="")["loss/b"])


@pytest.mark.parametrize("spoil", [change_value, spoil_gradient])
def test_a_step_that_is_taken_ends_the_row(spoil):
    model, optimizer = setup_sgd(Sum(), nonfinite="skip", max_skips=2)
    for _ in range(3):
        for _ in range(2):
            one_step(optimizer, spoil(model.losses(), math.inf))
        one_step(optimizer, model.losses())
    assert optimizer.log_dict()["moo/skipped"] == 6


def test_any_number_of_steps_may_be_skipped_on_request():
    model, optimizer = spoiled_parameters(max_skips=None)
    for step in range(9):
        one_step(optimizer, model.losses(step))
    with pytest.warns(UserWarning, match="10 steps in a row"):
        one_step(optimizer, model.losses())
    for step in range(10, 120):
        one_step(optimizer, model.losses(step))
    assert optimizer.log_dict()["moo/skipped"] == 120


# ---------------------------------------------------------------------- on a device


@pytest.fixture
def device(monkeypatch):
    treat_cpu_as_device(monkeypatch)


@over_kinds
def test_flags_on_the_device_change_nothing_while_all_is_finite(method, monkeypatch):
    twin, other = setup(method)
    train(twin, other, range(4))
    treat_cpu_as_device(monkeypatch)
    model, optimizer = setup(method)
    train(model, optimizer, range(4))
    assert whole_state(model, optimizer) == whole_state(twin, other)
    assert snapshot(optimizer.log_dict()) == snapshot(other.log_dict())


def faulty_values(method):
    """Values of a loss that no step may be taken with."""
    below_the_bound = [-9.0] if max(method.bounds(NAMES)) > -math.inf else []
    return [math.nan, math.inf, *below_the_bound]


@pytest.mark.usefixtures("device")
@over_each_method
def test_a_faulty_loss_masks_the_step_and_is_named_when_metrics_are_read(method):
    """Over all methods: the harmless figures in its place must run through their mathematics."""
    for value in faulty_values(method):
        model, optimizer = setup(method, optimizer=sgd)
        train(model, optimizer, range(3))
        before, parameters = learned(optimizer), snapshot(model.state_dict())
        optimizer.zero_grad()
        optimizer.backward(change_value(model.losses(3), value))
        assert not flat_gradient(model).any()
        assert bool(as_vector(optimizer.metrics.weights).isfinite().all())
        optimizer.step()
        assert learned(optimizer) == before
        assert snapshot(model.state_dict()) == parameters
        if method.observes:
            optimizer.observe(model.losses(3))
        with pytest.raises(NonFiniteError, match=r"`b`.*Found 1 step"):
            optimizer.log_dict()
        assert optimizer.log_dict()["moo/skipped"] == 0.0


@pytest.mark.usefixtures("device")
@over_some("AnalyticQP", "MGDA-none", "MovingAverage-MGDA")
def test_a_nan_gradient_masks_the_step_and_is_named_when_metrics_are_read(method):
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    before = learned(optimizer)
    one_step(optimizer, spoil_gradient(model.losses(2), math.nan))
    assert learned(optimizer) == before
    assert all(c.item() == 0.0 for c in optimizer.metrics.coefficients.values())
    with pytest.raises(NonFiniteError, match="`b`"):
        optimizer.log_dict()


@pytest.mark.usefixtures("device")
@over_kinds
def test_faulty_steps_are_skipped_on_request(method):
    model, optimizer = setup(method, nonfinite="skip")
    train(model, optimizer, range(2))
    for count, value in enumerate(faulty_values(method), start=1):
        before = whole_state(model, optimizer)
        one_step(optimizer, change_value(model.losses(2), value))
        before["optimizer"]["balance"]["skipped"] = count
        assert whole_state(model, optimizer) == before
        assert optimizer.log_dict()["moo/skipped"] == count
    train(model, optimizer, range(2, 4))


@pytest.mark.usefixtures("device")
@over_kinds
def test_a_loss_scaler_skips_a_faulty_step(method):
    """Coefficients of NaN reach every gradient, where the scaler finds them."""
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for value in faulty_values(method):
        before = whole_state(model, optimizer)
        optimizer.zero_grad()
        optimizer.backward(change_value(model.losses(2), value), grad_scaler=scaler)
        assert all(bool(g.isnan().all()) for g in gradients(model))
        scaler.step(optimizer)
        scaler.update()
        assert whole_state(model, optimizer) == before
        if math.isfinite(value):  # below its bound, where no scale helps
            with pytest.raises(NonFiniteError, match="`b`"):
                optimizer.log_dict()
        optimizer.log_dict()


@pytest.mark.usefixtures("device")
@over_some("AnalyticQP", "MGDA-none")
def test_an_overflow_under_a_loss_scaler_is_masked_and_not_reported(method):
    """Scalers grow until that happens; it is no news."""
    model, optimizer = setup(method)
    train(model, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(spoil_gradient(model.losses(2), math.nan), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert whole_state(model, optimizer) == before
    assert math.isnan(optimizer.log_dict()["moo/cosine/a,b"])


@pytest.mark.usefixtures("device")
@over_some("FAMO-adam", "BalancedTrajectory-defaults", "MovingAverage-FAMO")
def test_faulty_observed_losses_are_masked_and_named_when_metrics_are_read(method):
    for value in faulty_values(method):
        model, optimizer = setup(method)
        optimizer.backward(model.losses())
        optimizer.step()
        before = learned(optimizer)
        optimizer.observe(change_value(model.losses(), value))
        assert learned(optimizer) == before
        assert balance_of(optimizer)["awaiting"] is None
        with pytest.raises(NonFiniteError, match="`b`"):
            optimizer.log_dict()


@pytest.mark.usefixtures("device")
def test_faulty_steps_are_counted_until_metrics_are_read():
    model, optimizer = setup_sgd(Sum())
    for step in range(6):
        losses = model.losses(step)
        one_step(optimizer, change_value(losses, math.nan) if step % 2 else losses)
    with pytest.raises(NonFiniteError, match=r"`b`.*Found 3 steps"):
        optimizer.log_dict()
    optimizer.log_dict()


@pytest.mark.usefixtures("device")
def test_gradients_on_a_device_are_not_read():
    model, optimizer = setup_sgd(Sum())
    optimizer.backward(model.losses())
    model.heads[2].bias.grad.fill_(math.nan)
    optimizer.step()
    assert balance_of(optimizer)["steps"] == 1
