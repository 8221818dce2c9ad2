"""The benchmark runs, so that it cannot rot; its figures are not the tests' business."""

from __future__ import annotations

from benchmarks.__main__ import BARE, LIMIT, METHODS, main, report


def test_smoke(capsys):
    main(["--rounds", "1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in (BARE, LIMIT, *METHODS))
    assert "medians of 1 interleaved rounds of 1 steps" in printed


def test_ratios_are_taken_within_a_round():
    seconds = {BARE: [1.0, 4.0, 2.0], "Sum": [1.01, 4.04, 2.02], "AnalyticQP": [2.0, 8.0, 4.0]}
    lines = report(seconds).splitlines()
    assert "1.010   <= 1.02 met" in lines[2]
    assert "2.000   <= 1.30 MISSED" in lines[3]
