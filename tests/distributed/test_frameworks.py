"""Frameworks on two ranks, and the examples for them: one process's steps on the joined batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, TrainingArguments

from examples.frameworks import ddp, fsdp2
from examples.frameworks.hf_trainer import BalancedTrainer
from moo_balance import FAMO, AnalyticQP, BalancedOptimizer, BalanceError
from moo_balance.integrations import accelerate, lightning, unwrap_optimizer
from tests.support.distributed import (
    STEPS,
    Net,
    adam,
    assert_equals_reference,
    assert_same_on_all_ranks,
    losses_of,
    parameters,
    share,
)
from tests.support.problems import snapshot
from tests.support.registry import NAMES, over_some

DTYPE = torch.float64


@pytest.fixture
def _forget():
    """Accelerators of one process share their settings, and so would those of the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Module(LightningModule):
    def __init__(self, method, automatic):
        super().__init__()
        self.automatic_optimization = automatic
        self.net = Net()
        self.optimizer = BalancedOptimizer(adam(self.net), method.make(NAMES))

    def configure_optimizers(self):
        return self.optimizer

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return lightning.combined_loss(self, losses_of(self.net, batch))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        lightning.backward(self, partial(losses_of, self.net, batch))
        optimizer.step()
        return None


@pytest.mark.capability("Lightning under DDP")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("kind", ["default", "find_unused_parameters", "static_graph"])
class TestLightning:
    def fit(self, module, kind, tmp_path):
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(**({} if kind == "default" else {kind: True})),
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = [share(step, DTYPE) for step in range(STEPS)]
        trainer.fit(module, DataLoader(batches, batch_size=None))

    @over_some("FAMO-adam", "AnalyticQP")
    def test_manual(self, method, kind, tmp_path):
        module = Module(method, automatic=False)
        self.fit(module, kind, tmp_path)
        assert_equals_reference(module.net, module.optimizer, method, DTYPE)

    @over_some("FAMO-lagged", "AnalyticQP")
    def test_automatic(self, method, kind, tmp_path):
        module = Module(method, automatic=True)
        self.fit(module, kind, tmp_path)
        assert_equals_reference(module.net, module.optimizer, method, DTYPE)

    @over_some("Sum")
    def test_a_step_without_the_integration_is_refused(self, method, kind, tmp_path):
        class WithoutIntegration(Module):
            def training_step(self, batch, index):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                optimizer.backward(losses_of(self.net, batch))
                optimizer.step()

        with pytest.raises(BalanceError, match="same parameters"):
            self.fit(WithoutIntegration(method, automatic=False), kind, tmp_path)


@pytest.mark.capability("Accelerate under DDP")
@pytest.mark.usefixtures("_forget")
class TestAccelerate:
    def train(self, method, window=1):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
        assert accelerator.num_processes == 2
        net = Net()
        model, optimizer = accelerator.prepare(
            net, BalancedOptimizer(adam(net), method.make(NAMES))
        )
        for step in range(STEPS):
            with accelerator.accumulate(model):
                losses = partial(losses_of, model, share(step, DTYPE))
                accelerate.backward(accelerator, optimizer, losses)
                optimizer.step()
                optimizer.zero_grad()
        return net, unwrap_optimizer(optimizer)

    @over_some("FAMO-adam", "MGDA-every")
    def test_a_step_for_each_batch(self, method):
        net, optimizer = self.train(method)
        assert_equals_reference(net, optimizer, method, DTYPE)

    @over_some("FAMO-adam", "MGDA-every")
    def test_a_step_for_two_batches(self, method):
        net, optimizer = self.train(method, window=2)
        assert_same_on_all_ranks(parameters(net), optimizer.state_dict()["balance"])
        twin = Net()
        alone = BalancedOptimizer(adam(twin), method.make(NAMES), process_group=None)
        for step in range(0, STEPS, 2):
            alone.step(partial(mean_losses, twin, (step, step + 1)))
        torch.testing.assert_close(parameters(net), parameters(twin), rtol=1e-12, atol=1e-12)


def mean_losses(model, steps):
    """Of whole batches."""
    first, second = (losses_of(model, share(step, DTYPE, alone=True)) for step in steps)
    return {name: (first[name] + second[name]) / 2 for name in NAMES}


class InOrder(BalancedTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class NetOfLosses(Net):
    def forward(self, batch):
        return losses_of(super().forward, batch)


@pytest.mark.capability("Trainer of transformers under DDP")
@pytest.mark.usefixtures("_forget")
@over_some("FAMO-lagged", "AnalyticQP")
def test_trainer_of_transformers(method, tmp_path):
    net = NetOfLosses()
    optimizer = BalancedOptimizer(adam(net), method.make(NAMES))
    rows = torch.cat([share(step, DTYPE, alone=True) for step in range(STEPS)])
    trainer = InOrder(
        model=net,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            ddp_backend="gloo",
            num_train_epochs=1,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"batch": row} for row in rows],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert_equals_reference(net, optimizer, method, DTYPE)


@pytest.mark.capability("DistributedDataParallel")
def test_the_example_for_ddp():
    model, optimizer = ddp.train(FAMO())
    assert_same_on_all_ranks(parameters(model), optimizer.state_dict()["balance"])
    assert optimizer.state_dict()["balance"]["steps"] == 12


@pytest.mark.capability("FSDP2")
@pytest.mark.parametrize("weighting", [FAMO(), AnalyticQP(every=2)], ids=["FAMO", "AnalyticQP"])
def test_the_example_for_fsdp2_resumes_to_the_last_bit(weighting, tmp_path):
    folders = [tmp_path]
    dist.broadcast_object_list(folders)
    whole, parts, resumed = (fsdp2.build_sharded(weighting) for _ in range(3))
    fsdp2.train(*whole, steps=5)
    fsdp2.train(*parts, steps=3)
    fsdp2.save(*parts, folders[0])
    fsdp2.load(*resumed, folders[0])
    fsdp2.train(*resumed, steps=2)
    assert_same_on_all_ranks(parameters(whole[0]))
    assert snapshot(parameters(resumed[0])) == snapshot(parameters(whole[0]))
    balances = [optimizer.balance_state.state_dict() for _, optimizer in (resumed, whole)]
    assert balances[0] == balances[1]
