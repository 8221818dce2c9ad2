"""The benchmark of losses that capture log methods runs."""

from __future__ import annotations

from benchmarks import capture


def test_the_table_has_a_row_for_each_method() -> None:
    methods = {"SumLog": capture.METHODS["SumLog"], "first": capture.REFERENCES["0.1 of first"]}
    lines = capture.report(methods, seeds=1, steps=2).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| method", "| ---", "| SumLog", "| first"]
    assert "nan" not in "".join(lines)
