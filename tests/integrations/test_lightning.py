"""Lightning takes the steps of a plain loop, in manual and in automatic optimization."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision

from moo_balance import BalancedOptimizer, BalanceError, BalanceValueError
from moo_balance.integrations import unwrap_optimizer
from moo_balance.integrations.lightning import LogBalance, backward, combined_loss
from tests.support.plain_runs import (
    BATCHES,
    loader,
    model_and_optimizer,
    over_unobserving,
    plain_accumulated_run,
    plain_mixed_run,
    plain_run,
)
from tests.support.problems import flat_gradient, snapshot, whole_state
from tests.support.registry import over_each_method, over_some

pytestmark = [
    # Lightning warns of every loader that works in the training process.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Lightning's own use of torch.utils._pytree.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(LightningModule):
    def __init__(self, method, dtype=torch.float64):
        super().__init__()
        self.model, self.optimizer = model_and_optimizer(method, dtype)

    def configure_optimizers(self):
        return self.optimizer

    def state(self):
        return whole_state(self.model, self.optimizer)


class Manual(Module):
    """`take` is the step: given the module, the optimizer that Lightning shows, and the batch."""

    def __init__(self, method, take=None, **arguments):
        super().__init__(method, **arguments)
        self.automatic_optimization = False
        self.take = take or usual_step

    def training_step(self, batch, index):
        self.take(self, self.optimizers(), batch)
        self.log_dict(self.optimizers().log_dict())


class Automatic(Module):
    def training_step(self, batch, index):
        combined = combined_loss(self, self.model(batch))
        self.log_dict(self.optimizers().log_dict())
        return combined


def usual_step(module, optimizer, batch):
    optimizer.zero_grad()
    backward(module, partial(module.model, batch))
    optimizer.step()


@pytest.fixture
def fit(tmp_path):
    def run(module, batches=BATCHES, checkpoint=None, logger=False, **options):
        trainer = Trainer(
            **{
                "max_epochs": 1,
                "accelerator": "cpu",
                "default_root_dir": tmp_path,
                "log_every_n_steps": 1,
                **options,
            },
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(batches), ckpt_path=checkpoint, weights_only=True)
        return trainer

    return run


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)


def check_resume(fit, make, path):
    """Three batches, a checkpoint, fresh objects, three more."""
    fit(make(), BATCHES[:3]).save_checkpoint(path)
    resumed = make()
    trainer = fit(resumed, BATCHES[3:], path, max_epochs=2)
    assert trainer.global_step == len(BATCHES)
    return resumed.state()


@pytest.mark.capability("Lightning, manual optimization")
class TestManual:
    @over_each_method
    def test_takes_the_steps_of_a_plain_loop(self, fit, method):
        module = Manual(method)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("FAMO-every", "AnalyticQP")
    def test_resumes_to_the_last_bit(self, fit, method, tmp_path):
        resumed = check_resume(fit, partial(Manual, method), tmp_path / "checkpoint")
        assert resumed == plain_run(method)

    @over_some("FAMO-adam", "MGDA-none")
    def test_bfloat16(self, fit, method):
        module = Manual(method, dtype=torch.float32)
        fit(module, precision="bf16-mixed")
        assert module.state() == plain_mixed_run(method, torch.bfloat16, scaler(enabled=False))

    @over_some("FAMO-adam", "MGDA-none")
    def test_float16_with_its_loss_scaler(self, fit, method):
        module = Manual(method, dtype=torch.float32)
        fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler())])
        assert module.state() == plain_mixed_run(method, torch.float16, scaler())

    @over_some("FAMO-adam", "AnalyticQP")
    def test_clipping(self, fit, method):
        def clipped(module, optimizer, batch):
            optimizer.zero_grad()
            backward(module, partial(module.model, batch))
            module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()

        module = Manual(method, clipped)
        fit(module)
        assert module.state() == plain_run(method, clip=0.1)

    @over_some("FAMO-adam", "AnalyticQP")
    def test_a_closure_may_go_to_step(self, fit, method):
        def at_once(module, optimizer, batch):
            optimizer.step(partial(module.model, batch))

        module = Manual(method, at_once)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("FAMO-adam")
    def test_losses_may_be_observed(self, fit, method):
        def observed(module, optimizer, batch):
            optimizer.zero_grad()
            backward(module, module.model(batch))
            optimizer.step()
            with torch.no_grad():
                optimizer.observe(module.model(batch))

        module = Manual(method, observed)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("FAMO-adam", "AnalyticQP")
    def test_micro_batches_accumulate(self, fit, method):
        def accumulated(module, optimizer, batch):
            optimizer.zero_grad()
            with optimizer.accumulate():
                backward(module, partial(module.model, batch))
            backward(module, partial(module.model, batch + 1))
            optimizer.step()

        module = Manual(method, accumulated)
        fit(module, BATCHES[::2])
        assert module.state() == plain_accumulated_run(method)

    @over_some("AnalyticQP")
    def test_the_optimizer_of_lightning_shows_what_the_optimizer_holds(self, fit, method):
        def compare(module, optimizer, batch):
            usual_step(module, optimizer, batch)
            own = module.optimizer
            assert type(optimizer) is not type(own)
            assert isinstance(optimizer, BalancedOptimizer)
            assert unwrap_optimizer(optimizer) is own
            assert optimizer.metrics is own.metrics
            assert optimizer.weighting is own.weighting
            assert optimizer.param_groups is own.param_groups
            assert optimizer.log_dict() == own.log_dict()
            assert snapshot(optimizer.state_dict()) == snapshot(own.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())

        module = Manual(method, compare)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("FAMO-adam")
    def test_the_metrics_are_logged(self, fit, method):
        module = Manual(method)
        logged = fit(module).callback_metrics
        assert {key: value.item() for key, value in logged.items()} == module.optimizer.log_dict()

    @over_some("AnalyticQP")
    def test_retain_graph_is_passed_on(self, fit, method):
        def twice(module, optimizer, batch):
            optimizer.zero_grad()
            losses = module.model(batch)
            backward(module, losses, retain_graph=True)
            optimizer.zero_grad()
            backward(module, losses)
            optimizer.step()

        module = Manual(method, twice)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("Sum")
    def test_bad_losses_are_refused(self, fit, method):
        def bad(module, optimizer, batch):
            backward(module, list(module.model(batch).values()))

        with pytest.raises(BalanceError, match="should be a mapping"):
            fit(Manual(method, bad))


@pytest.mark.capability("Lightning, automatic optimization")
class TestAutomatic:
    @over_unobserving
    def test_takes_the_steps_of_a_plain_loop(self, fit, method):
        module = Automatic(method)
        fit(module)
        assert module.state() == plain_run(method)

    @over_some("FAMO-lagged", "AnalyticQP-every")
    def test_resumes_to_the_last_bit(self, fit, method, tmp_path):
        resumed = check_resume(fit, partial(Automatic, method), tmp_path / "checkpoint")
        assert resumed == plain_run(method)

    @over_some("FAMO-lagged", "MGDA-none")
    def test_bfloat16(self, fit, method):
        module = Automatic(method, torch.float32)
        fit(module, precision="bf16-mixed")
        assert module.state() == plain_mixed_run(method, torch.bfloat16, scaler(enabled=False))

    @over_some("FAMO-lagged", "MGDA-none")
    def test_float16_with_its_loss_scaler(self, fit, method):
        module = Automatic(method, torch.float32)
        fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler())])
        assert module.state() == plain_mixed_run(method, torch.float16, scaler())

    @over_some("FAMO-lagged", "AnalyticQP")
    def test_clipping(self, fit, method):
        module = Automatic(method)
        fit(module, gradient_clip_val=0.1)
        assert module.state() == plain_run(method, clip=0.1)

    @over_some("AnalyticQP")
    def test_schedulers(self, fit, method):
        class Scheduled(Automatic):
            def configure_optimizers(self):
                scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.5)
                return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]

        module = Scheduled(method)
        fit(module)
        lr = module.optimizer.defaults["lr"]
        assert module.optimizer.param_groups[0]["lr"] == lr * 0.5 ** len(BATCHES)

    @over_some("Sum")
    def test_accumulated_gradients_add_up(self, fit, method):
        module = Automatic(method)
        fit(module, BATCHES[:2], accumulate_grad_batches=2)
        model, _ = model_and_optimizer(method)
        for batch in BATCHES[:2]:
            (torch.stack(list(model(batch).values())).sum() / 2).backward()
        torch.testing.assert_close(flat_gradient(module.model), flat_gradient(model))

    @over_some("FAMO-adam")
    def test_an_observing_method_says_what_it_needs(self, fit, method):
        with pytest.raises(BalanceError, match="lagged=True"):
            fit(Automatic(method))

    @over_some("FAMO-adam")
    def test_an_observing_method_may_be_given_the_losses(self, fit, method):
        class Observed(Automatic):
            def on_train_batch_end(self, outputs, batch, index):
                with torch.no_grad():
                    self.optimizers().observe(self.model(batch))

        module = Observed(method)
        fit(module)
        assert module.state() == plain_run(method)


# ---------------------------------------------------------------------- the callback that logs


class Memory(Logger):
    """A logger that keeps what it is given."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Silent(Automatic):
    """Keeps the metrics of each step, and logs nothing itself."""

    def __init__(self, method):
        super().__init__(method)
        self.seen = []

    def training_step(self, batch, index):
        return combined_loss(self, self.model(batch))

    def on_train_batch_end(self, outputs, batch, index):
        self.seen.append(self.optimizer.log_dict())


@over_some("AnalyticQP")
@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (1, {}, [0, 1, 2, 3, 4, 5]),
        (2, {}, [1, 3, 5]),
        (4, {}, [3]),
        (None, {"log_every_n_steps": 3}, [2, 5]),
        (1, {"accumulate_grad_batches": 2}, [0, 1, 2]),
    ],
)
def test_the_callback_logs_after_so_many_steps(fit, method, every, options, steps):
    module, logger = Silent(method), Memory()
    fit(module, logger=logger, callbacks=[LogBalance(every)], **options)
    window = options.get("accumulate_grad_batches", 1)
    logged = [(step, values) for step, values in logger.logged if "moo/loss/a" in values]
    assert logged == [(step, module.seen[window * step + window - 1]) for step in steps]
    assert module.state() != Silent(method).state()


@over_some("AnalyticQP")
def test_the_callback_logs_each_balanced_optimizer(fit, method):
    class Two(Manual):
        def configure_optimizers(self):
            self.other = BalancedOptimizer(
                torch.optim.SGD(self.model.parameters(), lr=0.0), self.optimizer.weighting
            )
            return torch.optim.SGD(self.model.parameters(), lr=0.0), self.optimizer, self.other

        def training_step(self, batch, index):
            for optimizer in self.optimizers()[1:]:
                optimizer.zero_grad()
                backward(self, self.model(batch), optimizer)
                optimizer.step()

    module, logger = Two(method), Memory()
    fit(module, BATCHES[:1], logger=logger, callbacks=[LogBalance(1, prefix="", pairs=False)])
    expected = {
        f"{index}/{key}": value
        for index, optimizer in ((1, module.optimizer), (2, module.other))
        for key, value in optimizer.log_dict("", pairs=False).items()
    }
    assert logger.logged == [(1, expected)]


@over_some("Sum")
def test_the_callback_refuses_a_module_that_balances_nothing(fit, method):
    class Plain(Automatic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    with pytest.raises(BalanceValueError, match=r"should contain a BalancedOptimizer.*Found SGD"):
        fit(Plain(method), callbacks=[LogBalance()])


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_the_callback_refuses_what_is_no_number_of_steps(every):
    with pytest.raises(BalanceValueError, match=f"`every`.*Found {every}"):
        LogBalance(every)
