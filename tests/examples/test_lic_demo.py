"""The demo: what its runs share, its rivals, its table, and what it writes."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

from examples.lic import demo
from examples.lic.__main__ import main
from examples.lic.checkpoint import load
from examples.lic.demo import Comparison
from examples.lic.images import Photographs
from examples.lic.losses import SOLUTIONS

METHODS = ["checkpoint", "standard", *SOLUTIONS, *demo.RIVALS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    picture = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1).to(torch.uint8)
    photographs = Photographs({"train": picture}, {"held out": picture.flip(-1)})
    options = Namespace(lambdas=[0.01], steps=3, finetune_steps=3, crop=64, batch=1, seed=0)
    return Comparison(photographs, options, tmp_path_factory.mktemp("demo"))()


def test_runs_of_one_lambda_share_start_crops_and_noise(results):
    first = {
        tuple(result.record.history.series(f"loss/{name}")[1][0] for name in ("rate", "distortion"))
        for method, result in results[0.01].items()
        if method != "checkpoint"
    }
    assert len(first) == 1


def test_fixed_rivals_have_the_coefficients_that_the_solutions_arrived_at(results):
    point = results[0.01]
    assert point["standard"].effective_lambda == pytest.approx(0.01)
    for rival, (solution, part) in demo.RIVALS.items():
        assert sum(point[rival].record.last("coefficient").values()) == pytest.approx(1)
        # Three steps: the learning rate has fallen before the last.
        late = point[solution].record.history.series("coefficient/distortion")[1][2]
        expected = part * 0.01 * late / (1 - late)
        assert point[rival].effective_lambda == pytest.approx(expected, rel=1e-4)


def test_the_table_has_a_row_for_each_method(results):
    rows = demo.table(results).splitlines()[2:]
    assert [row[8:28].strip() for row in rows] == METHODS
    assert all(row.split()[0] == "0.01" for row in rows)


def test_the_quick_demo_writes_checkpoints_figure_and_results(tmp_path, capsys):
    for index in range(2):
        Image.effect_noise((70, 66), 40 + index).save(tmp_path / f"{index}.png")
    out = tmp_path / "out"
    options = ["--quick", "--images", str(tmp_path), "--crop", "64", "--output", str(out)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    for word in (*METHODS, "bpp", "PSNR", *demo.EXPLANATION.split(), str(out / "results.json")):
        assert word in printed
    with Image.open(out / "rate-distortion.png") as figure:
        assert min(figure.size) > 400
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["0.013"]) == METHODS
    assert load(out / "fixed-lower-rate" / "lambda-0.013.pt")["taken"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
        (["--lambdas", "-1"], "should be above 0, found -1"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, capsys, tmp_path):
    try:
        code = main([*options, "--quick", "--output", str(tmp_path)])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--quick", "--output", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
