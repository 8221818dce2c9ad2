"""Variable rate: the codec it starts as, offsets, the step of z, training at several λ."""

from __future__ import annotations

import math

import pytest
import torch

from examples.lic import hyperprior, variable_rate
from examples.lic.evaluation import evaluate
from examples.lic.log import Recorder
from examples.lic.losses import Levels, RateDistortion, level_name
from examples.lic.streams import Crops, CropStream
from examples.lic.training import Observer, Recipe, Trainer
from examples.lic.variable_rate import (
    HYPER_STEP_FLOOR,
    HyperStep,
    ReconstructionOffset,
    VariableRateCodec,
    apply_offset,
    step_for,
)
from moo_balance import MGDA, BalancedOptimizer, Sum
from tests.support.codecs import random_codec

LAMBDAS = [0.0035, 0.0131, 0.05]


def make_codec(base):
    return VariableRateCodec(base, 0.05, offsets=True, hyper_step=True)


def levels_of(codec, *, noisy=False, one_level=False):
    """The losses of all levels, in the first (noisy) half of a training or in the second."""
    levels = Levels(codec, LAMBDAS, one_level=one_level, seed=0)
    levels.begin_step(0 if noisy else 9, 10)
    return levels


@pytest.fixture
def base():
    return random_codec()


@pytest.fixture
def codec(base):
    """A codec whose small networks have left their starting point."""
    codec = make_codec(base)
    with torch.no_grad():
        for layers in (codec.offset.layers, codec.hyper_step.layers):
            layers[-1].weight.uniform_(-0.5, 0.5)
    return codec


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(2, 3, 64, 128)


def hyper_step_of(bias):
    """One whose network says `bias`, whatever it is asked."""
    hyper_step = HyperStep()
    with torch.no_grad():
        hyper_step.layers[-1].bias.fill_(bias)
    return hyper_step


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("lmbda", "gain"), [(0.0018, 0.1), (0.0035, 0.13944), (0.0483, 0.51801), (0.18, 1.0)]
)
def test_gains_are_the_published_ones(lmbda, gain):
    assert 1 / step_for(lmbda, 0.18) == pytest.approx(gain, abs=5e-6)


@pytest.mark.parametrize("lmbda", [0.0, -1.0, math.inf, math.nan])
def test_a_lambda_that_has_no_step_is_refused(lmbda):
    with pytest.raises(ValueError, match=r"`lmbda` should be positive and finite\. Found "):
        step_for(lmbda, 0.18)


# ------------------------------------------------------------------ the small networks


def test_sizes_are_the_published_ones():
    count = {
        type(m): sum(p.numel() for p in m.parameters())
        for m in (ReconstructionOffset(), HyperStep())
    }
    assert count == {ReconstructionOffset: 205, HyperStep: 141}


def test_offset_is_minus_the_network_of_scale_and_gain(codec):
    scale = torch.rand(2, 3, 4, 5) + 0.11
    offset = codec.offset(scale, 0.25)
    assert offset.shape == scale.shape
    inputs = torch.tensor([scale[1, 2, 3, 4], 0.25])
    torch.testing.assert_close(offset[1, 2, 3, 4], -codec.offset.layers(inputs)[0])


def test_an_offset_moves_symbols_away_from_zero():
    symbols = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    offset = torch.tensor([-0.1, -0.2, -0.3, -0.4, 0.25])
    expected = torch.tensor([-1.9, -0.8, 0.0, 0.6, 3.25])
    torch.testing.assert_close(apply_offset(symbols, offset), expected)


@pytest.mark.parametrize(
    ("bias", "step"), [(math.log(math.e - 1), 1.0), (0.0, math.log(2)), (-9.0, 0.5), (3.0, 3.04859)]
)
def test_hyper_step_is_a_softplus_with_a_floor(bias, step):
    assert hyper_step_of(bias)(2.5).item() == pytest.approx(step, abs=1e-5)


def test_hyper_step_at_its_floor_can_grow_again():
    hyper_step = hyper_step_of(-9.0)
    (-hyper_step(1.0)).backward()
    assert hyper_step(1.0) == HYPER_STEP_FLOOR
    assert hyper_step.layers[-1].bias.grad < 0


# ------------------------------------------------------------------ the codec


@pytest.mark.parametrize("training", [True, False])
def test_at_step_one_it_starts_as_the_fixed_rate_codec(base, images, training, monkeypatch):
    """In training, where the decoder sees noise, with the noise in the same places."""
    monkeypatch.setattr(hyperprior, "add_noise", noise := lambda v, width=1.0: v + 0.3 * width)
    monkeypatch.setattr(variable_rate, "add_noise", noise)
    codec = make_codec(base)
    codec.train(training)
    expected = base(images)
    output = codec.code(*base.analyze(images), codec.at(0.05).y_step, noisy_decoder=training)
    torch.testing.assert_close(output.images, expected.images)
    torch.testing.assert_close(output.bits, expected.bits)


def test_a_pass_at_a_step_is_the_papers_formula(codec, images):
    step, base = 0.25, codec.base
    codec.eval()
    output = codec(images, step)
    y, z = base.analyze(images)
    width = codec.hyper_step(step)
    mean, scale = base.predict(base.medians + width * ((z - base.medians) / width).round())
    symbols, scale = ((y - mean) / step).round(), (scale / step).clamp(min=0.11)
    moved = symbols + symbols.sign() * codec.offset(scale, 1 / step)
    torch.testing.assert_close(output.images, base.synthesize(mean + moved * step))
    normal = torch.distributions.Normal(0.0, scale)
    mass = normal.cdf(symbols + 0.5) - normal.cdf(symbols - 0.5)
    torch.testing.assert_close(output.bits["y"], -mass.log2().sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("step", [0.5, 3.0])
def test_what_the_decoder_sees_in_each_stage(base, images, step, monkeypatch):
    codec = VariableRateCodec(base, 0.05, offsets=False, hyper_step=False)
    y, z = base.analyze(images)
    seen = []
    monkeypatch.setattr(base, "predict", lambda z: (torch.zeros_like(y), torch.ones_like(y)))
    monkeypatch.setattr(base, "synthesize", lambda y: seen.append(y) or images)
    codec.code(y, z, step, noisy_decoder=True)
    codec.code(y, z, step, noisy_decoder=False)
    noise = (seen[0] - y) / step
    assert noise.abs().max() <= 0.5001
    assert noise.std().item() == pytest.approx(12**-0.5, rel=0.1)
    torch.testing.assert_close(seen[1], step * (y / step).round())


def test_offsets_do_not_move_zeros(codec, images):
    plain = VariableRateCodec(codec.base, 0.05, offsets=False, hyper_step=True).eval()
    plain.hyper_step = codec.hyper_step
    codec.eval()
    torch.testing.assert_close(codec(images, 1e4).images, plain(images, 1e4).images)
    assert not torch.equal(codec(images, 0.1).images, plain(images, 0.1).images)


@pytest.mark.parametrize("width", [0.5, 1.0, 2.7])
def test_z_is_coded_in_intervals_of_its_step(base, width, monkeypatch):
    """Rounded to multiples of the step around the median, at the mass of the interval."""
    codec = VariableRateCodec(base, 0.05, offsets=False, hyper_step=False).eval()
    seen = []
    monkeypatch.setattr(codec, "z_step", lambda step: torch.tensor(width))
    monkeypatch.setattr(base, "predict", lambda z: seen.append(z) or (y, torch.ones_like(y)))
    y = torch.zeros(1, 8, 4, 4)
    with torch.no_grad():
        base.entropy_bottleneck.quantiles[:, 0, 1] = 0.3
        bits = torch.stack([
            codec.code(y, torch.full((1, 8, 1, 1), 0.3 + width * (k + 0.2)), 1.0).bits["z"]
            for k in range(-2, 3)
        ])  # fmt: skip
        expected = -codec.at(0.05).z_probabilities(2).log2().sum(0)
        ends = torch.tensor([0.3 - width / 2, 0.3 + width / 2]).expand(8, 1, 2)
        middle = base.entropy_bottleneck._logits(ends).sigmoid().diff()
    torch.testing.assert_close(seen[3], torch.full((1, 8, 1, 1), 0.3 + width))
    torch.testing.assert_close(bits, expected)
    torch.testing.assert_close(bits[2], -middle.log2().sum())


@pytest.mark.parametrize("width", [0.5, 2.7])
def test_noise_on_z_fills_an_interval_of_the_steps_width(base, width, monkeypatch):
    codec = VariableRateCodec(base, 0.05, offsets=False, hyper_step=False)
    seen, y = [], torch.zeros(64, 8, 4, 4)
    monkeypatch.setattr(codec, "z_step", lambda step: torch.tensor(width))
    monkeypatch.setattr(base, "predict", lambda z: seen.append(z) or (y, torch.ones_like(y)))
    codec.code(y, torch.zeros(64, 8, 8, 8), 1.0)
    assert seen[0].abs().max().item() == pytest.approx(width / 2, rel=1e-3)
    assert seen[0].std().item() == pytest.approx(width / 12**0.5, rel=2e-2)


@pytest.mark.parametrize("noisy_decoder", [True, False])
def test_gradient_reaches_every_part_that_is_in_use(codec, images, noisy_decoder):
    losses = levels_of(codec, noisy=noisy_decoder)(images)
    sum(losses.values()).backward()
    reached = {
        name
        for name, p in codec.named_parameters()
        if p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0
    }
    offset = {name for name, _ in codec.named_parameters() if name.startswith("offset.")}
    every = {name for name, _ in codec.named_parameters() if not name.endswith("quantiles")}
    assert reached == (every - offset if noisy_decoder else every)


def test_autocast_leaves_the_steps_in_full_precision(codec, images):
    with torch.autocast("cpu", torch.bfloat16):
        step = codec.z_step(3.0)
        output = codec(images, 3.0)
    assert step == codec.z_step(3.0)
    assert {output.images.dtype, output.bits["y"].dtype} == {torch.float32}


def test_larger_steps_take_fewer_bits(codec, images):
    codec.eval()
    bits = [codec.at(lmbda)(images).bpp().item() for lmbda in (0.05, 0.02, 0.008, 0.003)]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) == 4


def test_evaluation_takes_it_for_any_codec(codec):
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    score = evaluate(codec.at(0.01), {"image": image})["image"]
    assert score == evaluate(codec.at(0.01), {"image": image})["image"]
    assert score.bpp > 0
    assert codec.training


# ------------------------------------------------------------------ training


def test_each_level_has_the_loss_of_the_codec_at_its_step(base, images):
    losses = levels_of(make_codec(base.eval()).eval())(images)
    assert list(losses) == ["λ=0.0035", "λ=0.0131", "λ=0.05"]
    fixed_rate = RateDistortion(base, 0.05)(images)
    torch.testing.assert_close(losses["λ=0.05"], fixed_rate["rate"] + fixed_rate["distortion"])


def run(codec, weighting, recipe, *, one_level=False):
    picture = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1).to(torch.uint8)
    crops = CropStream(Crops([picture], crop=64, seed=0), batch=1)
    record = Recorder()
    objective = Levels(codec, LAMBDAS, one_level=one_level, seed=0)
    Trainer(objective, weighting, recipe, seed=0).run(crops, [record])
    return record.history


@pytest.mark.parametrize("weighting", [Sum(), MGDA()])
def test_training_lowers_the_loss_of_every_level(codec, weighting):
    history = run(codec, weighting, Recipe(30, 5e-3, clip="unit"))
    for lmbda in LAMBDAS:
        _, losses = history.series(f"loss/{level_name(lmbda)}")
        assert len(losses) == 30
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_offsets_are_trained_only_in_the_second_half(codec):
    before = codec.offset.layers[0].weight.clone()
    levels = Levels(codec, LAMBDAS, one_level=False, seed=0)
    trainer = Trainer(levels, Sum(), Recipe(4, 1e-3), seed=0)
    seen = []

    class Watch(Observer):
        def after(self, trainer):
            seen.append(torch.equal(before, codec.offset.layers[0].weight))

    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    trainer.run(CropStream(Crops([picture], crop=64, seed=0), batch=1), [Watch()])
    assert seen == [True, True, False, False]


def test_mgda_writes_the_min_norm_point_over_all_parameters(codec, images):
    """It is no longer than any convex combination, and at odds with no gradient."""
    parameters = [p for name, p in codec.named_parameters() if not name.endswith("quantiles")]
    optimizer = BalancedOptimizer(torch.optim.Adam(parameters), MGDA())
    losses = levels_of(codec)(images)
    rows = []
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    optimizer.backward(losses)
    combined = torch.cat([p.grad.flatten() for p in parameters])
    assert (torch.stack(rows) @ combined >= combined.square().sum() * (1 - 1e-3)).all()


def test_one_random_level_in_each_step(codec):
    history = run(codec, Sum(), Recipe(12, 1e-3), one_level=True)
    steps = [history.series(f"loss/{level_name(lmbda)}")[0] for lmbda in LAMBDAS]
    assert sorted(index for level in steps for index in level) == list(range(12))
    assert all(steps)
