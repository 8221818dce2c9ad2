"""Records which capabilities the passing tests show: ``@pytest.mark.capability("DDP")``.

Methods are those that a test is parametrized with, and those that the mark names after it.

Only a full run counts: nothing selected, left out, skipped or failed. Then the record goes to
pytest's cache, and the run fails if docs/capabilities.md says something else.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from moo_balance.weighting import Weighting
from tests.support.capabilities import RECORD, is_current


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config), "capability recorder")


def pytest_itemcollected(item: pytest.Item) -> None:
    # Properties travel with the report, from the worker processes of pytest-xdist too.
    for mark in item.iter_markers("capability"):
        name, *methods = mark.args
        item.user_properties.append(("capability", (name, [*methods, *_methods(item)])))


def _methods(item: pytest.Item) -> list[str]:
    """The methods that a test was parametrized with, if any: rows of the registry, or instances."""
    callspec = getattr(item, "callspec", None)
    values = () if callspec is None else callspec.params.values()
    rows = [row.id.split("-")[0] for row in values if hasattr(row, "make")]
    return [*rows, *(type(value).__name__ for value in values if isinstance(value, Weighting))]


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.shown: dict[str, set[str]] = defaultdict(set)
        self.is_full = (
            config.args_source is pytest.Config.ArgsSource.TESTPATHS
            and config.option.markexpr == "not slow"
            and not config.option.collectonly
        )
        self.is_stale = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.is_full &= report.passed

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.is_full &= all(item.get_closest_marker("slow") for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == "capability":
                self.is_full &= report.passed
                name, methods = value
                self.shown[name].update(methods)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        cache = getattr(self.config, "cache", None)
        if cache is None or not self.is_full or exitstatus != pytest.ExitCode.OK:
            return
        shown = {name: sorted(methods) for name, methods in sorted(self.shown.items())}
        cache.set(RECORD, shown)
        if not is_current(shown):
            self.is_stale = True
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.is_stale:
            terminalreporter.write_line(
                "docs/capabilities.md is not what the tests showed. "
                "Write it with `python -m tests.support.capabilities`.",
                red=True,
            )
