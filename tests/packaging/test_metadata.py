"""Files that state the same facts agree: metadata, citation, pins, workflows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import moo_balance

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIG["project"]
EXTRAS = PROJECT["optional-dependencies"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = [
    match[1]
    for match in (re.fullmatch(r".* :: (3\.\d+)", each) for each in PROJECT["classifiers"])
    if match
]


def read_requirements() -> list[Requirement]:
    listed = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    parsed = [Requirement(each) for each in listed]
    return [each for each in parsed if each.name != PROJECT["name"]]


def read_pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in pins}


def test_the_citation_agrees_with_the_metadata():
    assert CITATION["version"] == moo_balance.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["abstract"].lower().startswith("a plugin for pytorch optimizers")
    assert [each["name"] for each in CITATION["authors"]] == [
        each["name"] for each in PROJECT["authors"]
    ]


def test_the_lowest_python_is_the_first_that_is_listed():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert CONFIG["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert CONFIG["tool"]["pyright"]["pythonVersion"] == PYTHONS[0]


@pytest.mark.parametrize("requirement", read_requirements(), ids=lambda each: each.name)
def test_every_requirement_has_a_lower_bound_and_a_pin_that_meets_it(requirement):
    assert [each.operator for each in requirement.specifier] == [">="]
    (pin,) = read_pins()[requirement.name].specifier
    assert Version(pin.version) in requirement.specifier


def test_pins_are_sorted_and_unique():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert names == sorted(set(names))


def test_the_extra_for_development_holds_all_others():
    (own,) = (Requirement(each) for each in EXTRAS["dev"] if each.startswith(PROJECT["name"]))
    assert own.extras == EXTRAS.keys() - {"dev"}


in_a_clone = pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")


@in_a_clone
def test_hosted_ci_runs_what_ci_runs_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (check,) = (job for job in workflow["jobs"].values() if "strategy" in job)
    assert check["strategy"]["matrix"]["python"] == PYTHONS
    assert any("bash .ci/run" in step.get("run", "") for step in check["steps"])


@in_a_clone
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist_with_least_rights_and_no_secrets(path):
    text = path.read_text()
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    used = {name for line in re.findall(r"\bmake ([\w -]+)", text) for name in line.split()}
    assert used <= {*targets.split()}
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets." not in text
