"""The table of supported versions keeps what was run."""

from __future__ import annotations

from dataclasses import replace

from tests.packaging.support import (
    Combination,
    Result,
    combinations,
    merge,
    read_results,
    write_page,
)

PASSED = Result("3.11.7", "pinned", "2.13.0", "2.4.6", "1.17.1", "10 passed")
NOT_RUN = replace(PASSED, torch="==2.13.0", outcome="not run: no wheel")


def test_a_page_returns_what_was_written(tmp_path):
    results = [PASSED, replace(NOT_RUN, label="newest", numpy="")]
    write_page(results, tmp_path / "support.md")
    assert read_results(tmp_path / "support.md") == results
    text = (tmp_path / "support.md").read_text()
    assert "| 3.11.7 | pinned | 2.13.0 | 2.4.6 | 1.17.1 | 10 passed |" in text
    assert "- Python 3.11.7, newest: PyTorch ==2.13.0, no wheel." in text


def test_results_of_another_version_of_the_package_are_dropped(tmp_path, monkeypatch):
    write_page([PASSED], tmp_path / "support.md")
    monkeypatch.setattr("moo_balance.__version__", "9.9.9")
    assert read_results(tmp_path / "support.md") == []
    assert read_results(tmp_path / "absent.md") == []


def test_a_run_replaces_an_older_one_and_no_run_replaces_none():
    failed = replace(PASSED, outcome="failed: 1 failed")
    assert merge([PASSED], [failed]) == [failed]
    assert merge([PASSED], [NOT_RUN]) == [PASSED]
    assert merge([NOT_RUN], [PASSED]) == [PASSED]
    assert merge([], [NOT_RUN]) == [NOT_RUN]


def test_rows_are_in_the_order_of_versions():
    older, newer = replace(PASSED, python="3.9.20"), replace(PASSED, python="3.12.1")
    assert merge([newer], [PASSED, older]) == [older, PASSED, newer]


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = combinations()[0]
    assert oldest == Combination("lower bounds", "~=2.6.0", "~=1.24.0", "~=1.10.0")
    assert oldest.requirements == ("torch~=2.6.0", "numpy~=1.24.0", "scipy~=1.10.0")
