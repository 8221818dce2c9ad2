"""Test versions of Python, PyTorch, NumPy and SciPy, and write docs/support.md.

``python -m tests.packaging.support``. Each combination has an environment of its own, with a fast
part of the tests. A PyTorch whose wheel is not on this machine is not installed: most registries
have CUDA builds only, of several GB with what they need. PIP_FIND_LINKS names folders of wheels;
with ``--download`` everything is installed that can be had. Results of other runs stay in the page,
unless the version of the package has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import moo_balance
from tests.packaging.environments import CONSTRAINTS, FAST_TESTS, ROOT, create, install, run

PAGE = ROOT / "docs" / "support.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
DATA = re.compile(r"<!-- results: (.*) -->")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Combination:
    """Versions to install together, as requirements of pip."""

    label: str
    torch: str
    numpy: str
    scipy: str

    @property
    def requirements(self) -> tuple[str, ...]:
        named = (("torch", self.torch), ("numpy", self.numpy), ("scipy", self.scipy))
        return tuple(f"{name}{version}" for name, version in named)


@dataclass(frozen=True)
class Result:
    """What the tests said of a combination, with the versions that pip chose."""

    python: str
    label: str
    torch: str
    numpy: str
    scipy: str
    outcome: str


def pin_of(name: str) -> str:
    """The version of a library that constraints.txt names."""
    return re.search(rf"^{name}==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)[1]


def lower_bound(name: str) -> str:
    """The oldest version of a library that pyproject.toml allows."""
    return re.search(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def combinations() -> list[Combination]:
    """Oldest, newest, and between them what the project is developed with.

    Oldest means the last patch release of the lower bound, which may have wheels for more versions
    of Python than the first.
    """
    old = [f"~={lower_bound(name)}.0" for name in ("torch", "numpy", "scipy")]
    now = [f"=={pin_of(name)}" for name in ("torch", "numpy", "scipy")]
    return [
        Combination("lower bounds", *old),
        Combination("lower bounds, pinned PyTorch", now[0], *old[1:]),
        Combination("pinned", *now),
        Combination("newest, pinned PyTorch", now[0], "", ""),
        Combination("newest", f">{pin_of('torch')}", "", ""),
    ]


def find_pythons() -> dict[str, Path]:
    """Interpreters by version: this one, those on PATH, and those that pyenv has installed."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in PYTHONS:
        candidates = [*sorted(pyenv.glob(f"{version}.*/bin/python"))]
        candidates += [Path(path) for path in (shutil.which(f"python{version}"),) if path]
        for candidate in candidates:
            if version_of(candidate).startswith(f"{version}."):
                found[version] = candidate
                break
    found["{}.{}".format(*sys.version_info)] = Path(sys.executable)
    return dict(sorted(found.items(), key=lambda item: PYTHONS.index(item[0])))


def version_of(python: Path) -> str:
    command = (python, "-c", "import platform; print(platform.python_version())")
    return run(*command, cwd=ROOT, check=False).stdout.strip()


def is_at_hand(python: Path, requirement: str) -> bool:
    """Whether pip finds a wheel without a registry."""
    return install(
        python,
        "--dry-run",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        requirement,
        check=False,
    )


def test_combination(
    python: Path, combination: Combination, folder: Path, download: bool
) -> Result:
    """Make an environment, install, and run the tests."""

    def result(outcome: str, **versions: str) -> Result:
        asked = asdict(combination) | versions
        return Result(version_of(python), **asked, outcome=outcome)

    if not (download or is_at_hand(python, combination.requirements[0])):
        return result(f"{NOT_RUN}: no wheel of this PyTorch on the machine")
    own = create(folder / "environment", python)
    extra = f"{ROOT}[test]"
    if not install(own, *combination.requirements, extra, check=False):
        return result(f"{NOT_RUN}: pip finds no such combination")
    outcome = run(own, "-m", "pytest", "--quiet", *FAST_TESTS, cwd=ROOT, check=False).stdout
    print(outcome[-2000:], flush=True)
    last = outcome.strip().splitlines()[-1]
    passed = re.fullmatch(r"=* ?(\d+ passed(?:, \d+ (?:skipped|deselected))*).*", last)
    return result(passed[1] if passed else f"failed: {last.strip('= ')}", **versions_in(own))


def versions_in(python: Path) -> dict[str, str]:
    names = ("torch", "numpy", "scipy")
    script = f"import json, {', '.join(names)}; "
    script += "print(json.dumps({" + ", ".join(f"'{n}': {n}.__version__" for n in names) + "}))"
    return json.loads(run(python, "-W", "ignore", "-c", script, cwd=ROOT).stdout)


def read_results(page: Path) -> list[Result]:
    """Results of the same version of the package that the page has; none if it has others."""
    match = DATA.search(page.read_text()) if page.exists() else None
    stored = json.loads(match[1]) if match else {"version": None, "results": []}
    if stored["version"] != moo_balance.__version__:
        return []
    return [Result(**row) for row in stored["results"]]


def merge(old: list[Result], new: list[Result]) -> list[Result]:
    """New results in place of old ones of the same combination; a run counts more than none."""
    rows = {(each.python, each.label): each for each in old}
    for each in new:
        if each.outcome.startswith(NOT_RUN):
            rows.setdefault((each.python, each.label), each)
        else:
            rows[each.python, each.label] = each
    return sorted(rows.values(), key=lambda each: [int(part) for part in each.python.split(".")])


HEAD = """<!-- written by `make support` -->

# Tested versions

The package requires Python 3.10 or newer and the lower bounds in `pyproject.toml`. This page says
which versions have been tested together: each row is an environment of its own, in which a fast
part of the library's tests ran in one process, on the CPU. Nothing is known of combinations that
were not run. `make support` tests again what can be had on a machine, and keeps the other rows.

| Python | versions | PyTorch | NumPy | SciPy | tests |
| --- | --- | --- | --- | --- | --- |
"""

FOOT = """
PyTorch is installed only if its wheel is already on the machine (`PIP_FIND_LINKS`), because most of
its wheels come with several gigabytes of CUDA libraries; `python -m tests.packaging.support
--download` installs it all the same. The whole suite runs with the versions of `constraints.txt`.
"""


def write_page(results: list[Result], page: Path) -> None:
    rows = "".join(
        f"| {each.python} | {each.label} | {each.torch} | {each.numpy} | {each.scipy} "
        f"| {each.outcome} |\n"
        for each in results
        if not each.outcome.startswith(NOT_RUN)
    )
    absent = "".join(
        f"- Python {each.python}, {each.label}: PyTorch {each.torch}, "
        f"{each.outcome.removeprefix(f'{NOT_RUN}: ')}.\n"
        for each in results
        if each.outcome.startswith(NOT_RUN)
    )
    if absent:
        rows += f"\nNot run:\n\n{absent}"
    data = {"version": moo_balance.__version__, "results": [asdict(each) for each in results]}
    page.write_text(f"{HEAD}{rows}{FOOT}\n<!-- results: {json.dumps(data)} -->\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--download", action="store_true", help="install any PyTorch")
    parser.add_argument("--only", help="versions of PyTorch that start so, such as ==2.13")
    options = parser.parse_args()
    new = []
    for version, python in find_pythons().items():
        for combination in combinations():
            if options.only and not combination.torch.startswith(options.only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                result = test_combination(python, combination, Path(folder), options.download)
            print(version, combination.label, "->", result.outcome, flush=True)
            new.append(result)
            write_page(merge(read_results(PAGE), [result]), PAGE)
    return any(result.outcome.startswith("failed") for result in new)


if __name__ == "__main__":
    sys.exit(main())
