"""Which methods are timed, and how the table tells what exceeds its budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.settings import Settings
from benchmarks.speed.methods import BUDGETS, gramian_methods, own_step, peers, run, section
from moo_balance import PCD
from moo_balance.weighting.rows import RowWeighting
from tests.support.registry import METHODS

NAMES = ("a", "b", "c")


def test_all_methods_with_a_gramian_are_timed() -> None:
    """Of the registry only those are not that contain another one, or look at coordinates."""
    timed = {type(method) for method in gramian_methods(NAMES).values()}
    rows = {type(weighting) for row in METHODS if (weighting := row.make(NAMES)).uses_gramian}
    assert timed <= rows
    for cls in rows - timed:
        contains = {"weighting", "weightings"} & {field.name for field in dataclasses.fields(cls)}
        assert contains or issubclass(cls, RowWeighting)


def test_a_method_that_prefers_a_loss_gets_the_first() -> None:
    assert gramian_methods(NAMES)["PCD"] == PCD("a")


@pytest.mark.parametrize("name", gramian_methods(NAMES))
def test_a_step_gives_coefficients(name: str) -> None:
    step = own_step(gramian_methods(NAMES)[name], NAMES)
    for _ in range(3):
        coefficients = step()
        assert isinstance(coefficients, torch.Tensor)
        assert coefficients.shape == (3,)
        assert bool(coefficients.isfinite().all())


def test_peers_have_the_names_of_methods() -> None:
    pytest.importorskip("torchjd")
    names = list(gramian_methods(NAMES))
    available, left_out = peers(names)
    assert set(available) <= set(names)
    assert "MGDA" in available
    assert not set(available) & set(left_out)


def test_a_figure_beyond_its_budget_is_bold() -> None:
    entries = [
        {"method": "A", "losses": 2, "microseconds": BUDGETS[2] + 1.0, "TorchJD": 7.0},
        {"method": "B", "losses": 2, "microseconds": BUDGETS[2] - 1.0},
    ]
    text = section({"entries": entries, "left out": {"TorchJD X": "it is not there"}})
    assert "**61**" in text
    assert "| B      | 59     | –       |" in text
    assert "figures in bold exceed them: 1." in text
    assert text.endswith("Left out: TorchJD X. it is not there")


def test_a_quick_run_has_figures_for_two_losses() -> None:
    entries = run(Settings(quick=True, threads=1))["entries"]
    assert {entry["losses"] for entry in entries} == {2}
    assert {entry["method"] for entry in entries} == set(gramian_methods(NAMES))
