"""Scores of images, and the evaluate command: true sizes, MS-SSIM, curves and their comparison."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from PIL import Image

from benchmarks.lic.scores import crop_center, rate_distortion_loss
from examples.lic import anchors, bitstream
from examples.lic.__main__ import main
from examples.lic.architectures import build
from examples.lic.bd import compare
from examples.lic.checkpoint import save
from examples.lic.curves import Point, compare_curves, table
from examples.lic.evaluation import (
    Measurement,
    Score,
    evaluate,
    mean_score,
    pad_to_multiple,
    psnr,
    structural_similarity,
)
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.images import read_image
from tests.support.commands import check_refusal


@pytest.mark.parametrize("size", [(64, 64), (1, 63), (65, 130)])
def test_padding_keeps_the_image(size):
    image = torch.rand(1, 3, *size)
    padded = pad_to_multiple(image, 64)
    assert all(side % 64 == 0 for side in padded.shape[-2:])
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    assert torch.equal(padded[..., -1, -1], image[..., -1, -1])


def test_the_center_of_an_image():
    image = torch.arange(3 * 5 * 6).reshape(3, 5, 6)
    assert torch.equal(crop_center(image, 2), image[:, 1:3, 2:4])
    assert torch.equal(crop_center(image, 9), image)


def test_psnr_and_the_loss_it_stands_for():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image, image + 255) == pytest.approx(0)
    assert psnr(image, image + 1) == pytest.approx(20 * math.log10(255))
    assert rate_distortion_loss(Score(0.5, math.inf), 0.01) == 0.5
    assert rate_distortion_loss(Score(0.5, psnr(image, image + 5)), 0.01) == pytest.approx(0.75)


def test_evaluation_counts_the_pixels_of_the_image_and_not_of_its_padding():
    model = MeanScaleHyperprior(8, 8)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    edge = image[:, :, -1:].expand(-1, -1, 64)
    scores = evaluate(model, {"whole": torch.cat([image, edge], -1), "part": image[:, :, :]})
    wide = evaluate(model, {"a": torch.cat([image, edge[:, :, :1]], -1)})["a"]
    assert model.training
    assert wide.bpp * 65 == pytest.approx(scores["whole"].bpp * 128, rel=1e-5)
    assert mean_score(scores).bpp == pytest.approx((scores["whole"].bpp + scores["part"].bpp) / 2)


def test_ms_ssim_of_a_picture_with_itself_and_with_noise():
    picture = torch.randint(0, 256, (3, 161, 170), dtype=torch.uint8)
    assert structural_similarity(picture, picture) == pytest.approx(1)
    assert structural_similarity(picture, picture.flip(-1)) < 0.5
    assert structural_similarity(picture[:, :160], picture[:, :160]) is None


TINY = "mbt2018-mean:8,8"


@pytest.fixture
def runs(tmp_path):
    """Three folders of checkpoints with random weights, one of them of a variable-rate codec."""
    for seed, (curve, arch, lambdas) in enumerate(
        [("standard", TINY, [0.02]), ("solution1", TINY, [0.01]),
         ("variable", f"variable-rate:{TINY}", [0.01, 0.05])]
    ):  # fmt: skip
        torch.manual_seed(seed)
        run = {"arch": arch, "lambdas": lambdas, "steps": 9}
        model = build(arch, highest=0.05).state_dict()
        save(tmp_path / curve / "codec.pt", {"run": run, "taken": 9 - seed % 2, "model": model})
    return tmp_path


def photos(folder, sizes):
    folder.mkdir()
    for name, size in sizes.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{name}.png")
    return folder


def run(runs, *more):
    folders = [str(runs / curve) for curve in ("standard", "solution1", "variable")]
    return main(["evaluate", *folders, "--output", str(runs / "out"), *more])


def test_files_are_written_read_and_decoded(runs, capsys):
    images = photos(runs / "kodak", {"small": (70, 90), "large": (200, 170)})
    Image.new("RGBA", (64, 64)).save(images / "clear.png")
    assert run(runs, "--images", str(images)) == 0
    printed, told = capsys.readouterr()
    assert "Decoded bit by bit as the codec reconstructs it: 12 of 12." in printed
    assert "without clear.png, small.png: it needs sides of 161 pixels" in printed
    assert f"{runs}/solution1/codec.pt is at step 8 of 9." in told
    assert "standard/codec.pt is" not in told
    results = json.loads((runs / "out" / "results.json").read_text(encoding="utf-8"))
    points = [(Path(p["curve"]).name, p["setting"]) for p in results["points"]]
    assert points == [("standard", 0.02), ("solution1", 0.01), ("variable", 0.01),
                      ("variable", 0.05)]  # fmt: skip
    for point in results["points"]:
        curve = quote(point["curve"], safe="")
        folder = runs / "out" / "files" / curve / f"codec.pt-{point['setting']}"
        for name, values in point["images"].items():
            assert values["size"] == (folder / f"{name}.bin").stat().st_size
            assert values["exact"]
        small = point["images"]["small.png"]
        assert small["bpp"] == 8 * small["size"] / (70 * 90)
        assert point["images"]["small.png"]["ms_ssim"] is None
        assert point["images"]["large.png"]["ms_ssim"] is not None
    with Image.open(runs / "out" / "rate-distortion.png") as figure:
        assert min(figure.size) > 400


def test_a_quick_run_codes_a_part_of_one_photograph_and_says_why_nothing_is_compared(runs, capsys):
    assert run(runs, "--quick", "--anchor", str(runs / "standard")) == 0
    printed = capsys.readouterr().out
    assert "4 of 4" in printed
    # Two points make no curve; that is said and not hidden.
    assert (
        f"solution1 against {runs}/standard: no BD-rate. The test should have at least 3" in printed
    )


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("standard", ["--images", "nowhere"], "error: nowhere is not a folder."),
        ("standard", ["--images", "{runs}/kodak"], "b.png cannot be read"),
        ("standard", ["--anchor", "famo"], "standard, the folders of the checkpoints. Found famo"),
        ("nowhere.pt", [], "nowhere.pt. `python -m examples.lic train` makes one."),
        ("kodak", [], "kodak holds no codecs (*.pt, *.safetensors)"),
        ("kodak/b.png", [], "b.png should be a checkpoint"),
    ],
)
def test_bad_input_ends_with_a_sentence_before_anything_is_coded(
    path, options, message, runs, capsys
):
    whole = (photos(runs / "kodak", {"a": (64, 64)}) / "a.png").read_bytes()
    (runs / "kodak" / "b.png").write_bytes(whole[:2000])  # its header is good
    options = [option.format(runs=runs) for option in options]
    assert main(["evaluate", str(runs / path), "--output", str(runs / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (runs / "out").exists()


def test_formats_are_anchors_by_the_sizes_of_their_files(runs, capsys):
    images = photos(runs / "kodak", {"large": (200, 170)})
    more = ["--images", str(images), "--anchor", "jpeg", "webp", str(runs / "standard")]
    assert run(runs, *more) == 0
    printed = capsys.readouterr().out
    assert "4 of 4." in printed  # the formats are not codecs that decode to what they reconstruct
    assert f"{runs}/variable against webp: " in printed
    assert f"{runs}/variable against {runs}/standard: " in printed
    assert "webp against" not in printed
    assert "jpeg against" not in printed
    points = json.loads((runs / "out" / "results.json").read_text(encoding="utf-8"))["points"]
    for kind, suffix in (("jpeg", "jpg"), ("webp", "webp")):
        sizes = []
        for quality in anchors.QUALITIES:
            path = runs / "out" / "files" / kind / f"{quality}" / f"large.png.{suffix}"
            (point,) = (p for p in points if (p["curve"], p["setting"]) == (kind, quality))
            result, size = point["images"]["large.png"], path.stat().st_size
            assert (result["size"], result["bpp"]) == (size, 8 * size / (200 * 170))
            assert result["psnr"] == psnr(read_image(path), read_image(images / "large.png"))
            sizes.append(size)
        assert sizes == sorted(sizes)
    with Image.open(runs / "out" / "files" / "jpeg" / "50" / "large.png.jpg") as image:
        assert image.layer[0][1:3] == (2, 2)  # chroma has half the sides


def test_an_image_too_large_for_a_format_is_named_before_a_codec_codes_it(runs, capsys):
    images = photos(runs / "kodak", {"long": (17000, 1)})
    assert run(runs, "--images", str(images), "--anchor", "jpeg", "webp") == 2
    assert (
        "error: long.png should have sides of at most 16383 pixels, for webp. Found 1 x 17000. "
        "Leave that image out, or webp if it is an --anchor." in capsys.readouterr().err
    )
    assert [path.name for path in (runs / "out" / "files").iterdir()] == ["jpeg"]


def test_what_has_no_number_is_null_in_the_results(runs):
    """A gray image comes back from JPEG as it was."""
    (runs / "gray").mkdir()
    Image.new("RGB", (200, 180), "gray").save(runs / "gray" / "gray.png")
    assert run(runs, "--images", str(runs / "gray"), "--anchor", "jpeg") == 0

    def refuse(name):
        raise AssertionError(name)

    text = (runs / "out" / "results.json").read_text(encoding="utf-8")
    points = json.loads(text, parse_constant=refuse)["points"]
    assert None in [p["images"]["gray.png"]["psnr"] for p in points if p["curve"] == "jpeg"]


def start(*arguments, **environment):
    """What runs a command in a process of its own."""
    return {
        "args": [sys.executable, "-m", "examples.lic", *map(str, arguments)],
        "env": {**os.environ, **environment},
        "cwd": Path(__file__).parents[2],
        "stderr": subprocess.PIPE,
        "check": False,
    }


def test_names_that_are_not_unicode_are_printed_on_any_terminal(runs):
    folder = os.fsdecode(os.fsencode(runs) + b"/k\xf6dak")
    os.mkdir(folder)
    (runs / "standard").rename(os.path.join(folder, "standard"))
    Image.new("RGB", (70, 70)).save(folder + "/" + os.fsdecode(b"\xff.png"))
    out = ["--images", folder, "--anchor", folder + "/standard", "--output", runs / "out"]
    done = subprocess.run(
        **start("evaluate", folder + "/standard", *out, PYTHONIOENCODING="ascii"),
        stdout=subprocess.PIPE,
    )
    assert done.stderr.decode().endswith("1 of 1\n")
    assert done.returncode == 0
    assert b"\\u03bb or q" in done.stdout
    assert b"k\\xf6dak/standard" in done.stdout
    assert "λ" not in done.stdout.decode("ascii")
    results = json.loads((runs / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(results["points"][0]["images"]) == [os.fsdecode(b"\xff.png")]


def test_a_reader_that_has_enough_ends_a_command_quietly_and_loses_no_results(runs):
    reader, writer = os.pipe()
    os.close(reader)
    command = ["evaluate", runs / "standard", "--quick", "--output", runs / "out"]
    done = subprocess.run(**start(*command), stdout=writer)
    os.close(writer)
    assert b"BrokenPipe" not in done.stderr
    assert b"error: " not in done.stderr
    assert done.returncode == 141
    assert json.loads((runs / "out" / "results.json").read_text(encoding="utf-8"))["points"]


def test_an_output_that_is_a_file_is_named(runs, capsys):
    (runs / "out").touch()
    message = f"error: --output should be a folder. Found the file {runs}/out. Choose another"
    for name in ("evaluate", "export"):
        command = [name, f"{runs}/standard", "--output", f"{runs}/out"]
        check_refusal(lambda command=command: main(command), message, capsys)


def test_a_folder_that_cannot_be_made_is_named(runs, capsys):
    (runs / "out").touch()
    assert main(["evaluate", str(runs / "standard"), "--quick", "--output", f"{runs}/out/a"]) == 2
    printed = capsys.readouterr().err
    assert f"error: {runs}/out/a" in printed
    assert "cannot be written (Not a directory). Free some space, or choose another" in printed


def test_a_decoder_that_differs_is_reported(runs, capsys, monkeypatch):
    decode = bitstream.Coder.decode_exactly
    monkeypatch.setattr(bitstream.Coder, "decode_exactly", lambda *a: decode(*a) + 1e-6)
    assert run(runs, "--quick") == 1
    assert "0 of 4" in capsys.readouterr().out


def measured(bpp, decibel, similarity=0.9):
    return Measurement(100, bpp, 0.99 * bpp, decibel, similarity, exact=True)


def curve(name, gain):
    """Two images at four rates, `gain` dB above a line; the second image costs twice as much."""
    return [
        Point(
            "codec.pt", name, rate,
            {
                "a": measured(rate, 30 + 4 * math.log2(rate) + gain),
                "b": measured(2 * rate, 29 + 4 * math.log2(rate) + 2 * gain),
            },
        )
        for rate in (0.4, 0.8, 1.6, 3.2)
    ]  # fmt: skip


def test_ms_ssim_goes_with_the_rate_of_the_images_that_have_it():
    point = Point("", "", 0.1, {"a": measured(0.8, 30), "b": measured(1.6, 32, 0.8)})
    values = [point.mean(name) for name in ("bpp", "estimated_bpp", "psnr")]
    assert values == pytest.approx([1.2, 1.188, 31])
    assert point.similarity() == pytest.approx((1.2, 0.85))
    point.images["b"] = measured(1.6, 32, None)
    assert point.similarity() == (0.8, 0.9)
    assert point.score() == pytest.approx((1.2, 31))
    assert table({"new": [point]}).splitlines()[2].endswith("0.9000")
    point.images["a"] = measured(0.8, 30, None)
    assert point.similarity() is None
    assert table({"new": [point]}).splitlines()[2].endswith("–")


def test_a_gain_is_found_image_by_image():
    """A line of 4 dB an octave, shifted by g dB, needs 2^(−g/4) of the rate."""
    comparison = compare_curves({"old": curve("old", 0), "new": curve("new", 0.2)}, "new", "old")
    rates = [100 * (2 ** (-gain / 4) - 1) for gain in (0.2, 0.4)]
    middle, half = sum(rates) / 2, 12.7062 * abs(rates[0] - rates[1]) / 2
    interval = f"95 % interval [{middle - half:+.2f}, {middle + half:+.2f}]"
    expected = f"image by image BD-rate {middle:+.2f} %, {interval}; BD-PSNR +0.300 dB; over at "
    start = f"new against old: {expected}least 97% of the shorter PSNR range.\n"
    assert str(comparison).startswith(start)
    rows = [line.split() for line in str(comparison).splitlines()[2:]]
    assert rows[0] == ["a", f"{rates[0]:+.2f}", "+0.200", "98%"]
    assert rows[1][:3] == ["b", f"{rates[1]:+.2f}", "+0.400"]
    assert comparison.as_dict()["images"]["a"]["rate"] == pytest.approx(rates[0])


def test_one_image_has_no_interval():
    curves = {"old": curve("old", 0), "new": curve("new", 0.2)}
    for point in (*curves["old"], *curves["new"]):
        del point.images["b"]
    sentence = compare_curves(curves, "new", "old").summary
    assert "BD-rate -3.41 %, no interval, as there is one image; BD-PSNR" in sentence
    assert "inf" not in sentence


def test_a_mean_curve_that_contradicts_its_images_is_not_told():
    """Each image costs 2 % more, but the mean curve 18 % less: it has other rates of each image."""

    def points(name, cost, rates):
        return [
            Point("codec.pt", name, 2.0**k, {
                image: measured(cost * rate * 2**k, 30 + 4 * math.log2(rate * 2**k))
                for image, rate in rates.items()
            })
            for k in range(4)
        ]  # fmt: skip

    old, new = points("old", 1, {"a": 1, "b": 0.25}), points("new", 1.02, {"a": 0.5, "b": 0.5})
    assert compare([p.score() for p in new], [p.score() for p in old]).rate < -15
    sentence = compare_curves({"old": old, "new": new}, "new", "old").summary
    assert "image by image BD-rate +2.00 %, 95 % interval [+2.00, +2.00]" in sentence
    assert "over at least 67% of the shorter PSNR range." in sentence
    assert "mean curve" not in sentence


def test_curves_that_do_not_meet_are_not_compared():
    apart = compare_curves({"old": curve("old", 0), "new": curve("new", 40)}, "new", "old")
    assert str(apart).startswith("new against old: no BD-rate. The curves should overlap in PSNR")
    assert str(apart) == apart.summary
    new = curve("new", 0)
    for point in new:
        point.images["b"] = measured(point.setting, point.images["b"].psnr + 30)
        point.images["a"] = measured(point.setting, point.images["a"].psnr - 28)
    comparison = compare_curves({"old": curve("old", 0), "new": new}, "new", "old")
    assert "against old: not image by image. The curves should overlap" in comparison.summary
    assert "The mean curves, without an interval: BD-rate " in comparison.summary
    assert comparison.as_dict()["images"] == {"a": None, "b": None}
