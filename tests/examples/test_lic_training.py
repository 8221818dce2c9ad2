"""The loop: losses, schedules, what is done to gradients, averaged weights, what is recorded."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from torch import nn

from examples.lic.architectures import build
from examples.lic.hyperprior import MeanScaleHyperprior, Reconstruction
from examples.lic.log import Recorder
from examples.lic.losses import EQUAL, WEIGHTINGS, Levels, RateDistortion, fixed
from examples.lic.streams import Crops, CropStream
from examples.lic.training import Observer, Recipe, Trainer, normalize_gradient
from moo_balance import Sum


@pytest.fixture
def pictures():
    ramp = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1)
    return [ramp.to(torch.uint8), ramp.flip(-1).to(torch.uint8)]


def make_trainer(weighting=EQUAL, recipe=None, model=None, **options):
    torch.manual_seed(0)
    model = MeanScaleHyperprior(8, 8) if model is None else model
    recipe = Recipe(1, 1e-3) if recipe is None else recipe
    return Trainer(RateDistortion(model, 0.01), weighting, recipe, seed=1, **options)


def run(trainer, pictures, *observers):
    trainer.run(CropStream(Crops(pictures, crop=64, seed=0), batch=1), observers)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_losses_are_rate_and_scaled_error():
    model = MeanScaleHyperprior(8, 8).eval()
    images = torch.rand(2, 3, 64, 64)
    losses = RateDistortion(model, lmbda=0.01)(images)
    output = model(images)
    torch.testing.assert_close(losses["rate"], output.bpp())
    error = (255 * (output.images - images)).square().mean()
    torch.testing.assert_close(losses["distortion"], 0.01 * error)


def test_a_bound_sees_the_rate_of_rounded_symbols_with_the_gradient_of_noisy_ones():
    model, images = MeanScaleHyperprior(8, 8), torch.rand(2, 3, 64, 64)

    def evaluate(**options):
        torch.manual_seed(3)
        losses = RateDistortion(model.train(), lmbda=0.01, **options)(images)
        gradients = torch.autograd.grad(losses["rate"], model.g_a.parameters())
        assert model.training
        return losses, gradients

    (noisy, gradients), (rounded, same) = evaluate(), evaluate(rounded=True)
    assert rounded["distortion"] == noisy["distortion"]
    assert all(map(torch.equal, gradients, same))
    expected = model.eval()(images).bpp()
    assert rounded["rate"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert noisy["rate"].item() != pytest.approx(expected.item(), rel=1e-3)


def test_training_lowers_the_loss_and_records_every_step(pictures):
    record = Recorder()
    run(make_trainer(recipe=Recipe(30, 5e-3, clip="unit")), pictures, record)
    _, distortion = record.history.series("loss/distortion")
    assert len(distortion) == len(record.seconds) == 30
    assert fmean(distortion[-5:]) < 0.6 * fmean(distortion[:5])
    assert record.last("loss")["distortion"] == distortion[-1]
    assert record.late_mean("loss")["distortion"] == pytest.approx(fmean(distortion[21:]))
    assert record.late_mean("coefficient") == {"rate": 0.5, "distortion": 0.5}


@pytest.mark.parametrize("arch", ["mbt2018-mean:8,8", "variable-rate:mbt2018-mean:8,8"])
def test_mixed_precision_is_of_the_transforms_and_not_of_the_losses(arch, pictures):
    outputs, losses = {}, {}
    for amp in (False, True):
        torch.manual_seed(0)
        model = build(arch)
        layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        layer.register_forward_hook(lambda *a, amp=amp: outputs.update({amp: a[2].dtype}))
        objective = RateDistortion(model, 0.01)
        if arch.startswith("variable"):
            objective = Levels(model, [0.01, 0.1], one_level=False, seed=0)
        trainer = Trainer(objective, Sum(), Recipe(1, 1e-3, amp=amp), seed=1)
        dtypes = set()
        note = lambda *a, to=dtypes: to.update(loss.dtype for loss in a[2].values())  # noqa: E731
        objective.register_forward_hook(note)
        run(trainer, pictures)
        assert dtypes == {torch.float32}
        losses[amp] = trainer.optimizer.metrics.losses
    assert outputs == {False: torch.float32, True: torch.bfloat16}
    for name, loss in losses[True].items():
        assert loss.item() != losses[False][name].item()
        assert loss.item() == pytest.approx(losses[False][name].item(), rel=0.02)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_trains_the_codec(name, pictures):
    trainer = make_trainer(WEIGHTINGS[name], Recipe(2, 1e-3))
    before = weights(trainer)
    run(trainer, pictures)
    assert weights(trainer).isfinite().all()
    assert not torch.equal(before, weights(trainer))


def test_fixed_weights_are_the_coefficients(pictures):
    trainer = make_trainer(fixed(0.8))
    run(trainer, pictures)
    coefficients = trainer.optimizer.metrics.coefficients
    assert coefficients == pytest.approx({"rate": 0.8, "distortion": 0.2})


@pytest.mark.parametrize(("clip", "norm"), [("unit", 1.0), (1e-3, 1e-3), (math.inf, None)])
def test_gradients_are_normalised_clipped_or_left(clip, norm, pictures):
    trainer = make_trainer(Sum(), Recipe(1, 1e-3, clip=clip))
    run(trainer, pictures)
    length = nn.utils.get_total_norm([p.grad for p in trainer.parameters]).item()
    assert length > 1.5 if norm is None else length == pytest.approx(norm, rel=1e-4)


def test_a_normalised_gradient_keeps_its_direction_and_zero_stays_zero():
    a, b, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0])
    normalize_gradient([a, b, unused])
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(b.grad, torch.tensor([0.0, -0.8]))
    a.grad.zero_()
    normalize_gradient([a])
    assert torch.equal(a.grad, torch.zeros(2))


def test_the_learning_rate_falls_twice_near_the_end(pictures):
    trainer, rates = make_trainer(recipe=Recipe(10, 1e-3)), []

    class Keep(Observer):
        def after(self, trainer):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    run(trainer, pictures, Keep())
    assert rates == pytest.approx([1e-3] * 6 + [3e-4] * 2 + [9e-5] * 2)


def test_averaged_weights_are_a_moving_average(pictures):
    trainer = make_trainer(recipe=Recipe(2, 1e-2, ema=0.75))
    seen = []

    class Keep(Observer):
        def after(self, trainer):
            seen.append(trainer.model.g_a[0].weight.detach().clone())

    run(trainer, pictures, Keep())
    average = trainer.trained.g_a[0].weight
    torch.testing.assert_close(average, 0.75 * seen[0] + 0.25 * seen[1])
    assert torch.equal(average, trainer.state_dict()["ema"]["module.g_a.0.weight"])


class WithQuantiles(nn.Module):
    """A codec with a parameter that only an auxiliary loss reaches, as CompressAI's have."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.bottleneck = nn.Module()
        self.bottleneck.quantiles = nn.Parameter(torch.tensor([4.0]))

    def forward(self, images):
        return Reconstruction(images * self.gain, {"y": 1e4 * self.gain.square()})

    def aux_loss(self):
        return self.bottleneck.quantiles.abs().sum()


def test_quantiles_have_an_optimizer_of_their_own(pictures):
    recipe = Recipe(5, 1e-5, auxiliary_lr=0.1)
    trainer = make_trainer(model=WithQuantiles(), recipe=recipe)
    run(trainer, pictures)
    assert trainer.model.bottleneck.quantiles.item() == pytest.approx(3.5, rel=1e-5)
    assert trainer.model.gain.item() == pytest.approx(0.5, abs=1e-4)
    again = make_trainer(model=WithQuantiles(), recipe=recipe)
    again.load_state_dict(trainer.state_dict())
    assert again.state_dict()["auxiliary"]["state"][0]["step"] == 5
