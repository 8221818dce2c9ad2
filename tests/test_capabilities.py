"""The page of capabilities follows the tests; a partial run neither checks nor records it."""

from __future__ import annotations

import pytest

from tests.support import capabilities
from tests.support.capabilities import METHODS, page, table

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from moo_balance import FAMO, Sum
from tests.support.registry import over_some

@pytest.mark.capability("flying")
@over_some("FAMO-adam", "Sum")
def test_flying(method): pass

@pytest.mark.capability("diving")
@pytest.mark.parametrize("weighting", [FAMO()])
class TestDiving:
    def test_deep(self, weighting): pass
    def test_deeper(self, weighting): pass

@pytest.mark.capability("resting")
def test_resting(): pass

def test_something_else(): pass
"""

SHOWN = {"flying": ["FAMO", "Sum"], "diving": ["FAMO"], "resting": []}


@pytest.fixture
def run(pytester, monkeypatch):
    """A test run of its own, with a page of its own."""
    page_file = pytester.path / "capabilities.md"
    monkeypatch.setattr(capabilities, "PAGE", page_file)
    monkeypatch.setattr(capabilities, "ROOT", pytester.path)
    pytester.makepyprojecttoml("""
        [tool.pytest.ini_options]
        testpaths = ["tests"]
        addopts = ["-m", "not slow"]
        markers = ["capability(name)", "slow"]
    """)
    folder = pytester.mkdir("tests")

    def run(tests=TESTS, shown=SHOWN, arguments=()):
        (folder / "test_file.py").write_text(tests)
        page_file.write_text(page(shown))
        return pytester.inline_run("-p", "tests.support.capability_plugin", *arguments).ret

    run.page_file = page_file
    return run


def test_rows_of_the_table_name_the_methods():
    lines = table({"flying": METHODS, "Diving": ["Sum", "FAMO"], "resting": []}).splitlines()
    assert lines[2:] == ["| Diving | `FAMO`, `Sum` |", "| flying | all methods |", "| resting |  |"]


def test_a_full_run_that_shows_what_the_page_says_passes(run):
    assert run() == pytest.ExitCode.OK


@pytest.mark.parametrize(
    "claimed", [{}, {**SHOWN, "swimming": []}, {**SHOWN, "diving": ["Sum"]}], ids=str
)
def test_a_full_run_that_shows_something_else_fails_until_the_page_is_written(run, claimed):
    assert run(shown=claimed) == pytest.ExitCode.TESTS_FAILED
    capabilities.main()
    assert run.page_file.read_text() == page(SHOWN)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "flying"],
        ["tests"],
        ["-m", ""],
        ["--collect-only"],
        ["--deselect", "tests/test_file.py::test_resting"],
    ],
    ids=str,
)
def test_a_partial_run_is_not_compared_with_the_page(run, arguments):
    assert run(shown={}, arguments=arguments) == pytest.ExitCode.OK
    with pytest.raises(SystemExit, match="make test"):
        capabilities.main()


@pytest.mark.parametrize(
    "verdict",
    [
        '@pytest.mark.capability("x")\ndef test_x(): pytest.skip()',
        'pytest.skip("all of it", allow_module_level=True)',
    ],
)
def test_a_run_that_skips_tests_is_not_compared_with_the_page(run, verdict):
    assert run(TESTS + verdict, shown={}) != pytest.ExitCode.TESTS_FAILED


def test_a_full_run_needs_no_slow_tests(run):
    slow = "@pytest.mark.slow\ndef test_slow(): pass"
    assert run(TESTS + slow, shown={}) == pytest.ExitCode.TESTS_FAILED
