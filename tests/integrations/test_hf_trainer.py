"""The Trainer of transformers takes the steps of a plain loop, through ``combined_loss``."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from examples.frameworks.hf_trainer import BalancedTrainer
from moo_balance import BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.integrations import unwrap_optimizer
from moo_balance.integrations.transformers import LogBalance
from tests.support.plain_runs import (
    BATCHES,
    model_and_optimizer,
    over_unobserving,
    plain_mixed_run,
    plain_run,
)
from tests.support.problems import whole_state
from tests.support.registry import over_some

pytestmark = pytest.mark.capability("Trainer of transformers")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """The Trainer collects garbage in every run; skip the objects that are there already."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _forget():
    """Accelerate's settings, which the Trainer makes, hold for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class InOrder(BalancedTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def state(model, optimizer):
    """All but the entry that a scheduler leaves in the groups."""
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    return whole_state(model, optimizer)


@pytest.fixture
def trainer(tmp_path):
    def make(method, kind=InOrder, **arguments):
        model, optimizer = model_and_optimizer(method)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        settings = {
            "output_dir": tmp_path,
            "use_cpu": True,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        made = kind(
            model=model,
            args=TrainingArguments(**{**settings, **arguments}),
            train_dataset=[{"batch": batch} for batch in BATCHES],
            optimizers=(optimizer, schedule),
        )
        made.remove_callback(PrinterCallback)
        return model, optimizer, made

    return make


@over_unobserving
def test_takes_the_steps_of_a_plain_loop(trainer, method):
    model, optimizer, made = trainer(method)
    made.train()
    assert state(model, optimizer) == plain_run(method)


@over_some("FAMO-lagged", "AnalyticQP")
def test_clipping(trainer, method):
    model, optimizer, made = trainer(method, max_grad_norm=0.1)
    made.train()
    assert state(model, optimizer) == plain_run(method, clip=0.1)


@over_some("FAMO-lagged", "AnalyticQP-every")
def test_resumes_to_the_last_bit(trainer, method, tmp_path):
    _, _, interrupted = trainer(method, max_steps=3, save_strategy="steps", save_steps=3)
    interrupted.train()
    model, optimizer, made = trainer(method)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert state(model, optimizer) == plain_run(method)


@over_some("AnalyticQP")
def test_each_loss_is_logged(trainer, method):
    _, optimizer, made = trainer(method)
    made.train()
    steps = [logs for logs in made.state.log_history if "loss" in logs]
    assert len(steps) == len(BATCHES)
    assert optimizer.log_dict().items() <= steps[-1].items()
    assert steps[0]["moo/loss/a"] != steps[-1]["moo/loss/a"]


@over_some("FAMO-lagged", "MGDA-none")
def test_bfloat16(trainer, method):
    model, optimizer, made = trainer(method, bf16=True)
    model.float()
    made.train()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert state(model, optimizer) == plain_mixed_run(method, torch.bfloat16, disabled)


@over_some("Sum")
def test_accumulated_gradients_add_up(trainer, method):
    model, _, made = trainer(method, gradient_accumulation_steps=2, max_steps=1)
    made.train()
    twin, optimizer = model_and_optimizer(method)
    for batch in BATCHES[:2]:
        optimizer.combined_loss({name: loss / 2 for name, loss in twin(batch).items()}).backward()
    optimizer.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


@over_some("AnalyticQP")
def test_evaluation_balances_nothing(trainer, method):
    model, optimizer, made = trainer(method, label_names=["batch"])
    made.train()
    before = state(model, optimizer)
    total = made.evaluate([{"batch": 7}])["eval_loss"]
    assert total == pytest.approx(sum(loss.item() for loss in model(7).values()))
    assert state(model, optimizer) == before


@over_some("FAMO-adam")
def test_an_observing_method_says_what_it_needs(trainer, method):
    with pytest.raises(BalanceError, match="lagged=True"):
        trainer(method)[2].train()


# ---------------------------------------------------------------------- the optimizer it builds


class Plain(Trainer):
    """One loss, their sum."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return torch.stack(list(model(**inputs).values())).sum()


def build(kind, tmp_path, method, weighting=None, **arguments):
    model, _ = model_and_optimizer(method)
    settings = {
        "output_dir": tmp_path,
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "warmup_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    extra = {} if kind is Plain else {"weighting": weighting}
    trainer = kind(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=[{"batch": batch} for batch in BATCHES],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@over_some("Sum")
@pytest.mark.parametrize("window", [1, 2])
def test_the_optimizer_is_the_trainers_own_balanced(tmp_path, method, window):
    """With the plain sum the run is that of a Trainer without the mixin."""
    plain = build(Plain, tmp_path, method, gradient_accumulation_steps=window)
    balanced = build(
        InOrder, tmp_path, method, method.make("abc"), gradient_accumulation_steps=window
    )
    for trainer in (plain, balanced):
        trainer.train()
    optimizer = unwrap_optimizer(balanced.optimizer)
    assert isinstance(optimizer, BalancedOptimizer)
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in trainer.param_groups]
        for trainer in (optimizer, plain.optimizer)
    ]
    assert groups[0] == groups[1]
    assert [group["weight_decay"] for group in groups[0]] == [0.1, 0.0]
    assert groups[0][0]["betas"][0] == 0.8
    for one, other in zip(balanced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@over_some("AnalyticQP")
def test_a_built_optimizer_resumes_to_the_last_bit(tmp_path, method):
    def make(**arguments):
        return build(InOrder, tmp_path, method, method.make("abc"), **arguments)

    whole, parts = make(), make(save_strategy="steps", save_steps=3)
    whole.train()
    parts.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    states = [whole_state(t.model, unwrap_optimizer(t.optimizer)) for t in (whole, resumed)]
    assert states[0] == states[1]


@over_some("Sum")
def test_a_trainer_without_a_method_is_refused(tmp_path, method):
    with pytest.raises(BalanceValueError, match=r"`weighting` should be a method.*Found None"):
        build(InOrder, tmp_path, method).train()


@over_some("Sum")
def test_outputs_among_the_losses_are_refused(trainer, method):
    class WithOutputs(InOrder):
        def compute_losses(self, model, inputs):
            losses, outputs = super().compute_losses(model, inputs)
            return {**losses, "logits": torch.ones(2, 3)}, outputs

    with pytest.raises(BalanceValueError, match=r"`logits`.*\(2, 3\).*override `compute_losses`"):
        trainer(method, WithOutputs)[2].train()

    class OnlyLosses(InOrder):
        def compute_losses(self, model, inputs):
            return super().compute_losses(model, inputs)[0]

    with pytest.raises(BalanceValueError, match=r"Found dict\. Write `return losses, outputs`"):
        trainer(method, OnlyLosses)[2].train()


@over_some("Sum")
def test_a_loss_is_evaluated_also_without_labels(trainer, method):
    model, _, made = trainer(method)
    total = made.evaluate([{"batch": 7}])["eval_loss"]
    assert total == pytest.approx(sum(loss.item() for loss in model(7).values()))


@over_some("Sum")
@pytest.mark.parametrize("count", [0, 1, 2], ids=["tensor", "one", "two"])
def test_predictions_are_all_outputs(trainer, method, count):
    class WithOutputs(InOrder):
        def compute_losses(self, model, inputs):
            losses, _ = super().compute_losses(model, inputs)
            output = torch.tensor([[5.0, 6.0]])
            return losses, (output,) * count if count else output

    predictions = trainer(method, WithOutputs)[2].predict([{"batch": 7}]).predictions
    found = predictions if isinstance(predictions, tuple) else (predictions,)
    assert [each.tolist() for each in found] == [[[5.0, 6.0]]] * max(count, 1)


@over_some("AnalyticQP")
def test_the_callback_adds_to_the_logs(trainer, method):
    class OwnLoss(Plain):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return unwrap_optimizer(self.optimizer).combined_loss(model(**inputs))

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **parts):
            reported.append(dict(logs))

    reported = []
    _, optimizer, made = trainer(method, OwnLoss)
    made.add_callback(Reporter)
    made.callback_handler.callbacks.insert(0, LogBalance())
    made.train()
    steps = [logs for logs in made.state.log_history if "loss" in logs]
    assert len(steps) == len(BATCHES)
    assert optimizer.log_dict().items() <= steps[-1].items()
    assert optimizer.log_dict().items() <= reported[len(BATCHES) - 1].items()
    assert not any(key.startswith("moo/") for key in reported[-1])
