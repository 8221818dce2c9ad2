"""The whole study in a setting of seconds, and the page that is written from results only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.lic import __main__ as command, report
from benchmarks.lic.engine import Engine
from benchmarks.lic.study import full, tiny
from examples.lic.images import bundled
from tests.benchmarks.lic.made_up import experiment

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lic-report")
    assert command.main(["--quick", "--output", str(folder)]) == 0
    return folder


def test_a_study_runs_and_writes_its_page_and_figures(quick):
    text = (quick / "lic_report.md").read_text(encoding="utf-8")
    for title in tiny().titles:
        assert f"\n## {title}\n" in text
    figures = re.findall(r"\((figures/lic/.*\.png)\)", text)
    assert len(figures) == 8
    for figure in figures:
        with Image.open(quick / figure) as image:
            assert image.size[0] > 400


def test_what_is_finished_is_not_run_again(quick):
    setting, said = tiny(), []
    engine = Engine(setting.crop(bundled()), quick, say=said.append)
    *_, results = setting.run(engine, setting.titles)
    assert not said
    stored = report.load(quick / "lic_report.json")
    report.save(quick / "again.json", results)
    assert report.load(quick / "again.json")["experiments"] == stored["experiments"]


def test_checkpoints_of_scored_runs_are_not_kept(quick):
    kept = list(quick.glob("checkpoints*/*"))
    assert len(kept) == 3  # the codecs that refine; the first is the start of all other runs
    assert all(path.suffix == ".pt" for path in kept)


def test_the_page_in_the_docs_is_that_of_its_results():
    text, drawings = report.page(report.load(DOCS / "lic_report.json"))
    assert text == (DOCS / "lic_report.md").read_text(encoding="utf-8")
    stems = {path.stem for path in (DOCS / "figures" / "lic").glob("*.png")}
    assert stems == {drawing.stem for drawing in drawings}


def test_the_docs_have_all_experiments_of_the_full_setting():
    assert list(report.load(DOCS / "lic_report.json")["experiments"]) == full().titles


def made_up(**shifts):
    cell = {"lr": 1e-3, "clip": "unit", "loss": 1.0}
    return {
        "about": {
            "date": "2000-01-01", "processor": "a processor", "cores": 2, "workers": 2,
            "versions": {"Python": "3"}, "trained on": ["c"], "held out": ["a", "b"],
            "crop": 64, "widths": [8, 8], "batch": 2,
        },
        "seconds per step": {"standard": 1.0, "Solution 1": 1.25, "Solution 2": 1.5},
        "tuning": {"Fine-tuned": {"cells": [cell, {**cell, "loss": 1.25}]}},
        "experiments": {"Fine-tuned": experiment(**shifts)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "verdict", "line"),
    [
        (0.5, "better", "remain: fine-tuned, Solution 1 (better); fine-tuned, Solution 2 (better)"),
        (0.0, "not distinguishable", "Differences that remain: none. Hints that do not: none."),
        (-0.5, "worse", "remain: fine-tuned, Solution 1 (worse); fine-tuned, Solution 2 (worse)"),
    ],
)
def test_the_summary_says_what_the_intervals_show(own, verdict, line):
    text, _ = report.page(made_up(own=own, rest=0.5))
    summary = text[: text.index("Verdicts on all baselines")]
    assert line in summary
    assert summary.count(f"| {verdict} |") == 2


def test_a_difference_that_a_correction_takes_away_is_a_hint():
    results = made_up()
    seeds = results["experiments"]["Fine-tuned"]["seeds"].values()
    for curves, gap in zip(seeds, (0.1, 0.15, 0.2), strict=True):
        for run in curves["Solution 1"]["own mean weights"]:
            run["scores"] = {name: (bpp, psnr - gap) for name, (bpp, psnr) in run["scores"].items()}
    text, _ = report.page(results)  # p is 0.037, and twice that once corrected
    assert "Differences that remain: none. Hints that do not: fine-tuned, Solution 1 (be" in text


def test_the_page_counts_verdicts_and_tells_tuning_and_resolution():
    text, _ = report.page(made_up(rest=0.5))
    assert "Of 8 comparisons, 6 came out better, 0 worse, and 2 not distinguishable." in text
    assert "about 0.4 of 8 intervals would exclude it by chance" in text
    assert "Solution 1 takes 1.25 standard ones" in text
    assert "| Fine-tuned | 2 | 0.001 | norm 1 | 25.0 % |" in text
    assert "| Fine-tuned | standard, λ = 0.01, 2 steps | 4 | 0, 1, 2 |" in text


def test_a_page_of_too_few_seeds_says_so():
    results = made_up()
    results["experiments"]["Fine-tuned"] = experiment(seeds=2)
    text, _ = report.page(results)
    assert "No comparison has the 3 seeds that a verdict needs." in text
    summary = text[: text.index("Verdicts on all baselines")]
    assert summary.count("| too few seeds |") == 2


def test_results_are_rounded(tmp_path):
    report.save(tmp_path / "r.json", made_up(rest=1 / 3))
    point = report.load(tmp_path / "r.json")["experiments"]["Fine-tuned"]["seeds"]["1"]
    assert point["Solution 1"]["balanced"][0]["scores"]["a"] == [0.5, 7.436]


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"about": 1}', '{"experiments": {"a": {"kind": "b"}}}']
)
def test_a_file_that_holds_no_results_is_named(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "lic_report.json").write_text(text)
    assert command.main(["--page-only", "--docs", str(tmp_path)]) == 2
    assert "lic_report.json holds no results of a study" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    options = ["--quick", "--only", "Latent refinement", "--output", str(tmp_path / "file")]
    assert command.main(options) == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers: should be above 0, found 0"),
        (["--only", "Nothing"], "--only should name some of Fine-tuned, Far from balance"),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
    ],
)
def test_bad_options_end_with_a_sentence(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err


def test_images_of_ones_own_take_the_place_of_the_bundled_ones(tmp_path):
    for index in range(2):
        Image.effect_noise((140, 130), 40 + index).convert("RGB").save(tmp_path / f"{index}.png")
    options = command._parse(["--images", str(tmp_path)])
    photographs = command._photographs(options)
    assert [Path(name).name for name in photographs.train] == ["0.png"]
    assert [Path(name).name for name in photographs.held_out] == ["1.png"]
