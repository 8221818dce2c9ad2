"""The hyperpriors: CompressAI's numbers, probabilities that are probabilities, gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.lic import hyperprior
from examples.lic.architectures import HYPERPRIORS
from examples.lic.entropy_bottleneck import (
    LIKELIHOOD_FLOOR,
    TAIL_MASS,
    EntropyBottleneck,
    GaussianConditional,
)
from examples.lic.gdn import GDN, LowerBound
from examples.lic.hyperprior import MeanScaleHyperprior

GOLDEN = json.loads(Path(__file__).with_name("compressai_golden.json").read_text(encoding="utf-8"))
"""Of CompressAI 1.2.8: shapes at the published widths, and results with the parameters below."""


def set_golden_parameters(model):
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        count = torch.arange(parameter.numel(), dtype=torch.float64)
        wave = torch.sin(0.7 * count + number).view(parameter.shape)
        if name.endswith("quantiles"):
            wave = torch.tensor([-5.0, 0.0, 5.0]) + wave
        elif name.endswith(("beta", "gamma")):
            wave = 0.3 + 0.3 * wave  # some at their floors
        elif parameter.dim() == 4:
            wave *= (1 if name.startswith("g_s") else 2) * parameter[0].numel() ** -0.5
        with torch.no_grad():
            parameter.copy_(wave)
    return model.double()


def golden_image():
    index = torch.arange(3 * 64 * 128, dtype=torch.float64).view(1, 3, 64, 128)
    return 0.5 + 0.5 * torch.sin(0.01 * index) * torch.sin(0.3 * index)


@pytest.fixture(params=HYPERPRIORS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return HYPERPRIORS[name](8, 8)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(2, 3, 64, 128)


# ------------------------------------------------------------------ CompressAI


def test_parameters_and_buffers_are_compressais(name):
    model = HYPERPRIORS[name](128, 192)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == GOLDEN[name]["shapes"]
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[name]["parameters"]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_results_are_compressais(name, mode, monkeypatch):
    """Bits, images, and how far their gradients reach; with the same noise in training."""
    golden = GOLDEN[name][mode]
    model = set_golden_parameters(HYPERPRIORS[name](5, 7)).train(mode == "training")
    noise = lambda values: values + 0.4 * torch.sin(13 * values.detach())  # noqa: E731
    monkeypatch.setattr(hyperprior, "add_noise", noise)
    output = model(golden_image())
    energy = output.images.square().mean()
    assert {k: v.item() for k, v in output.bits.items()} == pytest.approx(
        {"y": golden["y"], "z": golden["z"]}, rel=1e-7
    )
    assert output.images[0, :, 10, 20].tolist() == pytest.approx(golden["pixel"], rel=1e-7)
    assert energy.item() == pytest.approx(golden["mean square"], rel=1e-7)
    (1e-3 * sum(output.bits.values()) + energy).backward()
    for part, norm in golden.get("gradient norms", {}).items():
        gradients = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(norm, rel=1e-6)


def test_auxiliary_loss_is_compressais(name):
    model = set_golden_parameters(HYPERPRIORS[name](5, 7))
    assert model.aux_loss().item() == pytest.approx(GOLDEN[name]["aux_loss"], rel=1e-7)
    model.aux_loss().backward()
    assert [key for key, p in model.named_parameters() if p.grad is not None] == [
        "entropy_bottleneck.quantiles"
    ]


def test_a_checkpoint_of_compressai_is_loaded(model, images):
    """Of an older version, and with the tables of its coder, which are left out."""
    state = {
        key.replace("matrices.", "_matrix")
        .replace("biases.", "_bias")
        .replace("factors.", "_factor"): value
        for key, value in model.state_dict().items()
    }
    state["entropy_bottleneck._quantized_cdf"] = torch.ones(8, 30, dtype=torch.int32)
    state["gaussian_conditional.scale_table"] = torch.ones(64)
    assert "entropy_bottleneck._matrix4" in state
    loaded = type(model)(8, 8)
    loaded.load_state_dict(state)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(loaded.eval()(images).images, model.eval()(images).images)


# ------------------------------------------------------------------ entropy models


@pytest.mark.parametrize("scale", [0.11, 1.0, 30.0])
def test_gaussian_likelihood_is_a_probability_of_integers(scale):
    symbols = torch.arange(-1000.0, 1001.0, dtype=torch.float64)
    probability = GaussianConditional()(symbols, torch.full_like(symbols, scale))
    assert ((probability > 0) & (probability <= 1)).all()
    assert probability.sum().item() == pytest.approx(1, abs=2 * LIKELIHOOD_FLOOR * len(symbols))
    torch.testing.assert_close(probability, probability.flip(0))


def test_gaussian_likelihood_keeps_its_digits_in_the_tails():
    """Of a unit Gaussian from 4.5 to 5.5, in float32, on both sides."""
    mass = GaussianConditional()(torch.tensor([-5.0, 5.0]), torch.ones(2))
    assert mass.tolist() == pytest.approx([3.3786911e-6] * 2, rel=1e-5)


@pytest.mark.parametrize("centered", [0.0, 0.3, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_gaussian_likelihood_has_finite_gradients(centered, scale):
    arguments = [torch.tensor([v], requires_grad=True) for v in (centered, scale)]
    bits = -GaussianConditional()(*arguments).log2()
    assert torch.isfinite(torch.stack(torch.autograd.grad(bits, arguments))).all()


def random_bottleneck(channels=3):
    torch.manual_seed(0)
    bottleneck = EntropyBottleneck(channels)
    with torch.no_grad():
        for parameter in (*bottleneck.factors, *bottleneck.biases):
            parameter.uniform_(-1, 1)
        bottleneck.matrices[0] += 2  # narrower than a fresh one
        bottleneck.quantiles[:, 0, 1] = torch.linspace(-2, 3, channels)
    return bottleneck


@pytest.mark.parametrize("step", [0.5, 1.0, 2.7])
def test_a_bottleneck_has_probabilities_that_sum_to_one(step):
    bottleneck = random_bottleneck().double()
    probabilities = bottleneck.probabilities(100, step)
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3).double(), rtol=0, atol=1e-9)
    likelihood = bottleneck(bottleneck.medians + step * torch.full((1, 3, 1, 1), -2.0), step)
    torch.testing.assert_close(likelihood.flatten(), probabilities[:, 98])


def test_a_bottlenecks_channels_have_distributions_of_their_own():
    """The likelihood of each position is the table's entry for its channel."""
    bottleneck = random_bottleneck()
    symbols = torch.tensor([[-2, 0, 1], [3, -4, 0]]).view(2, 3, 1, 1).expand(2, 3, 4, 5)
    table = bottleneck.probabilities(4)
    expected = table.gather(1, symbols[:, :, 0, 0].T + 4).T[:, :, None, None].expand(2, 3, 4, 5)
    likelihood = bottleneck(bottleneck.medians + symbols)
    torch.testing.assert_close(likelihood, expected, rtol=1e-4, atol=1e-7)


def test_a_bottleneck_keeps_its_digits_in_both_tails():
    """Its distribution function is near 1 in one of them, where float32 has no digits left."""
    bottleneck = random_bottleneck()
    single, double = (b.probabilities(25) for b in (bottleneck, random_bottleneck().double()))
    assert double.min() < 1e-7
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0)


def test_quantiles_are_fitted_to_the_distribution():
    bottleneck = random_bottleneck()
    optimizer = torch.optim.Adam([bottleneck.quantiles], lr=0.1)
    for step in range(600):
        if step == 400:
            optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        bottleneck.loss().backward()
        optimizer.step()
    masses = torch.sigmoid(bottleneck.double()._logits(bottleneck.quantiles)[:, 0])
    expected = torch.tensor([TAIL_MASS / 2, 0.5, 1 - TAIL_MASS / 2]).double().expand(3, 3)
    torch.testing.assert_close(masses, expected, rtol=0.1, atol=0)


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("value", "slope", "passed"), [(0.5, 1.0, 0.0), (0.5, -1.0, -1.0), (2.0, 1.0, 1.0)]
)
def test_lower_bound_passes_gradients_that_raise_a_clipped_value(value, slope, passed):
    x = torch.tensor(value, requires_grad=True)
    bounded = LowerBound(1.0)(x)
    (slope * bounded).backward()
    assert bounded.item() == max(value, 1.0)
    assert x.grad.item() == passed


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_the_published_formula(inverse):
    layer, beta, gamma = GDN(3, inverse=inverse), torch.rand(3) + 0.5, torch.rand(3, 3)
    with torch.no_grad():
        layer.beta.copy_(layer.beta_reparam.invert(beta))
        layer.gamma.copy_(layer.gamma_reparam.invert(gamma))
    x = torch.randn(2, 3, 4, 5)
    norm = (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x**2)).sqrt()
    torch.testing.assert_close(layer(x), x * norm if inverse else x / norm)


def test_gdn_stays_finite_with_negative_parameters():
    layer = GDN(2)
    with torch.no_grad():
        layer.beta.fill_(-1)
        layer.gamma.fill_(-1)
    assert torch.isfinite(layer(torch.randn(1, 2, 3, 3))).all()


# ------------------------------------------------------------------ the codec


def test_reconstruction_has_the_shape_of_the_images_and_positive_bits(model, images):
    output = model(images)
    assert output.images.shape == images.shape
    assert set(output.bits) == {"y", "z"}
    assert all(bits > 0 for bits in output.bits.values())
    expected = (output.bits["y"] + output.bits["z"]) / (2 * 64 * 128)
    torch.testing.assert_close(output.bpp(), expected)


def test_evaluation_is_deterministic_and_training_is_noisy(model, images):
    assert model(images).bpp() != model(images).bpp()
    model.eval()
    assert model(images).bpp() == model(images).bpp()


def test_rate_trains_analysis_and_hyperprior_and_distortion_the_transforms(model, images):
    reached = {}
    for loss in ("rate", "distortion"):
        model.zero_grad()
        output = model(images)
        (output.bpp() if loss == "rate" else (output.images - images).square().mean()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        reached[loss] = {
            name.split(".")[0]
            for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
    rate = {"g_a", "h_a", "h_s", "entropy_bottleneck"}
    assert reached == {"rate": rate, "distortion": {"g_a", "g_s"}}


def test_autocast_leaves_the_entropy_models_in_full_precision(images):
    torch.manual_seed(0)
    model = MeanScaleHyperprior(8, 8)
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(model(images))
    assert {outputs[1].images.dtype, outputs[1].bits["z"].dtype} == {torch.float32}
    torch.testing.assert_close(outputs[1].bits, outputs[0].bits, rtol=1e-2, atol=0)
    outputs[1].bpp().backward()
    assert model.g_a[0].weight.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = model.z_probabilities(5)
    assert torch.equal(probabilities, model.z_probabilities(5))
