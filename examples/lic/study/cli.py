"""The command line of the study.

::

    python -m examples.lic.study            # everything; as long as the page says
    python -m examples.lic.study --short    # a minute or so, to see that it works
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from examples.lic.options import positive
from examples.lic.store import StoreError, atomically
from examples.lic.study import analysis, figures, page, results, scales
from examples.lic.study.conduct import PARTS, Conduct

RESULTS = "lic_report.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its page; returns the exit code."""
    options = _parse(arguments)
    docs = options.docs or options.folder
    try:
        if options.page_only:
            write(results.load(docs / RESULTS), docs)
            return 0
        # A study under way leaves the docs alone.
        progress = partial(results.save, options.folder / RESULTS)
        found = Conduct(options.scale(), options.folder, options.workers, progress)()
        results.save(docs / RESULTS, found)
        print(write(results.load(docs / RESULTS), docs))
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(found: Mapping[str, Any], docs: Path) -> Path:
    """Write the page and its figures; returns the page's path."""
    findings = list(analysis.findings(found))
    drawn, sections = figures.figures(found, findings), {}
    own = list(drawn)
    for title, part in found["parts"].items():
        module = import_module(PARTS[title])
        sections[title] = module.section(part)
        drawn |= module.figures(part)
    for stem, figure in drawn.items():
        atomically(docs / page.FIGURES / f"{stem}.png", partial(_draw, figure))
    path, text = docs / "lic_report.md", page.page(found, findings, own, sections)
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def _draw(figure: Figure, path: Path) -> None:
    """A small file, since these are kept with the sources: few pixels, few colours."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    Image.open(buffer).convert("RGB").quantize(48).save(path, format="png", optimize=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.lic.study",
        description="Run the experiments, and write the page of what they found.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_const", dest="scale", const=scales.short,
        help="a minute or two, to see that it works")  # fmt: skip
    size.add_argument("--tiny", action="store_const", dest="scale", const=scales.tiny,
        help="seconds, for the tests")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("runs/lic-report"), metavar="DIR",
        help="for results; what is finished there is not run again (%(default)s)")  # fmt: skip
    parser.add_argument("--docs", type=Path, metavar="DIR",
        help="where page, figures and results in one file go (the folder)")  # fmt: skip
    parser.add_argument("--page-only", action="store_true",
        help="run nothing, write the page from the results in one file")  # fmt: skip
    parser.add_argument("--workers", type=positive(int), default=1, metavar="N",
        help="processes of one thread each (%(default)s)")  # fmt: skip
    parser.set_defaults(scale=scales.full)
    return parser.parse_args(arguments)
