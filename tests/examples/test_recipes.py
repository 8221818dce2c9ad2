"""Every recipe runs, prints a table, draws a figure, and has a page that names it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import recipes

ROOT = Path(__file__).parents[2]
NAMES = [
    module.name
    for module in pkgutil.iter_modules(recipes.__path__)
    if module.name != "common" and not module.name.startswith("_")
]
FRAMEWORKS = {"nequip_potential": "nequip", "pina_poisson": "pina"}  # in none of our extras


@pytest.fixture(autouse=True)
def _keep_threads_and_generator():
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    if state := sys.modules.get("accelerate.state"):  # settings of the Trainer, for the process
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_finite_figures_and_draws_them(name, tmp_path, capsys):
    if name in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[name])
    figure = tmp_path / "figure.svg"
    arguments = ["--quick", "--figure", str(figure)]
    if name in FRAMEWORKS:  # they set what belongs to the whole process
        command = [sys.executable, "-m", f"examples.recipes.{name}", *arguments]
        printed = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    else:
        importlib.import_module(f"examples.recipes.{name}").main(arguments)
        printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 2
    assert "nan" not in printed.lower().split()
    assert "</svg>" in figure.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_page_with_its_command_and_figure(name):
    page = (ROOT / "docs" / "recipes" / f"{name}.md").read_text()
    assert f"python -m examples.recipes.{name}" in page
    picture = next(
        ROOT / "docs" / "figures" / "recipes" / f"{name}{suffix}"
        for suffix in (".svg", ".png")
        if f"../figures/recipes/{name}{suffix})" in page
    )
    assert 0 < picture.stat().st_size <= 150_000
