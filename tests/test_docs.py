"""Every block of Python in the manual runs, every command exists, every name has a docstring."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import moo_balance
from tests.support.capabilities import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=page_id
)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in PYTHON.finditer(text):
            # As many empty lines as stand above it, so that a traceback names the page's own line.
            above = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(above + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    text = page.read_text()
    assert set(re.findall(r"^make (?:\w+=\S+ )?([\w-]+)", text, re.MULTILINE)) <= {*targets.split()}
    for module in re.findall(r"python -m (examples[\w.]*|benchmarks[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page} runs {module}, which is not there"


def test_the_table_of_methods_is_complete():
    text = (ROOT / "docs/methods.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    named = {name for name in METHODS for row in rows if re.search(rf"\b{name}\b", row)}
    assert named == METHODS


@pytest.mark.parametrize("module", ["", ".engine", ".functional", ".weighting"])
def test_every_public_name_and_method_has_a_docstring(module):
    package = importlib.import_module(f"moo_balance{module}")
    for name in package.__all__:
        documented = getattr(package, name)
        assert inspect.getdoc(documented), name
        if inspect.isclass(documented):
            for member, value in vars(documented).items():
                if not member.startswith("_") and (
                    inspect.isroutine(value) or isinstance(value, property)
                ):
                    assert inspect.getdoc(getattr(documented, member)), f"{name}.{member}"


def test_the_citation_names_this_version():
    assert f"version: {moo_balance.__version__}\n" in (ROOT / "CITATION.cff").read_text()
