"""The results of a study in one JSON file, and the page written from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from benchmarks.lic import (
    ablations_page,
    cache,
    refinement_page,
    solutions_page,
    variable_rate_page,
)
from benchmarks.lic.cache import CacheError
from benchmarks.lic.figures import Drawing
from benchmarks.lic.findings import MIN_SEEDS, Finding, compare_all
from benchmarks.lic.solutions import OWN
from benchmarks.lic.solutions_page import WORDS
from benchmarks.lic.statistics import holm
from benchmarks.lic.text import join, table, with_interval
from examples.lic.bd import OVERLAP, POINTS
from examples.lic.checkpoint import write_atomically

Results = Mapping[str, Any]

RESULTS, PAGE, FIGURES = "lic_report.json", "lic_report.md", "figures/lic"
METHOD = Path(__file__).with_name("method.md").read_text(encoding="utf-8")
DIGITS = 5
"""Significant digits that are kept."""

PAGES: Mapping[str, ModuleType] = {
    "solutions": solutions_page,
    "ablations": ablations_page,
    "variable_rate": variable_rate_page,
    "refinement": refinement_page,
}
"""The module that shows an experiment, by the ``"kind"`` of its data."""


def save(path: Path, results: Results) -> None:
    """Write the results, rounded."""
    text = json.dumps(_round(results), separators=(",", ":"), ensure_ascii=False)
    # A line for each run, so that two versions of the file can be compared.
    for first in ('{"lambda"', '{"title"', '{"group"'):
        text = text.replace(first, f"\n{first}")
    cache.write(path, text + "\n")


def load(path: Path) -> Results:
    """Read them back.

    Raises:
        CacheError: There is no such file, or it holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        kinds = {data["kind"] for data in results["experiments"].values()}
        if unknown := kinds - set(PAGES):
            raise ValueError(f"unknown kind {', '.join(unknown)}")
        results["about"]["held out"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"{path} holds no results of a study ({error}). Run it first.") from error
    return results


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    return value


def write(results: Results, docs: Path) -> Path:
    """Write the page and its figures; return the page's path."""
    text, drawings = page(results)
    for drawing in drawings:
        write_atomically(docs / FIGURES / f"{drawing.stem}.png", drawing.png())
    cache.write(docs / PAGE, text)
    return docs / PAGE


def page(results: Results) -> tuple[str, list[Drawing]]:
    """The page in Markdown, and its figures; every number comes from `results`."""
    findings = list(compare_all(results["experiments"]))
    blocks, drawings = [*_opening(findings), *_setup(results), *_tuning(results)], []
    for title, data in results["experiments"].items():
        module = PAGES[data["kind"]]
        blocks += [f"## {title}", module.section(title, data)]
        drawn = list(module.figures(title, data))
        blocks += map(_image, drawn)
        drawings += drawn
    if findings:
        drawings.append(solutions_page.intervals(findings))
        blocks += ["## All comparisons", _image(drawings[-1])]
    method = METHOD.format(points=POINTS, overlap=f"{OVERLAP:.0%}", least=MIN_SEEDS)
    text = "\n\n".join(block.strip() for block in [*blocks, method])
    return text + "\n", drawings


def _image(drawing: Drawing) -> str:
    return f"![{drawing.caption}]({FIGURES}/{drawing.stem}.png)\n\n*{drawing.caption}*"


def _opening(findings: Sequence[Finding]) -> Iterator[str]:
    yield (
        "# Learned image compression: what balancing gains\n\n"
        "What does it gain to balance rate and distortion, for a small codec and real photographs? "
        "`make lic-report` runs the experiments and writes this page from their results; no "
        "result in it is written by hand. The runs take minutes, and their codecs are weak: read "
        "the limits at the end."
    )
    if not findings:
        return
    yield "## In short"
    yield from _adapting([f for f in findings if f.baseline == OWN])
    yield "Verdicts on all baselines:"
    baselines = list(dict.fromkeys(f.baseline for f in findings))
    rows = []
    for (experiment, solution), group in groupby(findings, lambda f: (f.experiment, f.solution)):
        words = {f.baseline: WORDS[f.verdict] for f in group}
        rows.append((experiment, solution, *(words.get(b, "") for b in baselines)))
    yield table(("", "", *(f"against {b}" for b in baselines)), rows)
    yield _how_sure(findings)


def _adapting(own: Sequence[Finding]) -> Iterator[str]:
    """What adapting the weights is worth: against the run's own mean weights, held constant."""
    corrected = holm([f.gap.p if f.gap else 1.0 for f in own])
    head = ("", "", "PSNR at equal rate [95 %]", "p", "p corrected", "verdict")
    rows, sure, hints = [], [], []
    for f, p in zip(own, corrected, strict=True):
        verdict = WORDS[f.verdict]
        ps = ("–", "–") if f.gap is None else (f"{f.gap.p:.2g}", f"{p:.2g}")
        rows.append((f.experiment, f.solution, with_interval(f.gap, 2, "dB"), *ps, verdict))
        if f.verdict:
            name = f"{f.experiment.lower()}, {f.solution} ({verdict})"
            (sure if p < 0.05 else hints).append(name)
    yield "Adapting the weights, against the run's own mean weights held constant:"
    yield table(head, rows)
    yield (
        f"Corrected for {len(own)} comparisons by Holm's procedure. Differences that remain: "
        f"{'; '.join(sure) or 'none'}. Hints that do not: {'; '.join(hints) or 'none'}."
    )


def _how_sure(findings: Sequence[Finding]) -> str:
    told = [f for f in findings if f.verdict is not None]
    better, worse = (sum(f.verdict == sign for f in told) for sign in (-1, 1))
    if not told:
        return f"No comparison has the {MIN_SEEDS} seeds that a verdict needs."
    widths = [f.gap.interval.high - f.gap.interval.mean for f in told]
    return (
        f"Of {len(told)} comparisons, {better} came out better, {worse} worse, and "
        f"{len(told) - better - worse} not distinguishable. Better or worse means that the 95 % "
        "t-interval over seeds of the PSNR at equal rate excludes zero. If nothing differed at "
        f"all, about {0.05 * len(told):.1f} of {len(told)} intervals would exclude it by chance; "
        "and comparisons of one solution share its runs. Not distinguishable does not mean equal: "
        f"the intervals are ± {min(widths):.2f} to ± {max(widths):.2f} dB wide, half of them more "
        f"than ± {median(widths):.2f} dB, and smaller differences cannot be seen here."
    )


def _setup(results: Results) -> Iterator[str]:
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    workers = about["workers"]
    yield "## Setup"
    yield table(("", ""), [
        ("trained on", join(about["trained on"])),
        ("evaluated on", f"{join(about['held out'])}, symbols and pixels rounded"),
        ("codec", f"mean-scale hyperprior, widths {about['widths'][0]} and {about['widths'][1]}"),
        ("batch", f"{about['batch']} crops of {about['crop']} × {about['crop']} pixels"),
        ("optimizer", "Adam, gradients of norm 1 except where clipping was tuned; the learning "
                      "rate falls to 0.3 of itself at 70 % and again at 90 % of the steps"),
        ("machine", f"{about['processor']}, {about['cores']} cores; at most "
                    f"{workers} process{'es' * (workers > 1)} of one thread"),
        ("versions", versions),
        ("date", about["date"]),
    ])  # fmt: skip
    rows = [
        (title, _start(data), data["steps"], ", ".join(data["seeds"]), f"{_minutes(data):.0f}")
        for title, data in results["experiments"].items()
        if data["kind"] == "solutions"
    ]
    if rows:
        yield table(("experiment", "starts from", "steps", "seeds", "minutes in steps"), rows)


def _start(data: Results) -> str:
    if data["start"] is None:
        return "random weights"
    lmbda, steps = data["start"]
    return f"standard, λ = {lmbda:g}, {steps} steps"


def _minutes(data: Results) -> float:
    """Time in steps as the clock saw it; runs that two curves share count once."""
    distinct = {
        (run["lambda"], run["steps"], run["milliseconds"])
        for solutions in data["seeds"].values()
        for curves in solutions.values()
        for curve in curves.values()
        for run in curve
    }
    return sum(steps * milliseconds for _, steps, milliseconds in distinct) / 60_000


def _tuning(results: Results) -> Iterator[str]:
    if not results.get("tuning"):
        return
    costs = results["seconds per step"]
    ratios = [
        f"a step of {name} takes {cost / costs['standard']:.2f} standard ones"
        for name, cost in costs.items()
        if name != "standard"
    ]
    rows = [
        (title, len(cells), f"{cells[0]['lr']:g}", _clip(cells[0]["clip"]),
         f"{100 * (cells[-1]['loss'] / cells[0]['loss'] - 1):.1f} %")
        for title, cells in ((title, data["cells"]) for title, data in results["tuning"].items())
    ]  # fmt: skip
    yield "## Learning rates, clipping and the cost of a step"
    yield (
        "Learning rate and clipping of the standard run are tuned together, on a seed that is not "
        "evaluated, by R + λD on the training photographs. All other runs take its learning rate, "
        "which can only favour the standard run, and gradients of norm 1. The last column: by how "
        "much the loss of the worst cell was larger."
    )
    yield table(("tuned for", "cells", "learning rate", "gradient", "worst cell"), rows)
    yield (
        f"Measured in turn, in CPU time on one thread: {join(ratios)}. In equal time the standard "
        "run takes as many more steps as the slower solution costs."
    )


def _clip(clip: float | str) -> str:
    return "norm 1" if clip == "unit" else f"clipped at {clip:g}"
