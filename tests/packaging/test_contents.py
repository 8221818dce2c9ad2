"""Faults in a distribution are found, by name."""

from __future__ import annotations

import pytest

from tests.packaging.check_contents import check_sdist, check_wheel, list_sources

SOURCES = {"moo_balance/__init__.py", "moo_balance/py.typed", "tests/test_a.py", ".ci/run"}
WHEEL = {"moo_balance/__init__.py", "moo_balance/py.typed", "moo_balance-1.dist-info/METADATA"}
SDIST = {"PKG-INFO", "moo_balance/__init__.py", "moo_balance/py.typed", "tests/test_a.py"}


def test_what_is_complete_passes():
    assert not check_wheel(WHEEL, SOURCES)
    assert not check_sdist(SDIST, SOURCES)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tests/test_a.py"}, "unexpected: tests/test_a.py"),
        ({"moo_balance/__init__.py"}, "missing: moo_balance/__init__.py"),
        ({"moo_balance/py.typed"}, "without moo_balance/py.typed"),
    ],
)
def test_a_wheel_holds_the_package_and_nothing_else(change, complaint):
    assert complaint in check_wheel(WHEEL ^ change, SOURCES)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tests/test_a.py"}, "missing: tests/test_a.py"),
        ({".ci/run"}, "unexpected: .ci/run"),
        ({"tests/__pycache__/a.pyc"}, "a cache: tests/__pycache__/a.pyc"),
    ],
)
def test_an_sdist_holds_the_project_without_caches(change, complaint):
    assert complaint in check_sdist(SDIST ^ change, SOURCES)


def test_ignored_files_and_those_of_git_are_no_sources(tmp_path):
    for name in ("a.py", "b/c.py", "b/c.pyc", "dist/d.whl", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("*.pyc\ndist/\n")
    assert list_sources(tmp_path) == {".gitignore", "a.py", "b/c.py"}
