"""Install wheel and sdist into empty environments and test them there.

``python -m tests.packaging.check_dist dist``, minutes: each environment installs PyTorch. The sdist
is also unpacked, and a part of its tests runs from there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from tests.packaging.check_contents import the_only
from tests.packaging.environments import CONSTRAINTS, FAST_TESTS, create, install, run


def check_installed(archive: Path, folder: Path, extra: str = "") -> Path:
    """Install an archive, test what was installed, and return the environment's interpreter."""
    start = perf_counter()
    python = create(folder / f"environment-of-{archive.suffix[1:]}")
    install(python, "--constraint", CONSTRAINTS, f"{archive.resolve()}{extra}")
    script = shutil.copy(Path(__file__).with_name("installed.py"), folder)
    result = run(python, "-I", script, cwd=folder, check=False)
    print(f"{archive.name}: {result.stdout}", end="")
    if result.returncode:
        sys.exit(f"{archive.name} does not work where it is installed")
    print(f"{archive.name}: {perf_counter() - start:.0f} s", flush=True)
    return python


def check_unpacked(sdist: Path, python: Path, folder: Path) -> None:
    """Run tests from the sdist, which has to hold all that they read."""
    shutil.unpack_archive(sdist, folder / "unpacked")
    (root,) = (folder / "unpacked").iterdir()
    result = run(python, "-m", "pytest", "--quiet", *FAST_TESTS, cwd=root, check=False)
    print(f"{sdist.name}, unpacked: {result.stdout.strip().splitlines()[-1]}")
    if result.returncode:
        sys.exit(result.stdout)


def main(dist: Path) -> None:
    wheel, sdist = the_only(dist, "*.whl"), the_only(dist, "*.tar.gz")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_installed(wheel, folder)
        python = check_installed(sdist, folder, "[test]")
        check_unpacked(sdist, python, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
