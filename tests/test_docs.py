"""Every block of Python in the manual runs, every command exists, every name has a docstring."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import moo_balance
from tests.support import methods_page
from tests.support.capabilities import METHODS
from tests.support.registry import FACTS

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


# ---------------------------------------------------------------------- what examples are worth


def blocks(page: str) -> list[str]:
    return [match[1] for match in PYTHON.finditer((ROOT / page).read_text())]


def values(losses) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


def test_the_example_of_the_readme_is_worth_its_balancing(capsys):
    """Compared with the plain sum and with doing nothing, and what the page says it prints."""
    (block,) = blocks("README.md")
    namespace = {}
    untrained = {}
    with torch.random.fork_rng():
        exec(block, namespace)
        exec(block.replace("range(201)", "range(1)").partition("\nfor ")[0], untrained)
        start = values(untrained["train"](moo_balance.Sum()))
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    ends = {name: ast.literal_eval(losses) for name, losses in lines.items()}
    assert start == pytest.approx({"first": 474, "second": 0.544}, rel=1e-2)
    for losses in ends.values():
        assert all(losses[name] < start[name] for name in start)
    plain = ends.pop("Sum")
    assert plain["second"] > 0.8 * start["second"]
    for losses in ends.values():
        assert losses["second"] < plain["second"] / 5
        assert losses["first"] < start["first"] / 20
    assert all(ends["NashMTL"][name] < plain[name] for name in plain)
    printed = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for line in printed.splitlines():
        name, losses = line.split(" ", 1)
        expected = {"Sum": plain, **ends}[name]
        # Rounding differs between machines, and grows in training.
        assert ast.literal_eval(losses) == pytest.approx(expected, rel=0.2)


def test_the_quickstart_is_worth_its_balancing():
    problem, loop, *_ = blocks("docs/quickstart.md")
    ends = []
    with torch.random.fork_rng():
        for weighting in ("NashMTL()", "__import__('moo_balance').Sum()"):
            namespace = {}
            exec(problem, namespace)
            start = values(namespace["compute_losses"]())
            exec(loop.replace("NashMTL()", weighting), namespace)
            ends.append(values(namespace["compute_losses"]()))
    balanced, plain = ends
    assert start["second"] == pytest.approx(0.544, rel=1e-2)
    assert balanced["second"] < start["second"] / 10
    assert plain["second"] > 0.4
    assert balanced["first"] < start["first"] / 10


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    text = page.read_text()
    assert set(re.findall(r"^make (?:\w+=\S+ )?([\w-]+)", text, re.MULTILINE)) <= {*targets.split()}
    for module in re.findall(r"python -m (examples[\w.]*|benchmarks[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page} runs {module}, which is not there"


def test_the_table_of_methods_is_complete():
    assert FACTS.keys() == METHODS
    text = methods_page.PAGE.read_text()
    assert text == methods_page.insert(text), f"run python -m {methods_page.__name__}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_what_its_coefficients_sum_to_and_whether_a_loss_may_rise(name):
    text = inspect.getdoc(getattr(moo_balance, name))
    assert "Coefficients" in text
    assert re.search(r"\brises?\b", text)


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
