"""The codec: entropy models that are probabilities, GDN as published, gradients that arrive."""

from __future__ import annotations

import pytest
import torch

from examples.lic.hyperprior import (
    GDN1,
    LIKELIHOOD_FLOOR,
    MeanScaleHyperprior,
    gaussian_likelihood,
    logistic_likelihood,
    lower_bound,
)

LIKELIHOODS = [gaussian_likelihood, logistic_likelihood]


@pytest.fixture
def model():
    return MeanScaleHyperprior(channels=8, latent_channels=8)


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 128)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("scale", [0.11, 1.0, 30.0])
def test_likelihood_is_a_probability_of_integers(likelihood, scale):
    symbols = torch.arange(-1000.0, 1001.0, dtype=torch.float64)
    probability = likelihood(symbols, torch.full_like(symbols, scale))
    assert ((probability > 0) & (probability <= 1)).all()
    floors = LIKELIHOOD_FLOOR * len(symbols)
    assert probability.sum().item() == pytest.approx(1, abs=2 * floors)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_likelihood_is_largest_at_the_centre_and_even(likelihood):
    symbols = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    probability = likelihood(symbols, torch.ones(5))
    assert probability.argmax() == 2
    torch.testing.assert_close(probability, probability.flip(0))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("centered", [0.0, 0.3, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_likelihood_has_finite_gradients(likelihood, centered, scale):
    arguments = [torch.tensor(v, requires_grad=True) for v in (centered, scale)]
    bits = -likelihood(*arguments).log2()
    assert torch.isfinite(torch.stack(torch.autograd.grad(bits, arguments))).all()


def test_gaussian_likelihood_is_the_integral_of_the_density():
    normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(0.7))
    value = torch.tensor([-1.2, 0.0, 0.4])
    expected = normal.cdf(value + 0.5) - normal.cdf(value - 0.5)
    torch.testing.assert_close(gaussian_likelihood(value, torch.full((3,), 0.7)), expected)


@pytest.mark.parametrize(
    ("value", "slope", "passed"), [(0.5, 1.0, 0.0), (0.5, -1.0, -1.0), (2.0, 1.0, 1.0)]
)
def test_lower_bound_passes_gradients_that_raise_a_clipped_value(value, slope, passed):
    x = torch.tensor(value, requires_grad=True)
    bounded = lower_bound(x, 1.0)
    (slope * bounded).backward()
    assert bounded.item() == max(value, 1.0)
    assert x.grad.item() == passed


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_the_published_formula(inverse):
    layer = GDN1(3, inverse=inverse)
    with torch.no_grad():
        layer.beta.uniform_(0.5, 2)
        layer.gamma.uniform_(0, 1)
    x = torch.randn(2, 3, 4, 5)
    norm = layer.beta[:, None, None] + torch.einsum("ij,bjhw->bihw", layer.gamma, x.abs())
    torch.testing.assert_close(layer(x), x * norm if inverse else x / norm)


def test_gdn_stays_finite_with_negative_parameters():
    layer = GDN1(2)
    with torch.no_grad():
        layer.beta.fill_(-1)
        layer.gamma.fill_(-1)
    assert torch.isfinite(layer(torch.randn(1, 2, 3, 3))).all()


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
    hyper = {"hyper_analysis", "hyper_synthesis", "z_median", "z_log_scale"}
    assert reached == {"rate": {"analysis"} | hyper, "distortion": {"analysis", "synthesis"}}


def test_signals_keep_their_scale_at_initialisation(images):
    latent = MeanScaleHyperprior().analysis(images - 0.5)
    assert 0.05 < latent.std() < 1
