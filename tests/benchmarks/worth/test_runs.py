"""The runs of the worth benchmark: they resume, and end in a page."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.worth import __main__ as command, measure, runs
from benchmarks.worth.arms import NULL, PLAIN
from benchmarks.worth.page import write
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.results import compute
from benchmarks.worth.runs import Comparison, Job, Plan, Store
from benchmarks.worth.training import Outcome

ARMS = (
    "Sum",
    "GradientNorms",
    "GradientNorms(every=10)",
    "UncertaintyWeighting",
    "SumLog",
    "SumLog(floor=0)",
    NULL.name,
    PLAIN.name,
)
PLAN = Plan(trials=3, pilots=1, seeds=1, null_seeds=1, steps=1, arms=ARMS)


def finish(comparison: Comparison) -> list[Job]:
    """Run what is missing in this process; the jobs that were run."""
    done = []
    for stage in comparison.stages():
        for job in stage:
            if job not in comparison.stores[job.problem]:
                comparison.stores[job.problem].add(job, runs.run(job))
                done.append(job)
    comparison.save()
    return done


@pytest.mark.filterwarnings("ignore")
def test_runs_resume_from_the_file_and_give_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "REPLICATES", 20)
    first = finish(Comparison(PLAN, tmp_path))
    assert {job.problem for job in first} == set(PROBLEMS)
    assert finish(Comparison(PLAN, tmp_path)) == []
    more = finish(Comparison(replace(PLAN, seeds=2), tmp_path))
    assert {job.seed for job in more} == {2}

    comparison = Comparison(PLAN, tmp_path)
    write(comparison, compute(comparison), tmp_path)
    page = (tmp_path / "worth.md").read_text()
    assert all(problem.title in page for problem in PROBLEMS.values())
    assert not re.search(r"\bnan\b", page)
    assert (tmp_path / "figures" / "worth" / "worth.svg").stat().st_size > 1000


def test_results_of_another_source_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("vlmop2", "Sum", 0.1, 1, None)
    store = Store("vlmop2", tmp_path)
    store.add(job, Outcome(float("inf"), 0.5, 1e-3, "BalanceError: broke off"))
    store.save()
    assert Store("vlmop2", tmp_path)[job] == Outcome(
        float("inf"), 0.5, 1e-3, "BalanceError: broke off"
    )
    monkeypatch.setattr(runs, "_digest", lambda problem: "another")
    assert job not in Store("vlmop2", tmp_path)


def test_only_code_counts_for_the_key_of_results() -> None:
    loop = ast.parse("def train():\n    'Train.'\n    for _ in range(9):\n        step()\n")
    described = ast.parse(ast.unparse(loop).replace("Train.", "Train a model."))
    changed = ast.parse(ast.unparse(loop).replace("step()", "skip()"))
    assert runs.dump_code(loop) == runs.dump_code(described) != runs.dump_code(changed)


def test_the_command_stops_when_its_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--short", "--steps", "2", "--hours", "0", "--workers", "1"])
    assert "goes on from here" in capsys.readouterr().out
