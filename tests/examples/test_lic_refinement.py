"""Refinement of latents: the code it returns, and what it does not change."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lic.roundings import TWO_CLASS, StraightThrough
from benchmarks.lic.scores import rate_distortion_loss as loss
from examples.lic import evaluation
from examples.lic.bitstream import Coder
from examples.lic.refinement import Latents, Refinement, encode, quantize, refine, score
from examples.lic.rounding import Gumbel
from examples.lic.variable_rate import VariableRateCodec
from moo_balance import AnalyticQP, BalancedTrajectory
from tests.support.codecs import random_codec

LAMBDA = 0.01


@pytest.fixture
def model():
    return random_codec().eval()


@pytest.fixture(params=["one step", "variable rate"])
def codec(model, request):
    if request.param == "one step":
        return model
    variable = VariableRateCodec(model, 0.05, offsets=True, hyper_step=True).eval()
    with torch.no_grad():
        for layers in (variable.offset.layers, variable.hyper_step.layers):
            layers[-1].weight.uniform_(-0.1, 0.1)
    return variable.at(0.01)


@pytest.fixture
def image():
    columns = torch.linspace(0, 20, 70).sin()
    return (127 + 100 * columns).expand(3, 66, 70).to(torch.uint8).contiguous()


def refinement(name="SSL", steps=12, **kwargs):
    return Refinement(Gumbel(TWO_CLASS[name]), steps=steps, lr=0.05, **kwargs)


def test_without_steps_the_code_is_that_of_the_codec(codec, image):
    sent = refine(codec, image, refinement(steps=0), lmbda=LAMBDA)
    plain = evaluation.evaluate(codec, {"image": image})["image"]
    result = score(codec, sent, image)
    assert result.bpp == pytest.approx(plain.bpp, rel=1e-4)
    assert result.psnr == pytest.approx(plain.psnr, rel=1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_the_code_is_made_of_integers(model, image, centered):
    sent = refine(model, image, refinement(centered=centered), lmbda=LAMBDA)
    for latent in (sent.z, sent.y if centered else sent.y + sent.mean):
        torch.testing.assert_close(latent, latent.round(), rtol=0, atol=1e-4)


def test_a_refined_code_goes_through_the_bitstream(codec, image):
    sent = refine(codec, image, refinement(), lmbda=LAMBDA)
    refined = score(codec, sent, image)
    data = Coder(codec).encode(image, sent.symbols)
    assert data != Coder(codec).encode(image)
    assert evaluation.psnr(Coder(codec).decode(data), image) == refined.psnr
    assert 8 * len(data) == pytest.approx(sent.bits.item(), rel=0.05, abs=300)


@pytest.mark.parametrize(
    "how",
    [
        refinement("atanh"),
        refinement("linear"),
        refinement("cosine"),
        refinement("SSL"),
        refinement("SSL", centered=False),
        refinement(weighting=AnalyticQP()),
        refinement(weighting=BalancedTrajectory()),
        Refinement(StraightThrough(), steps=12, lr=0.05),
    ],
    ids=lambda how: f"{how.relaxation} {how.weighting}"[:60],
)
def test_refinement_lowers_the_loss_it_was_given(model, image, how):
    before = refine(model, image, Refinement(how.relaxation, 0, centered=how.centered), lmbda=1)
    after = refine(model, image, how, lmbda=1)
    assert loss(score(model, after, image), 1) < loss(score(model, before, image), 1)


def test_lambda_moves_along_the_curve(model, image):
    low, high = (
        score(model, refine(model, image, refinement(steps=40), lmbda=lmbda), image)
        for lmbda in (1e-6, 1e-2)
    )
    assert low.bpp < high.bpp
    assert low.psnr < high.psnr


def test_the_network_is_not_changed(model, image):
    model.train()
    next(model.parameters()).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    refine(model, image, refinement(), lmbda=LAMBDA)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_refinement_follows_its_seed(model, image):
    codes = [refine(model, image, refinement(), lmbda=LAMBDA, seed=seed).y for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_the_callback_sees_the_latents_before_each_step(model, image):
    seen = {}
    start = encode(model, image)

    def keep(step: int, latents: Latents) -> None:
        seen[step] = latents.y.detach().clone()

    sent = refine(model, image, refinement(steps=3), lmbda=LAMBDA, on_step=keep)
    assert list(seen) == [0, 1, 2, 3]
    assert torch.equal(seen[0], start.y)
    torch.testing.assert_close(sent.y, (seen[3] - sent.mean).round())


def test_soft_codes_cost_what_the_codec_says(model, image):
    latents = encode(model, image)
    sent = quantize(model, latents, lambda values: values)
    mean, scale = model.predict(latents.z)
    bits = model.bits(latents.y - mean, scale, latents.z)
    torch.testing.assert_close(sent.bits, bits["y"] + bits["z"])


def test_a_step_is_as_long_in_units_of_symbols_at_every_rate(codec, image):
    seen = []
    keep = lambda step, latents: seen.append([x.detach().clone() for x in latents])  # noqa: E731
    refine(codec, image, refinement(steps=1), lmbda=LAMBDA, on_step=keep)
    for before, after, step in zip(*seen, (codec.y_step, codec.z_step), strict=True):
        longest = (after - before).abs().max() / step
        torch.testing.assert_close(longest, torch.tensor(0.05), rtol=1e-2, atol=0.0)
