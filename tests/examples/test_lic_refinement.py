"""Refinement of latents: the code it returns, what it leaves alone, and the study as a whole."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from examples.lic import evaluation, parts
from examples.lic.bitstream import Coder
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.images import Photographs
from examples.lic.refinement import report, study
from examples.lic.refinement.experiment import loss
from examples.lic.refinement.refine import Latents, Refinement, encode, quantize, refine, score
from examples.lic.refinement.rounding import TWO_CLASS, Gumbel, StraightThrough
from moo_balance import AnalyticQP, BalancedTrajectory

LAMBDA = 0.01


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MeanScaleHyperprior(8, 8).eval()
    with torch.no_grad():
        model.analysis[-1].weight *= 2  # symbols other than 0, as after training
    return model


@pytest.fixture
def image():
    columns = torch.linspace(0, 20, 70).sin()
    return (127 + 100 * columns).expand(3, 66, 70).to(torch.uint8).contiguous()


def refinement(name="SSL", steps=12, **kwargs):
    return Refinement(Gumbel(TWO_CLASS[name]), steps=steps, lr=0.05, **kwargs)


def test_without_steps_the_code_is_that_of_the_codec(model, image):
    sent = refine(model, image, refinement(steps=0), lmbda=LAMBDA)
    plain = evaluation.score(model, image)
    found = score(model, sent, image)
    assert found.bpp == pytest.approx(plain.bpp, rel=1e-4)
    assert found.psnr == pytest.approx(plain.psnr, rel=1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_the_code_is_made_of_integers(model, image, centered):
    sent = refine(model, image, refinement(centered=centered), lmbda=LAMBDA)
    mean, _ = model.predict(sent.z)
    symbols = {"z": sent.z - model.z_median, "y": sent.y - mean if centered else sent.y}
    for latent in symbols.values():
        torch.testing.assert_close(latent, latent.round(), rtol=0, atol=1e-4)


def test_a_refined_code_goes_through_the_bitstream(model, image):
    sent = refine(model, image, refinement(), lmbda=LAMBDA)
    refined = score(model, sent, image)
    plain = Coder(model).encode(image)
    model.analyze = lambda images: (sent.y, sent.z)
    data = Coder(model).encode(image)
    assert data != plain
    assert evaluation.psnr(Coder(model).decode(data), image) == pytest.approx(refined.psnr)


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


def test_the_network_is_left_as_it_was(model, image):
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


def test_every_step_is_looked_at_before_it_is_taken(model, image):
    seen = {}
    start = encode(model, image)

    def look(step: int, latents: Latents) -> None:
        seen[step] = latents.y.detach().clone()

    sent = refine(model, image, refinement(steps=3), lmbda=LAMBDA, on_step=look)
    assert list(seen) == [0, 1, 2, 3]
    assert torch.equal(seen[0], start.y)
    with torch.no_grad():
        mean, _ = model.predict(sent.z)
        torch.testing.assert_close(sent.y, mean + (seen[3] - mean).round())


def test_soft_codes_cost_what_the_codec_says(model, image):
    latents = encode(model, image)
    sent = quantize(model, latents, lambda values: values)
    mean, scale = model.predict(latents.z)
    bits = model.bits(latents.y - mean, scale, latents.z - model.z_median)
    torch.testing.assert_close(sent.bits, bits["y"] + bits["z"])


def test_loss_and_middle():
    assert loss((0.5, math.inf), 0.01) == 0.5
    assert loss((0.5, 20.0), 0.01) == pytest.approx(0.5 + 0.01 * 650.25)
    image = torch.arange(3 * 5 * 6).reshape(3, 5, 6)
    assert torch.equal(parts.middle(image, 2), image[:, 1:3, 2:4])
    assert torch.equal(parts.middle(image, 9), image)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The short study on one small picture, once for all tests that look at it."""
    rows = torch.linspace(0, 30, 128).sin()[:, None]
    picture = (127 + 100 * rows).expand(3, 128, 130).to(torch.uint8).contiguous()
    photographs = Photographs({"train": picture}, {"held out": picture.flip(-2)})
    folder = tmp_path_factory.mktemp("refinement")
    said = []
    found = study.run("short", folder, photographs=photographs, say=said.append)
    assert said
    said.clear()
    assert study.run("short", folder, photographs=photographs, say=said.append) == found
    assert not said  # all was kept
    return json.loads(json.dumps(found))


def test_study_reports_every_group(results):
    text = study.section(results)
    for word in (*TWO_CLASS, "straight-through", "three integers", "τ_max 0.2", "Solution 2"):
        assert word in text
    figures = study.figures(results)
    assert all(figure.axes[0].lines for figure in figures.values())


def test_study_computes_gains_from_its_records(results):
    """A refinement that saves a tenth of the rate everywhere has a BD-rate of −10 %."""
    points = {0.0025: (0.1, 25.0), 0.0067: (0.2, 28.0), 0.018: (0.4, 31.0)}
    part = {"none": 1.0, "straight-through": 1.0, "SGA+": 0.9}
    for record in report.select(results["records"], group="curve"):
        bpp, psnr = points[record["lambda"]]
        record["images"]["held out"]["score"] = [part[record["name"]] * bpp, psnr]
    curves = {name: report.select(results["records"], group="curve", name=name) for name in part}
    (delta,) = report.deltas(curves["SGA+"], curves["none"]).values()
    assert delta.rate == pytest.approx(-10)
    assert "| SGA+, SSL | no refinement | −10.0 % [−10.0, −10.0] |" in study.section(results)


def test_command_line(tmp_path, monkeypatch, capsys, results):
    for index in range(2):
        Image.effect_noise((140, 130), 40 + index).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(study, "run", lambda *arguments, **options: results)
    options = ["--quick", "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    assert parts.main(study, "refinement", "About.", options) == 0
    out = capsys.readouterr().out
    for name in ("results.json", "section.md", "refinement-course.png"):
        assert str(tmp_path / "out" / name) in out
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
        (["--threads", "0"], "should be positive, found 0"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, capsys, tmp_path):
    try:
        code = parts.main(study, "refinement", "", [*options, "--output", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
