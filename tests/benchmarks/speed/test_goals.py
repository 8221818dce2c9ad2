"""Goals are reached or missed according to the figures."""

from __future__ import annotations

import pytest

from benchmarks.speed import goals
from benchmarks.speed.goals import GOALS, Goal
from benchmarks.speed.readings import ONE_PASS, PER_LOSS


def workload(name, count, one_pass=None, per_loss=None):
    def entries(figures):
        return {
            implementation: {"x plain": [plain] * 3, "x limit": [limit] * 3, "ms": [1.0] * 3}
            for implementation, (plain, limit) in (figures or {}).items()
        }

    groups = {
        ONE_PASS: {"implementations": entries(one_pass)},
        PER_LOSS: {"implementations": entries(per_loss)},
    }
    return {"name": name, "losses": count, "groups": groups}


RESULTS = {
    "step": {
        "workloads": [
            workload(
                "codec, K = 2",
                2,
                {"Sum": (1.0, 1.0), "FAMO, every 10": (1.05, 1.0), "MGDA at features": (1.2, 1.0)},
                {
                    "forward only": (0.4, 0.3),
                    "limit": (1.2, 1.0),
                    "MGDA": (1.3, 1.08),
                    "MGDA, streaming": (1.5, 1.25),
                    "TorchJD autojac, default": (1.95, 1.6),
                    "TorchJD autogram": (1.17, 1.0),
                },
            ),
            workload("ResNet, K = 8", 8, None, {"limit": (5.0, 1.0), "MGDA": (4.0, 0.8)}),
        ]
    },
    "imports": {
        "ours ms": {
            "import moo_balance": [12.0, 11.0, 13.0],
            "from moo_balance import *": [20.0, 19.0, 21.0],
        }
    },
}
EXPECTED = {
    "loss-only methods": {"Sum, codec, K = 2": 1.0},
    "FAMO, every 10": {"FAMO, every 10, codec, K = 2": 1.05},
    "exact Gramian methods": {"MGDA, codec, K = 2": 1.08, "MGDA, ResNet, K = 8": 0.8},
    "exact Gramian methods, codec": {"MGDA, codec, K = 2": 1.3},
    "features, codec": {"MGDA at features, codec, K = 2": 1.2},
    "compared with TorchJD's default, K = 2": {"codec, K = 2": 1.5},
    "compared with TorchJD's best setting": {"codec, K = 2": 0.9},
    "exact Gramian methods, K = 8 and 32": {"ResNet, K = 8": 0.8},
    "streaming, time": {"codec, K = 2": 0.5},
    "import time": {
        "`import moo_balance`": 12.0,
        "`from moo_balance import *`": 20.0,
    },
}


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.path)
def test_readings(goal):
    assert goal.read({}) == {}
    assert goal.read(RESULTS) == pytest.approx(EXPECTED.get(goal.path, {}))


def table_of(results):
    lines = [line for line in goals.section(results).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {path: (worst, verdict) for path, _, worst, verdict in cells}


def test_verdicts():
    rows = table_of(RESULTS)
    assert rows["loss-only methods"] == ("1.000 (Sum, codec, K = 2)", "reached")
    assert rows["FAMO, every 10"][1] == "missed by up to 2% in 1 of 1"
    assert rows["exact Gramian methods"] == (
        "1.080 (MGDA, codec, K = 2)",
        "missed by up to 5% in 1 of 2",
    )
    assert rows["compared with TorchJD's default, K = 2"] == ("1.500 (codec, K = 2)", "reached")
    assert rows["compared with TorchJD's best setting"][1] == "missed by up to 10% in 1 of 1"
    assert rows["exact Gramian methods, K = 8 and 32"][1] == "reached"
    assert rows["solvers, K = 2"] == ("–", "not measured")
    assert rows["methods with a Gramian, K = 32"] == ("–", "not measured")


def test_what_is_missed_is_explained_and_nothing_else():
    text = goals.section(RESULTS)
    for goal in GOALS:
        missed = any(goal.excess(value) > 0 for value in goal.read(RESULTS).values())
        assert (f"- **{goal.path}** ({goal.text}): " in text) == missed


def test_the_best_possible_figure_follows_each_missed_one():
    text = goals.section(RESULTS)
    assert "MGDA, codec, K = 2: 1.300 (1.200)." in text
    assert "FAMO, every 10, codec, K = 2: 1.050 (1.040)." in text
    assert text.count("In brackets: the limit itself.") == 1


def test_a_lower_bound_is_missed_from_below():
    goal = Goal("", "", 2.0, lambda results: {}, "", at_least=True)
    assert goal.excess(1.0) == 0.5
    assert goal.excess(3.0) < 0
