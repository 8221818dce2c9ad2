"""Accelerate takes the steps of a plain loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from moo_balance import MGDA, BalancedOptimizer, BalanceError
from moo_balance.integrations import unwrap_optimizer
from moo_balance.integrations.accelerate import backward
from tests.support.companions import ScheduleFree
from tests.support.plain_runs import (
    BATCHES,
    loader,
    model_and_optimizer,
    plain_accumulated_run,
    plain_mixed_run,
    plain_run,
)
from tests.support.problems import SmallModel, whole_state
from tests.support.registry import over_each_method, over_kinds, over_some

pytestmark = pytest.mark.capability("Accelerate")


@pytest.fixture(autouse=True)
def _forget():
    """Accelerators of one process share their settings."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(method, accelerator, dtype=torch.float64):
    return accelerator.prepare(*model_and_optimizer(method, dtype))


def train(accelerator, model, optimizer, batches=BATCHES, clip=None):
    for batch in batches:
        with accelerator.accumulate(model):
            backward(accelerator, optimizer, partial(model, batch))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@over_each_method
def test_takes_the_steps_of_a_plain_loop(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(method, accelerator)
    train(accelerator, model, optimizer)
    assert whole_state(model, optimizer) == plain_run(method)


@over_kinds
def test_micro_batches_are_one_batch(method):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = prepare(method, accelerator)
    train(accelerator, model, optimizer)
    assert whole_state(model, optimizer) == plain_accumulated_run(method, share=0.5)


@over_some("FAMO-adam", "SmoothTchebycheff-warm-up")
@pytest.mark.parametrize("window", [1, 2])
def test_resumes_to_the_last_bit(method, window, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    train(accelerator, *prepare(method, accelerator), BATCHES[:4])
    accelerator.save_state(str(tmp_path))

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    model, optimizer = prepare(method, accelerator)
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, BATCHES[4:])
    uninterrupted = plain_run(method) if window == 1 else plain_accumulated_run(method, share=0.5)
    assert whole_state(model, optimizer) == uninterrupted


@over_some("FAMO-adam", "AnalyticQP")
def test_clipping(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(method, accelerator)
    train(accelerator, model, optimizer, clip=0.1)
    assert whole_state(model, optimizer) == plain_run(method, clip=0.1)


@over_some("FAMO-adam", "MGDA-none")
def test_bfloat16(method):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = prepare(method, accelerator, torch.float32)
    train(accelerator, model, optimizer)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    twin = plain_mixed_run(method, torch.bfloat16, disabled)
    assert whole_state(model, optimizer) == twin


@over_some("FAMO-adam", "MGDA-none")
def test_float16_with_its_loss_scaler(method):
    # Accelerate has a scaler only on GPUs.
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, optimizer = prepare(method, accelerator, torch.float32)
    model.forward = torch.autocast("cpu", torch.float16, cache_enabled=False)(model.forward)
    train(accelerator, model, optimizer)
    twin = plain_mixed_run(method, torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**8))
    assert whole_state(model, optimizer) == twin


@over_some("AnalyticQP")
def test_schedulers(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = model_and_optimizer(method)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    model, prepared_optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for batch in BATCHES:
        train(accelerator, model, prepared_optimizer, [batch])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] * 0.5 ** len(BATCHES)


@over_some("AnalyticQP")
def test_a_loader_that_ends_within_a_window_closes_it(method):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = model_and_optimizer(method)
    model, prepared_optimizer, batches = accelerator.prepare(model, optimizer, loader(BATCHES))
    train(accelerator, model, prepared_optimizer, batches)
    assert optimizer.state_dict()["balance"]["steps"] == 2


@over_some("AnalyticQP")
def test_the_metrics_are_reached_through_balanced(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = model_and_optimizer(method)
    model, prepared_optimizer = accelerator.prepare(model, optimizer)
    train(accelerator, model, prepared_optimizer, BATCHES[:1])
    assert unwrap_optimizer(prepared_optimizer) is optimizer
    assert "moo/loss/a" in unwrap_optimizer(prepared_optimizer).log_dict()


@over_some("Sum")
def test_bad_losses_are_refused(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(method, accelerator)
    with pytest.raises(BalanceError, match="should be a mapping"):
        backward(accelerator, optimizer, list(model(0).values()))


@over_some("AnalyticQP")
def test_retain_graph_is_passed_on(method):
    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare(method, accelerator)
    losses = model(0)
    backward(accelerator, optimizer, losses, retain_graph=True)
    backward(accelerator, optimizer, losses)


def test_modes_of_a_schedule_free_optimizer_are_reached():
    model = SmallModel()
    optimizer = BalancedOptimizer(ScheduleFree(model.parameters(), lr=0.01), MGDA())
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.eval()
    assert not optimizer.param_groups[0]["train_mode"]
    prepared.train()
    assert optimizer.param_groups[0]["train_mode"]
