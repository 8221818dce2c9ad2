"""The paper's citations are in its bibliography, and in the package; its numbers, in the manual."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAPER = (ROOT / "docs" / "paper" / "paper.md").read_text()
BIBLIOGRAPHY = (ROOT / "docs" / "paper" / "paper.bib").read_text()
_, FRONT, BODY = PAPER.split("---\n", 2)

# Figures that the paper takes from a page: what the paper says, and the page with the same number.
FIGURES = [
    ("9.95 [4.21, 23.5]", "worth"),
    ("2.15 [1.11, 4.18]", "worth"),
    ("5.61 [3.04, 10.3]", "worth"),
    ("1.07 [0.92, 1.25]", "worth"),
    ("2.05 (1.99–2.17)", "benchmarks"),
    ("1.667 (1.618–1.705)", "benchmarks"),
    ("49.80 (44.02–52.31)", "benchmarks"),
    ("18.99 (16.64–19.90)", "benchmarks"),
    ("1.677 (1.633–1.742)", "benchmarks"),
    ("20.15 (17.66–21.64)", "benchmarks"),
]


def test_each_citation_is_in_the_bibliography_and_the_reverse():
    cited = set(re.findall(r"(?<![\w.])@([\w:-]+)", BODY))
    keys = re.findall(r"^@\w+\{([\w:-]+),", BIBLIOGRAPHY, re.MULTILINE)
    assert cited
    assert len(keys) == len(set(keys))
    assert cited == set(keys)


def test_each_preprint_is_cited_by_a_docstring():
    numbers = re.findall(r"eprint\s*=\s*\{([\d.]+)\}", BIBLIOGRAPHY)
    package = "".join(path.read_text() for path in (ROOT / "moo_balance").rglob("*.py"))
    assert numbers
    assert [number for number in numbers if number not in package] == []


@pytest.mark.parametrize(("figure", "page"), FIGURES, ids=lambda text: text)
def test_figures_are_those_of_the_manual(figure, page):
    assert figure in (ROOT / "docs" / f"{page}.md").read_text()
    assert figure in " ".join(BODY.split())


def test_every_interval_of_the_paper_is_checked():
    text = " ".join(BODY.split())
    intervals = set(re.findall(r"[\d.]+ (?:\[[\d., ]+\]|\([\d.]+–[\d.]+\))", text))
    assert intervals == {figure for figure, _ in FIGURES}


def test_title_and_authors_are_those_of_the_citation():
    front = yaml.safe_load(FRONT)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert front["title"].startswith(citation["title"])
    assert [each["name"] for each in front["authors"]] == [
        each["name"] for each in citation["authors"]
    ]
    assert front["bibliography"] == "paper.bib"


def test_the_paper_is_about_two_pages():
    assert 250 <= len(BODY.split()) <= 1000
