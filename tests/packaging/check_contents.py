"""What the wheel and the sdist hold: ``python -m tests.packaging.check_contents dist``."""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from pathlib import Path

from pathspec import GitIgnoreSpec

ROOT = Path(__file__).parents[2]
NOT_DISTRIBUTED = (".ci/", ".github/")
CACHES = ("__pycache__", ".pyc", "_build/", ".hypothesis", "_cache/", ".egg-info", ".venv")


def the_only(folder: Path, pattern: str) -> Path:
    found = [*folder.glob(pattern)]
    if len(found) != 1:
        sys.exit(f"{folder} should hold one {pattern}. Found {len(found)}. Run make dist.")
    return found[0]


def list_sources(root: Path) -> set[str]:
    """Files that belong to the project: all that .gitignore does not name."""
    ignored = GitIgnoreSpec.from_lines((root / ".gitignore").read_text().splitlines())
    sources = set()
    for folder, subfolders, files in os.walk(root):
        place = Path(folder).relative_to(root)
        subfolders[:] = [
            name
            for name in subfolders
            if name != ".git" and not ignored.match_file(f"{(place / name).as_posix()}/")
        ]
        names = {(place / name).as_posix() for name in files if name != ".git"}
        sources |= {name for name in names if not ignored.match_file(name)}
    return sources


def check_wheel(names: set[str], sources: set[str]) -> list[str]:
    """Complaints about a wheel: it holds the package, all of it, and nothing else."""
    package = {name for name in names if ".dist-info/" not in name}
    expected = {name for name in sources if name.startswith("moo_balance/")}
    complaints = compare(package, expected)
    if "moo_balance/py.typed" not in package:
        complaints.append("without moo_balance/py.typed")
    return complaints


def check_sdist(names: set[str], sources: set[str]) -> list[str]:
    """Complaints about an sdist: it holds the project without its CI, and no caches."""
    expected = {name for name in sources if not name.startswith(NOT_DISTRIBUTED)}
    cached = {name for name in names if any(cache in name for cache in CACHES)}
    return compare(names - {"PKG-INFO"}, expected) + [f"a cache: {name}" for name in sorted(cached)]


def compare(names: set[str], expected: set[str]) -> list[str]:
    missing = [f"missing: {name}" for name in sorted(expected - names)]
    return missing + [f"unexpected: {name}" for name in sorted(names - expected)]


def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sdist_names(sdist: Path) -> set[str]:
    """Names below the folder that an sdist unpacks into."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def main(folder: Path) -> int:
    sources = list_sources(ROOT)
    wheel, sdist = the_only(folder, "*.whl"), the_only(folder, "*.tar.gz")
    complaints = [f"{wheel.name}: {each}" for each in check_wheel(wheel_names(wheel), sources)]
    complaints += [f"{sdist.name}: {each}" for each in check_sdist(sdist_names(sdist), sources)]
    print(*complaints or ["wheel and sdist hold what they should"], sep="\n")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
