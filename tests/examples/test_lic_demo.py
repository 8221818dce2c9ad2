"""The demo: what its runs share, its rivals, its table, and what it writes."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

from examples.lic import demo
from examples.lic.__main__ import main
from examples.lic.architectures import build
from examples.lic.checkpoint import load, save_codec
from examples.lic.coding import load_codecs
from examples.lic.demo import Comparison
from examples.lic.evaluate import measure_formats
from examples.lic.losses import SOLUTIONS
from tests.support.commands import check_refusal

TINY = "mbt2018-mean:8,8"
METHODS = ["start", "standard", *SOLUTIONS, *demo.RIVALS]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A folder of codecs with random weights."""
    folder = tmp_path_factory.mktemp("ladder")
    for lmbda in (0.01, 0.02, 0.05):
        about = {"arch": TINY, "lambdas": [lmbda]}
        save_codec(folder / f"lambda-{lmbda}.safetensors", build(TINY), about)
    return folder


@pytest.fixture(scope="module")
def results(ladder, tmp_path_factory):
    picture = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1).to(torch.uint8)
    options = {"steps": 3, "lr": 1e-3, "crop": 64, "batch": 1, "seed": 0}
    chosen = Namespace(**options, output=tmp_path_factory.mktemp("demo"))
    compare = Comparison([picture], {"held out": picture.flip(-1).clone}, chosen)
    (codec,) = load_codecs([ladder / "lambda-0.01.safetensors"])
    return {0.01: {"start": compare.start(codec), **compare.fine_tune(codec)}}


def test_runs_of_one_lambda_share_start_crops_and_noise(results):
    first = {
        tuple(result.record.history.series(f"loss/{name}")[1][0] for name in ("rate", "distortion"))
        for result in results[0.01].values()
        if result.record is not None
    }
    assert len(first) == 1


def test_fixed_rivals_have_the_coefficients_that_the_solutions_arrived_at(results):
    methods = results[0.01]
    assert methods["standard"].effective_lambda == pytest.approx(0.01)
    for rival, (solution, part) in demo.RIVALS.items():
        assert sum(methods[rival].record.last("coefficient").values()) == pytest.approx(1)
        # Three steps: the learning rate has fallen before the last.
        late = methods[solution].record.history.series("coefficient/distortion")[1][2]
        expected = part * 0.01 * late / (1 - late)
        assert methods[rival].effective_lambda == pytest.approx(expected, rel=1e-4)


def test_the_table_has_a_row_for_each_method_with_its_distance_from_the_anchors(results, tmp_path):
    bpp, psnr = results[0.01]["start"].point.score()
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    points = list(measure_formats(["jpeg"], {"held out": image.clone}, tmp_path))[:2]
    for point, factor in zip(points, (0.5, 2), strict=True):  # in the middle of them it is +1 dB
        result = point.images["held out"]
        point.images["held out"] = type(result)(1, factor * bpp, None, psnr - 1, None, None)
    rows = demo.table(results, {"jpeg": points, "webp": points[:1]}).splitlines()[2:]
    assert [row[8:28].strip() for row in rows] == METHODS
    assert all(row.split()[0] == "0.01" for row in rows)
    assert rows[0].split()[-2:] == ["+1.00", "–"]


def test_the_quick_demo_writes_checkpoints_files_figure_and_results(ladder, tmp_path, capsys):
    for index in range(2):
        Image.effect_noise((70, 66), 40 + index).save(tmp_path / f"{index}.png")
    out = tmp_path / "out"
    options = ["--quick", "--from", str(ladder), "--images", str(tmp_path), "--crop", "64"]
    assert main([*options, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in (*METHODS, "bpp", "PSNR", *demo.EXPLANATION.split(), str(out / "results.json")):
        assert word in printed
    assert "the codecs against webp: " in printed
    assert "7 of 7." in printed
    with Image.open(out / "rate-distortion.png") as figure:
        assert min(figure.size) > 400
    own = ["--quick", "--from", str(out / "runs" / "standard"), "--output", str(out)]
    assert main(own) == 2  # whose codecs it would make anew
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["codecs"]) == ["0.01"]
    assert list(results["codecs"]["0.01"]) == METHODS
    assert load(out / "runs" / "fixed-lower-rate" / "lambda-0.01.pt")["taken"] == 3
    file = out / "files" / "standard" / "lambda-0.01.pt-0.01" / "1.png.bin"
    assert results["codecs"]["0.01"]["standard"]["bpp"] == 8 * file.stat().st_size / (70 * 66)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
        (["--lambdas", "-1"], "should be above 0, found -1"),
        (["--crop", "448"], "--crop should be at most 400, the least side of the bundled"),
        (["--lambdas", "0.02", "0.03"], "each of one rate: 0.01 0.02 0.05. Found 0.02 0.03."),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, ladder, capsys, tmp_path):
    command = [*options, "--quick", "--from", str(ladder), "--output", str(tmp_path)]
    check_refusal(lambda: main(command), message, capsys)


def test_codecs_of_several_rates_are_none_to_start_from(tmp_path, capsys):
    arch = f"variable-rate:{TINY}"
    save_codec(tmp_path / "a.safetensors", build(arch), {"arch": arch, "lambdas": [0.01, 0.05]})
    message = f"--from should have a codec of one rate. Found none in {tmp_path}. Name another"
    check_refusal(lambda: main(["--from", str(tmp_path)]), message, capsys)


def test_an_output_folder_that_cannot_be_made_is_named(ladder, tmp_path, capsys):
    (tmp_path / "file").touch()
    command = ["--quick", "--from", str(ladder), "--output", str(tmp_path / "file")]
    assert main(command) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
