"""The measurement of step lengths runs, and shows what it is there to show."""

from __future__ import annotations

from benchmarks.step_length import Problem, ratio, report, train
from moo_balance import Rescaled, Sum, SumLog


def test_the_report_has_a_row_for_each_length(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.step_length.GRID", (1e-2,))
    lines = report(seeds=range(1), steps=2).splitlines()
    assert len([line for line in lines if line.startswith("| SGD, ")]) == 6
    assert "nan" not in "".join(lines)


def test_the_published_length_depends_on_the_scales_and_the_rescaled_one_does_not() -> None:
    scales = (1.0, 30.0, 1000.0)
    assert ratio(SumLog(), scales, range(1)) < 0.01
    assert abs(ratio(Rescaled(SumLog()), scales, range(1)) - 1) < 1e-3
    lefts = [
        train(Problem(0, scales), weighting, "SGD", 1e-4, 50)
        for weighting in (SumLog(), Rescaled(SumLog()), Sum())
    ]
    assert lefts[1] < lefts[0]
