"""PyTorch's default device and default dtype are the caller's: the balance depends on neither.

The default device is "meta", which holds no values, so that a tensor made without a device shows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from moo_balance import FAMO, MGDA, AnalyticQP, BalancedOptimizer, History, Sum, functional
from moo_balance.engine import Streaming
from moo_balance.functional._checks import constant_vector
from moo_balance.weighting import adam, init_adam, step_generator
from tests.support.problems import (
    SmallModel,
    rows_of_batch,
    setup,
    snapshot,
    spoil_gradient,
    train,
    whole_state,
)
from tests.support.registry import NAMES, over_each_method, over_methods, over_some

STEPS = range(4)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """As a script that keeps its own tensors on another device than this model."""
    constant_vector.cache_clear()
    for step in STEPS:
        rows_of_batch(step)  # data of the test, made before
    with torch.device(device):  # as torch.set_default_device, which cannot be undone
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    constant_vector.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        constant_vector.cache_clear()


def run(method, model, optimizer):
    """All parts of a loop: absent losses, a window, metrics, a checkpoint, the balance alone."""
    history = History()
    train(model, optimizer, STEPS)
    train(model, optimizer, STEPS, ("a", "c"))
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(lambda: model.losses(0))
    optimizer.backward(lambda: model.losses(1))
    optimizer.step()
    history.append(optimizer.metrics)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = BalancedOptimizer(optimizer.optimizer, method.make(NAMES))
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other.balance_state.load_state_dict(other.balance_state.state_dict())
    train(model, other, STEPS)
    figures = {key: history.series(key) for key in history.keys()}  # noqa: SIM118
    return whole_state(model, other), other.log_dict(), figures


@over_methods
def test_training_is_the_same_under_another_default_device(method):
    expected = run(method, *setup(method))
    model, optimizer = setup(method)
    with default_device("meta"):
        assert run(method, model, optimizer) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@over_each_method
def test_training_is_the_same_under_another_default_dtype(method, dtype):
    expected = run(method, *setup(method))
    model, optimizer = setup(method)
    with default_dtype(dtype):
        assert run(method, model, optimizer) == expected


@over_some("Sum", "AnalyticQP")
def test_an_optimizer_is_built_under_another_default_device(method):
    expected = run(method, *setup(method, loss_names=NAMES))
    model = SmallModel()
    base = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    with default_device("meta"):
        optimizer = BalancedOptimizer(base, method.make(NAMES), loss_names=NAMES)
        assert run(method, model, optimizer) == expected


def solutions(count: int) -> object:
    """Results of every function, on inputs that take all of their paths."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 7, generator=generator, dtype=torch.float64, device="cpu")
    losses = rows[:, 0].exp()
    gramians = [rows @ rows.T, torch.ones_like(rows) @ rows.T.abs(), 0 * (rows @ rows.T)]
    duplicated = rows.clone()
    duplicated[-1] = rows[0]
    gramians.append(duplicated @ duplicated.T)
    preference = torch.full_like(losses, 1 / count)
    return [
        functional.project_simplex(losses),
        functional.tchebycheff(losses, preference, 0.0, 0.1),
        functional.smooth_tchebycheff(losses, preference, 0.0, None, 0.1),
        functional.smooth_tchebycheff_log(losses, preference, 1.0, 0.1),
        *(
            (
                functional.min_norm_weights(gramian),
                functional.cosine_similarity(gramian),
                functional.project_dual_cone(gramian, losses),
                functional.scale_gramian(gramian, losses),
            )
            for gramian in (*gramians, *(gramian.float() for gramian in gramians))
        ),
        *(functional.analytic_qp_weights(g) for g in (gramians[0], gramians[2], gramians[3])),
        functional.gradient_scales(losses, gramians[0], "loss+"),
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_functions_have_the_same_result_under_other_defaults(count):
    expected = snapshot(solutions(count))
    with default_device("meta"):
        assert snapshot(solutions(count)) == expected
    with default_dtype(torch.bfloat16):
        assert snapshot(solutions(count)) == expected


def test_what_methods_of_ones_own_use_names_its_device():
    def draws():
        noise = torch.randn(3, generator=step_generator(1, 2), device="cpu")
        noise = noise.double()
        state = init_adam(3, torch.device("cpu"))
        present = torch.ones(3, dtype=torch.bool, device="cpu")
        return snapshot([noise, adam(noise, noise, present, state, 0.1)])

    expected = draws()
    with default_device("meta"):
        assert draws() == expected


def test_a_batch_that_is_evaluated_again_keeps_to_the_model():
    model = SmallModel()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), FAMO())
    other = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), AnalyticQP())
    with default_device("meta"):
        optimizer.step(model.losses)
        other.step(model.losses)
    assert all(value.device.type == "cpu" for value in optimizer.metrics.weights.values())


def scaled(model, optimizer):
    """float32 under a loss scaler, with a step that it skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in STEPS:
        losses = model.losses(step)
        if step == 1:
            losses = spoil_gradient(losses, torch.inf)
        optimizer.zero_grad()
        optimizer.backward(losses, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()


def skipping(model, optimizer):
    for step in STEPS:
        optimizer.zero_grad()
        optimizer.backward(spoil_gradient(model.losses(step), torch.nan if step == 1 else 1.0))
        optimizer.step()


def at_features(model, optimizer):
    for step in STEPS:
        features = torch.tanh(model.trunk(rows_of_batch(step)[:, :3]))
        outputs = [head(features)[:, 0].square().mean() for head in model.heads]
        optimizer.zero_grad()
        optimizer.backward(dict(zip(NAMES, outputs, strict=True)), features=features)
        optimizer.step()


def combining(model, optimizer):
    for step in STEPS:
        optimizer.zero_grad()
        optimizer.combined_loss(model.losses(step)).backward()
        optimizer.step()


def plainly(model, optimizer):
    train(model, optimizer, STEPS)


LOOPS = {
    "scaler": (scaled, {}),
    "skip": (skipping, {"nonfinite": "skip"}),
    "features": (at_features, {}),
    "combined": (combining, {}),
    "streaming": (plainly, {"engine": Streaming()}),
}


@pytest.mark.parametrize("weighting", [MGDA(), FAMO(lagged=True), Sum()], ids=repr)
@pytest.mark.parametrize("id", LOOPS)
def test_every_form_of_a_step_is_the_same_under_other_defaults(id, weighting):
    loop, arguments = LOOPS[id]

    def end(context):
        model = SmallModel().float() if id == "scaler" else SmallModel()
        base = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        optimizer = BalancedOptimizer(base, weighting, **arguments)
        with context:
            loop(model, optimizer)
            figures = optimizer.log_dict()
        return whole_state(model, optimizer), snapshot(figures)

    expected = end(nullcontext())
    assert end(default_device("meta")) == expected
    assert end(default_dtype(torch.bfloat16)) == expected
