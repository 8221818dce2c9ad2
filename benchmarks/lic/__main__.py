"""Run experiments on learned image compression, and write the page of their results.

    python -m benchmarks.lic                                  # all, under two hours
    python -m benchmarks.lic --only Ablations --output runs/ablations
    python -m benchmarks.lic --page-only --docs docs          # from docs/lic_report.json
    python -m benchmarks.lic --quick                          # seconds, to see that it works

A study that was stopped continues where it was, if it is started with the same --output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lic import report
from benchmarks.lic.cache import CacheError
from benchmarks.lic.engine import Engine
from benchmarks.lic.study import Setting, full, tiny
from examples.lic import images
from examples.lic.images import Photographs
from examples.lic.options import FAULTS, describe, number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen experiments and write their page; return the exit code."""
    options = _parse(arguments)
    docs = options.docs or options.output
    try:
        if not options.page_only:
            _run(options.setting, options, docs / report.RESULTS)
        print(report.write(report.load(docs / report.RESULTS), docs))
    except (CacheError, *FAULTS) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def _run(setting: Setting, options: argparse.Namespace, path: Path) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    photographs = setting.crop(_photographs(options))
    engine = Engine(photographs, options.output, options.workers, say)
    for results in setting.run(engine, options.only or setting.titles):
        # The docs are not touched before the end.
        report.save(options.output / report.RESULTS, results)
    report.save(path, results)


def _photographs(options: argparse.Namespace) -> Photographs:
    if options.images is None:
        return images.bundled()
    return images.from_folders(options.images, options.eval_images, crop=128)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny experiments, to see that it works, in seconds")
    add("--only", nargs="+", metavar="TITLE", help="titles of experiments, such as Ablations")
    add("--images", type=Path, metavar="DIR", help="train on this folder, not on bundled images")
    add("--eval-images", type=Path, metavar="DIR",
        help="held out; if not given, the last fifth of --images by name")  # fmt: skip
    add("--output", type=Path, metavar="DIR", default=Path("runs/lic-report"),
        help="for results and checkpoints; finished ones are kept (%(default)s)")  # fmt: skip
    add("--docs", type=Path, metavar="DIR",
        help="for page, figures and the JSON file (the folder of --output)")  # fmt: skip
    add("--workers", type=number(int), metavar="N", default=1,
        help="processes of one thread each (%(default)s)")  # fmt: skip
    add("--page-only", action="store_true", help="run nothing, write the page from the JSON file")
    options = parser.parse_args(arguments)
    options.setting = tiny() if options.quick else full()
    titles = options.setting.titles
    if unknown := set(options.only or ()) - set(titles):
        parser.error(f"--only should name some of {', '.join(titles)}. Found {', '.join(unknown)}.")
    if options.eval_images is not None and options.images is None:
        parser.error("--eval-images needs --images")
    return options


if __name__ == "__main__":
    sys.exit(main())
