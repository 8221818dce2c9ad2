"""What balancing costs: ``python -m benchmarks.speed``, or some of its parts.

Each part prints its tables and saves its figures as JSON. At the end, the page docs/benchmarks.md
is written from all figures that were saved.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.settings import Settings, environment
from benchmarks.speed.page import PARTS, read_results, setting, write, write_results

ROOT = Path(__file__).parents[2]
PAGE = "page"


def _part(name: str) -> str:
    if name not in (*PARTS, PAGE):
        raise argparse.ArgumentTypeError(f"should be one of {', '.join((*PARTS, PAGE))}")
    return name


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("should be a whole number, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument(
        "parts",
        nargs="*",
        type=_part,
        metavar="PART",
        help=f"of {', '.join(PARTS)}, and {PAGE}, which measures nothing (default: all of them)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, to check that it runs")
    parser.add_argument("--threads", type=_count, default=1, help="of PyTorch (default: 1)")
    parser.add_argument(
        "--results", type=Path, help="folder of the JSON (default: benchmarks/speed/results/DEVICE)"
    )
    parser.add_argument("--docs", type=Path, help="folder of the page (default: docs)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    settings = Settings(args.quick, args.threads)
    device = settings.device.type
    # A quick run must not overwrite real figures.
    quick = Path("runs/benchmarks")
    results = args.results or (quick if args.quick else Path(__file__).parent / "results" / device)
    docs = args.docs or (quick if args.quick else ROOT / "docs")

    torch.set_num_threads(settings.threads)
    measured_on = environment(settings)  # before the benchmarks themselves load the machine
    for part in [part for part in args.parts or PARTS if part != PAGE]:
        _measure(part, settings, results, measured_on)
    measured = read_results(results)
    if not measured:
        parser.error(f"nothing has been measured in {results} yet; leave out `{PAGE}` to do so")
    page = docs / ("benchmarks.md" if device == "cpu" else f"benchmarks_{device}.md")
    if not args.parts or PAGE in args.parts:
        write(measured, page, docs / "figures" / page.stem)
        print(f"\n{page}")


def _measure(part: str, settings: Settings, folder: Path, measured_on: dict[str, object]) -> None:
    start = time.perf_counter()
    saved = write_results(folder, part, measured_on, PARTS[part].run(settings))
    print(f"\n## {PARTS[part].TITLE}\n\n{setting(measured_on)}\n")
    print(PARTS[part].section(saved["results"]))
    print(f"\n{folder / part}.json, after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
