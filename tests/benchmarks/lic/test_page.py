"""The command, and the page that is written from stored summaries only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import stdev

import pytest
from PIL import Image

from benchmarks.lic import __main__ as command, page
from benchmarks.lic.estimator import estimate
from benchmarks.lic.experiments import TITLES
from benchmarks.lic.page import cost_of_one_per_cent, describe_bound, values_for_one_per_cent

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lic-report")
    arguments = ["--quick", "--runs", str(folder), "--docs", str(folder / "docs")]
    assert command.main(arguments) == 0
    return folder


def test_all_experiments_run_and_are_on_the_page(quick):
    text = (quick / "docs" / "lic_report.md").read_text(encoding="utf-8")
    results = [json.loads((quick / f"quick/results/{name}.json").read_text()) for name in TITLES]
    for content in results:
        assert f"\n## {content['summary']['title']}\n" in text
        assert content["code"].keys() == {"moo_balance", "torch", "sources"}
    with Image.open(quick / "docs" / "figures" / "lic" / "curves.png") as image:
        assert image.size[0] > 400


def test_what_is_stored_is_not_run_again(quick, capsys):
    before = (quick / "docs" / "lic_report.md").read_text(encoding="utf-8")
    arguments = ["--quick", "--runs", str(quick), "--docs", str(quick / "again")]
    assert command.main(arguments) == 0
    assert "jobs of this stage" not in capsys.readouterr().err
    assert (quick / "again" / "lic_report.md").read_text(encoding="utf-8") == before


def test_the_page_in_the_docs_is_that_of_its_results(tmp_path):
    text = page.write(command.RESULTS, tmp_path).read_text(encoding="utf-8")
    assert text == (DOCS / "lic_report.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (tmp_path / "figures" / "lic").glob("*.png")}
    assert drawn == {path.name for path in (DOCS / "figures" / "lic").glob("*.png")}


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.2, 0.5, "a gain above 0.2 % and a loss above 0.5 %"),
        (0.3, 0.9, "any gain; a loss below 0.3 % or above 0.9 %"),
        (-0.9, -0.3, "any loss; a gain below 0.3 % or above 0.9 %"),
        (-float("inf"), float("inf"), "nothing"),
    ],
)
def test_bounds_are_what_lies_outside_of_the_interval(low, high, text):
    assert describe_bound(low, high) == text


def test_a_row_says_whether_the_papers_number_is_excluded():
    row = {"name": "a against b", "setting": "λ 1", "null": False, "mean": 0.15, "half": 0.33,
           "holm": 0.4, "paper": -1.64}  # fmt: skip
    text = page.comparisons([row], "b")
    assert "+0.15 ± 0.33 %" in text
    assert "−1.64 %: excluded here" in text
    assert "not excluded" in page.comparisons([{**row, "half": 3.0}], "b")
    assert "no estimate: why" in page.comparisons([{**row, "error": "why"}], "b")


@pytest.mark.parametrize("deviation", [0.5, 2.0, 5.8])
def test_so_many_values_as_are_needed_have_an_interval_of_one_per_cent(deviation):
    def half(count):
        values = [float(k) for k in range(count)]
        return estimate([deviation / stdev(values) * value for value in values]).half

    count = values_for_one_per_cent(deviation)
    assert half(count) <= 1.0 < half(count - 1)


def test_a_row_with_a_wide_interval_says_what_one_per_cent_costs():
    row = {"half": 6.13, "deviation": 5.844, "count": 6}
    text = "".join(cost_of_one_per_cent([row, {**row, "half": 0.9}], minutes=60.0))
    assert "1 of 2" in text
    assert f"about {values_for_one_per_cent(5.844)}" in text
    assert not "".join(cost_of_one_per_cent([{**row, "half": 0.9}], minutes=60.0))


def test_without_results_the_page_says_so():
    assert page.NOTHING in page.page({})
    assert not re.search(r"\bnan\b", page.page({}))


def test_a_ladder_that_is_not_there_is_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.lic.regime.PRETRAINED", tmp_path)
    assert command.main(["--estimate", "--results", str(tmp_path)]) == 2
    assert "should hold at least three codec files. Found 0." in capsys.readouterr().err
