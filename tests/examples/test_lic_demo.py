"""Evaluation, training and the demo as a whole."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest
import torch
from PIL import Image

from examples.lic import comparison, demo, report
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.comparison import Comparison, Plan, gap_above
from examples.lic.evaluation import Score, evaluate, mean_score, pad_to_multiple, psnr
from examples.lic.images import Photographs, RandomCrops
from examples.lic.training import Recipe, normalize_gradient, rate_distortion, train


@pytest.fixture
def photographs():
    picture = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1).to(torch.uint8)
    return Photographs({"train": picture}, {"held out": picture.flip(-1)})


@pytest.fixture
def plan():
    recipe = Recipe(steps=3, lr=1e-3)
    return Plan([0.01], recipe, recipe, crop=64, batch=1, channels=8, latent_channels=8)


@pytest.mark.parametrize("size", [(64, 64), (1, 63), (65, 130)])
def test_padding_keeps_the_image(size):
    image = torch.rand(1, 3, *size)
    padded = pad_to_multiple(image, 64)
    assert all(side % 64 == 0 for side in padded.shape[-2:])
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    assert torch.equal(padded[..., -1, -1], image[..., -1, -1])


def test_psnr():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image, image + 255) == pytest.approx(0)
    assert psnr(image, image + 1) == pytest.approx(20 * math.log10(255))


def test_evaluation_counts_the_pixels_of_the_image_and_not_of_its_padding():
    model = MeanScaleHyperprior(8, 8)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    edge = image[:, :, -1:].expand(-1, -1, 64)
    scores = evaluate(model, {"whole": torch.cat([image, edge], -1), "part": image[:, :, :]})
    wide = evaluate(model, {"a": torch.cat([image, edge[:, :, :1]], -1)})["a"]
    assert model.training
    assert wide.bpp * 65 == pytest.approx(scores["whole"].bpp * 128, rel=1e-5)
    assert mean_score(scores).bpp == pytest.approx((scores["whole"].bpp + scores["part"].bpp) / 2)


def test_losses_are_rate_and_scaled_error():
    model = MeanScaleHyperprior(8, 8)
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    losses = rate_distortion(model, images, lmbda=0.01)
    output = model(images)
    torch.testing.assert_close(losses["rate"], output.bpp())
    error = (255 * (output.images - images)).square().mean()
    torch.testing.assert_close(losses["distortion"], 0.01 * error)


def test_normalised_gradient_has_norm_one_and_its_direction():
    a, b, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0])
    normalize_gradient([a, b, unused])
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(b.grad, torch.tensor([0.0, -0.8]))


def test_standard_training_lowers_the_loss(photographs):
    torch.manual_seed(0)
    model = MeanScaleHyperprior(8, 8)
    crops = RandomCrops(photographs.train, crop=64, batch=1, seed=0)
    trace = train(model, crops, comparison.EQUAL, Recipe(30, 5e-3), lmbda=0.01, seed=0)
    _, distortion = trace.history.series("loss/distortion")
    assert len(distortion) == len(trace.seconds) == 30
    assert fmean(distortion[-5:]) < 0.6 * fmean(distortion[:5])


def test_runs_of_a_rung_share_start_crops_and_noise(photographs, plan):
    (rung,) = Comparison(photographs, plan)()
    first = {
        tuple(run.trace.history.series(f"loss/{name}")[1][0] for name in ("rate", "distortion"))
        for run in rung.runs.values()
    }
    assert len(first) == 1
    again = Comparison(photographs, plan)()[0]
    assert {name: run.mean for name, run in again.runs.items()} == {
        name: run.mean for name, run in rung.runs.items()
    }


def test_fixed_rivals_carry_the_settled_coefficients(photographs, plan):
    (rung,) = Comparison(photographs, plan)()
    assert report.effective_lambda(0.01, rung.runs["standard"]) == pytest.approx(0.01)
    for rival, (method, part) in comparison.RIVALS.items():
        last = rung.runs[rival].trace.last("coefficient")
        assert sum(last.values()) == pytest.approx(1)
        settled = rung.runs[method].trace.history.series("coefficient/distortion")[1][2]
        expected = part * 0.01 * settled / (1 - settled)  # three steps: the last has settled
        assert report.effective_lambda(0.01, rung.runs[rival]) == pytest.approx(expected, rel=1e-4)


def test_gap_to_a_curve():
    curve = [Score(0.4, 30.0), Score(0.1, 26.0)]
    assert gap_above(Score(0.2, 28.5), curve) == pytest.approx(0.5)
    assert gap_above(Score(0.1, 25.0), curve) == pytest.approx(-1)
    assert gap_above(Score(0.5, 31.0), curve) is None
    assert gap_above(Score(0.05, 31.0), curve) is None


def test_demo_writes_table_figures_and_results(tmp_path, capsys):
    assert demo.main(["--quick", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("standard", "Solution 1", "Solution 2", "bpp", "PSNR", *report.SENTENCE.split()):
        assert word in printed
    for name in ("rate-distortion.png", "weights.png"):
        with Image.open(tmp_path / "out" / name) as figure:
            assert min(figure.size) > 400
        assert str(tmp_path / "out" / name) in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    (rung,) = results["rungs"]
    assert set(rung["runs"]) == {"standard", *comparison.BALANCED, *comparison.RIVALS}
    for run in rung["runs"].values():
        assert set(run["images"]) == {"chelsea", "china", "flower"}


def test_demo_trains_on_a_folder(tmp_path, capsys):
    for index in range(2):
        Image.effect_noise((70, 66), 40 + index).save(tmp_path / f"{index}.png")
    options = ["--quick", "--images", str(tmp_path), "--crop", "64", "--output", str(tmp_path)]
    assert demo.main(options) == 0
    assert "Converted to 8-bit RGB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
        (["--lambdas", "-1"], "should be positive, found -1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--crop", "100"], "should be a multiple of 64, found 100"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, capsys, tmp_path):
    try:
        code = demo.main([*options, "--quick", "--output", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--quick", "--output", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
