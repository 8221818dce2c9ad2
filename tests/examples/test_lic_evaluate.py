"""The evaluation command: true sizes, MS-SSIM, curves and what is said where they cannot be."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from examples.lic import curves, evaluate, measurement
from examples.lic.architectures import build
from examples.lic.checkpoint import save
from examples.lic.curves import Point
from examples.lic.measurement import Measurement, means, structural_similarity


@pytest.fixture
def runs(tmp_path):
    """Two folders of checkpoints with random weights."""
    for curve in ("standard", "solution1"):
        for seed, lmbda in enumerate((0.01, 0.02)):
            torch.manual_seed(seed)
            model = build("small").state_dict()
            content = {"arch": "small", "lmbda": lmbda, "settings": {"steps": 9}, "taken": 9 - seed}
            save(tmp_path / curve / f"lambda-{lmbda:g}.pt", {**content, "model": model})
    return tmp_path


def photos(folder, sizes):
    folder.mkdir()
    for name, size in sizes.items():
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{name}.png")
    return folder


def run(runs, *more):
    folders = [str(runs / "standard"), str(runs / "solution1")]
    return evaluate.main([*folders, "--output", str(runs / "out"), *more])


def test_files_are_written_read_and_decoded(runs, capsys):
    images = photos(runs / "kodak", {"small": (70, 90), "large": (200, 170)})
    assert run(runs, "--images", str(images)) == 0
    printed = capsys.readouterr().out
    assert "Decoded bit by bit as the codec reconstructs it: 8 of 8." in printed
    assert "MS-SSIM needs sides of 161 pixels; without it: small.png." in printed
    results = json.loads((runs / "out" / "results.json").read_text(encoding="utf-8"))
    assert [p["curve"] for p in results["checkpoints"]] == ["standard"] * 2 + ["solution1"] * 2
    for point in results["checkpoints"]:
        for name, pixels in (("small.png", 70 * 90), ("large.png", 200 * 170)):
            file = runs / "out" / "files" / point["curve"] / f"lambda-{point['lambda']:g}"
            row = point["images"][name]
            assert row["size"] == (file / f"{name}.bin").stat().st_size
            assert row["bpp"] == pytest.approx(8 * row["size"] / pixels)
            assert row["exact"]
        assert point["images"]["small.png"]["ms_ssim"] is None
    with Image.open(runs / "out" / "rate-distortion.png") as figure:
        assert min(figure.size) > 400


def test_quick_run_on_a_bundled_photograph(runs, capsys):
    assert run(runs, "--quick", "--anchor", "standard") == 0
    printed = capsys.readouterr().out
    assert "4 of 4" in printed
    assert f"{runs}/standard/lambda-0.02.pt is at step 8 of 9." in printed
    assert "lambda-0.01.pt is" not in printed
    # Two points make no curve; that is said and not hidden.
    assert "solution1 against standard: no BD-rate. The test should have at least 3" in printed


def test_converted_images_are_said(runs, capsys):
    images = photos(runs / "kodak", {"a": (64, 64)})
    Image.new("RGBA", (64, 64)).save(images / "b.png")
    assert run(runs, "--images", str(images)) == 0
    assert "Converted to 8-bit RGB: b.png (RGBA)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--anchor", "famo"], "--anchor should be one of solution1, standard"),
        (["nowhere.pt"], "error: There is no checkpoint nowhere.pt."),
        (["{runs}/out"], "out holds no checkpoints (*.pt)"),
        (["{runs}/solution1/notes.pt"], "notes.pt cannot be read as a checkpoint"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_code_2(options, message, runs, capsys):
    (runs / "out").mkdir()
    (runs / "solution1" / "notes.pt").write_text("no checkpoint")
    options = [option.format(runs=runs) for option in options]
    checkpoints = [str(runs / "standard"), str(runs / "solution1" / "lambda-0.01.pt")]
    code = evaluate.main(["--output", str(runs / "out"), *checkpoints, *options])
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_an_unreadable_image_is_named_before_anything_is_coded(runs, capsys):
    images = photos(runs / "kodak", {"a": (64, 64)})
    (images / "b.png").write_bytes(b"no picture")
    assert run(runs, "--images", str(images)) == 2
    assert "b.png cannot be read" in capsys.readouterr().err
    assert not (runs / "out").exists()


def test_an_output_that_is_a_file_is_named(runs, capsys):
    (runs / "out").touch()
    assert run(runs, "--quick") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert f"{runs}/out" in printed
    assert "cannot be written (Not a directory). Free some space, or choose another" in printed


def test_a_decoder_that_differs_is_reported(runs, capsys, monkeypatch):
    decode = measurement.Coder.decode_exactly
    monkeypatch.setattr(measurement.Coder, "decode_exactly", lambda *a: decode(*a) + 1e-6)
    assert run(runs, "--quick") == 1
    assert "0 of 4" in capsys.readouterr().out


def test_folders_of_one_name_are_told_apart(runs):
    paths = [runs / "standard" / "a.pt", runs / "more" / "standard" / "a.pt", runs / "x" / "a.pt"]
    assert list(evaluate._curve_names(paths).values()) == [
        str(runs / "standard"), str(runs / "more" / "standard"), "x",
    ]  # fmt: skip


def test_ms_ssim_of_a_picture_with_itself_and_with_noise():
    picture = torch.randint(0, 256, (3, 161, 170), dtype=torch.uint8)
    assert structural_similarity(picture, picture) == pytest.approx(1)
    assert structural_similarity(picture, picture.flip(-1)) < 0.5
    assert structural_similarity(picture[:, :160], picture[:, :160]) is None


def measured(bpp, decibel, similarity=0.9):
    return Measurement(1000, round(1000 * bpp / 8), 990 * bpp, decibel, similarity, exact=True)


def curve(name, gain):
    """Two images at four rates, `gain` dB above a line; the second image costs twice as much."""
    return [
        Point(
            None, name, rate, {},
            {
                "a": measured(rate, 30 + 4 * math.log2(rate) + gain),
                "b": measured(2 * rate, 29 + 4 * math.log2(rate) + 2 * gain),
            },
        )
        for rate in (0.4, 0.8, 1.6, 3.2)
    ]  # fmt: skip


def test_means_leave_out_images_without_ms_ssim():
    found = means({"a": measured(0.8, 30), "b": measured(1.6, 32, None)})
    assert (found.bpp, found.estimated_bpp) == pytest.approx((1.2, 1.188))
    assert (found.psnr, found.ms_ssim) == pytest.approx((31, 0.9))
    assert means({"b": measured(1.6, 32, None)}).ms_ssim is None


def test_a_gain_is_found_for_the_mean_and_for_each_image():
    """A line of 4 dB an octave, shifted by g dB, needs 2^(−g/4) of the rate."""
    (found,) = curves.comparisons([*curve("old", 0), *curve("new", 0.2)], "old")
    assert found.delta.rate == pytest.approx(100 * (2 ** (-0.3 / 4) - 1), abs=1e-3)
    assert found.delta.psnr == pytest.approx(0.3, abs=1e-4)
    low, high = (100 * (2 ** (-gain / 4) - 1) for gain in (0.4, 0.2))
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=1e-3)
    assert found.sentence().startswith("new against old: BD-rate -5.07 %, BD-PSNR +0.300 dB, over")


def test_curves_that_do_not_meet_are_not_compared():
    (found,) = curves.comparisons([*curve("old", 0), *curve("new", 40)], "old")
    assert found.delta is None
    assert "The curves should overlap in PSNR" in found.sentence()


def test_an_image_whose_curves_do_not_meet_is_said():
    new = curve("new", 0)
    for point in new:
        point.measurements["b"] = measured(point.lmbda, point.measurements["b"].psnr + 30)
        point.measurements["a"] = measured(point.lmbda, point.measurements["a"].psnr - 28)
    (found,) = curves.comparisons([*curve("old", 0), *new], "old")
    assert found.delta is not None
    assert "not for each image. The curves should overlap" in found.sentence()


def test_table_orders_a_curve_by_rate_and_marks_what_is_missing():
    points = curve("new", 0)[::-1]
    points[0].measurements["a"] = measured(0.4, 30, None)
    points[0].measurements["b"] = measured(0.4, 30, None)
    rows = curves.table(points).splitlines()[2:]
    rates = [float(row.split()[2]) for row in rows]
    assert rates == sorted(rates)
    assert rows[0].endswith("–")
