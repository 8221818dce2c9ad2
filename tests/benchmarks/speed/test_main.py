"""The benchmarks run; their figures are not tested."""

from __future__ import annotations

import json
import re
import socket

import pytest

from benchmarks.speed.__main__ import main
from benchmarks.speed.page import PARTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run all parts once, on tiny models."""
    folder = tmp_path_factory.mktemp("benchmarks")
    main(["--quick", "--results", str(folder), "--docs", str(folder / "docs")])
    return folder


def test_every_part_keeps_its_figures_and_has_its_section(run):
    page = (run / "docs" / "benchmarks.md").read_text()
    for name, part in PARTS.items():
        kept = json.loads((run / f"{name}.json").read_text())
        assert part.section(kept["results"]) in page
        assert f"\n## {part.TITLE}\n" in page
    assert page.count("A quick run") == len(PARTS)
    assert not re.search(r"\bnan\b", page)


def test_every_picture_is_there(run):
    page = (run / "docs" / "benchmarks.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+\.svg)\)", page)
    assert len(pictures) == 5
    assert all("<svg" in (run / "docs" / picture).read_text() for picture in pictures)


def test_results_and_page_do_not_name_the_machine(run):
    host = socket.gethostname()
    for file in [*run.glob("*.json"), run / "docs" / "benchmarks.md"]:
        assert host not in file.read_text()
        assert str(run) not in file.read_text()


def test_the_page_can_be_written_again_from_the_figures(run, tmp_path):
    main(["page", "--results", str(run), "--docs", str(tmp_path)])
    for file in ("benchmarks.md", "figures/benchmarks/solvers.svg"):
        assert (tmp_path / file).read_text() == (run / "docs" / file).read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["steps"], "should be one of step, memory, growth"),
        (["--threads", "0"], "should be a whole number, at least 1"),
        (["page", "--results", "nowhere"], "nothing has been measured in nowhere yet"),
    ],
)
def test_wrong_arguments_are_explained(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert sentence in capsys.readouterr().err
