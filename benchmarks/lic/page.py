"""The page docs/lic_report.md, from the summaries in the files of results only."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count as count_from
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import norm, t

from benchmarks import markdown
from benchmarks.lic.experiments import TITLES
from benchmarks.lic.figures import draw_curves, draw_forest
from benchmarks.lic.store import read
from examples.lic.checkpoint import write_atomically

PAGE, FIGURES = "lic_report.md", "figures/lic"
METHOD = Path(__file__).with_name("method.md").read_text(encoding="utf-8")

INTRODUCTION = (
    "<!-- Written by `python -m benchmarks.lic --docs docs`. -->\n"
    "# Learned image compression: what balancing gains\n\n"
    "Rate and distortion balanced as in three papers, by a small codec that takes minutes to train "
    "(`examples/lic`), and how large a gain or loss the runs exclude. "
    "`make lic-report` runs the experiments and writes this page; no number in it is written by "
    "hand. Solution 1 is `BalancedTrajectory`, and Solution 2 `AnalyticQP`. What b, ± and "
    "*excluded* mean is said [at the end](#how-a-difference-is-measured); J is R + λ · D."
)

NOTHING = "No experiment has been run yet with this version: `make lic-report` does so."

HEAD = ("", "compared", "{}", "excluded", "p (Holm)", "the paper reports")

Content = Mapping[str, Any]


def write(results: Path, docs: Path) -> Path:
    """Write the page and its figures; returns the page's path."""
    files = {path.stem: read(path) for path in results.glob("*.json")}
    contents = {name: files[name] for name in TITLES if "summary" in files.get(name, {})}
    for name, figure in figures(contents).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        write_atomically(docs / FIGURES / f"{name}.png", buffer.getvalue())
    write_atomically(docs / PAGE, page(contents).encode())
    return docs / PAGE


def figures(contents: Mapping[str, Content]) -> dict[str, Figure]:
    """By file name."""
    summaries = [content["summary"] for content in contents.values()]
    groups = {
        s["title"]: [row for row in s["comparisons"] if "error" not in row]
        for s in summaries
        if s["measure"] == "b"
    }
    drawn = {}
    for summary in summaries:
        if "curves" in summary:
            drawn["curves"] = draw_curves(summary["curves"])
    if any(groups.values()):
        drawn["differences"] = draw_forest({k: rows for k, rows in groups.items() if rows})
    return drawn


def page(contents: Mapping[str, Content]) -> str:
    """The whole page in Markdown."""
    blocks = [INTRODUCTION, *(_opening(contents) if contents else [NOTHING])]
    for content in contents.values():
        blocks += _section(content["summary"])
    return "\n\n".join(block.strip() for block in [*blocks, METHOD]) + "\n"


def _opening(contents: Mapping[str, Content]) -> Iterator[str]:
    rows = [
        ({**row, "setting": f"{content['summary']['title']}, {row['setting']}"})
        for content in contents.values()
        if content["summary"]["measure"] == "b"
        for row in content["summary"]["comparisons"]
    ]
    if nulls := [row for row in rows if row["null"]]:
        yield "## Null pairs"
        yield (
            "Both sides of a null pair have the same kind of constant weights, and differ in rate "
            "only. The right answer is 0: the interval should contain it."
        )
        yield comparisons(nulls, "b")
        hits = [abs(row["mean"]) <= row["half"] for row in nulls if "error" not in row]
        yield (
            f"{sum(hits)} of {len(hits)} intervals contain 0. Each misses it with a probability of "
            "5 %."
        )
    planned, sure = _select_planned(rows)
    yield "## In short"
    yield (
        f"Of {len(planned)} planned comparisons of bits at equal PSNR, {len(sure)} differ from 0 "
        "after Holm's correction within their section."
    )
    if planned:
        halves = [row["half"] for row in planned]
        yield (
            f"Intervals are ± {min(halves):.2f} to ± {max(halves):.2f} % wide, half of them no "
            f"wider than ± {median(halves):.2f} %."
        )
    if sure:
        yield comparisons(sure, "b")
    counts = [line for c in contents.values() for line in _other_measure(c["summary"])]
    if counts:
        yield "\n".join(f"- {line}" for line in counts)
    if planned:
        yield f"![All differences with their intervals.]({FIGURES}/differences.png)"
    yield _cost(contents)


def _select_planned(rows: Sequence[Content]) -> tuple[list[Content], list[Content]]:
    """The planned comparisons, which have a corrected p-value, and those that differ from 0."""
    planned = [row for row in rows if "holm" in row]
    return planned, [row for row in planned if row["holm"] < 0.05]


def _other_measure(summary: Content) -> Iterator[str]:
    """The count of differences of a section that does not measure bits at equal PSNR."""
    planned, sure = _select_planned(summary["comparisons"])
    if planned and summary["measure"] != "b":
        losses = sum(row["mean"] > 0 for row in sure)
        yield (
            f"{summary['title']}, by {summary['measure']}: planned comparisons {len(planned)}, "
            f"gains {len(sure) - losses}, losses {losses}, undecided {len(planned) - len(sure)}."
        )


def _cost(contents: Mapping[str, Content]) -> str:
    minutes = {c["summary"]["title"]: c["summary"]["minutes"] for c in contents.values()}
    parts = ", ".join(f"{title} {value:.1f}" for title, value in minutes.items())
    codes = [content["code"] for content in contents.values()]
    versions = {f"moo_balance {c['moo_balance']}, PyTorch {c['torch']}" for c in codes}
    sources = {code["sources"] for code in codes}
    machines = {f"{c['environment']['processor']}" for c in contents.values()}
    return (
        f"CPU-minutes on one thread each: {parts}. Run with {' and '.join(sorted(versions))}, "
        f"source code {', '.join(sorted(sources))}, on {' and '.join(sorted(machines))}. Runs that "
        "two sections share count in both."
    )


def _section(summary: Content) -> Iterator[str]:
    yield f"## {summary['title']}"
    yield summary["about"]
    if rows := [row for row in summary["comparisons"] if not row["null"]]:
        yield comparisons(rows, summary["measure"])
        yield from cost_of_one_per_cent(rows, summary["minutes"])
    for table in summary["tables"]:
        yield f"{table['caption']}:"
        yield markdown.table(table["head"], table["rows"])
    if "curves" in summary:
        yield f"![Rate and PSNR, means over the photographs.]({FIGURES}/curves.png)"


def cost_of_one_per_cent(rows: Sequence[Content], minutes: float) -> Iterator[str]:
    """What a half-width of 1 % would cost, where no comparison or not each has it."""
    wide = [row for row in rows if "error" not in row and 1.0 < row["half"] < math.inf]
    if wide:
        widest = max(wide, key=lambda row: row["half"])
        count = values_for_one_per_cent(widest["deviation"])
        hours = minutes / 60 * count / widest["count"]
        yield (
            f"Intervals wider than ± 1 %: {len(wide)} of {len(rows)}. The widest, "
            f"± {widest['half']:.2f} %, has {widest['count']} values (seeds, or photographs where "
            f"each is a value). For ± 1 % it would take about {count}, with which this section "
            f"would cost {60 * hours:.0f} CPU-minutes in place of {minutes:.1f}."
        )


def values_for_one_per_cent(deviation: float) -> int:
    """How many values with this standard deviation have a mean known to ± 1 % at 95 %."""
    least = max(2, math.floor((norm.ppf(0.975) * deviation) ** 2))  # a quantile of t is larger
    return next(n for n in count_from(least) if t.ppf(0.975, n - 1) * deviation <= math.sqrt(n))


def comparisons(rows: Sequence[Content], measure: str) -> str:
    """A table of comparisons."""
    return markdown.table([cell.format(measure) for cell in HEAD], [_row(row) for row in rows])


def _row(row: Content) -> tuple[str, ...]:
    first = (row["setting"], row["name"])
    if "error" in row:
        return (*first, "–", f"no estimate: {row['error']}", "", _paper(row, "not tested"))
    p = f"{row['holm']:.2g}" if "holm" in row else ""
    difference = f"{row['mean']:+.2f} ± {row['half']:.2f} %".replace("-", "−")
    low, high = row["mean"] - row["half"], row["mean"] + row["half"]
    paper = _paper(row, "not excluded")
    if row["paper"] is not None and not low <= row["paper"] <= high:
        paper = _paper(row, "excluded here")
    return (*first, difference, describe_bound(low, high), p, paper)


def _paper(row: Content, verdict: str) -> str:
    if row["paper"] is None:
        return ""
    return f"{row['paper']:+.2f} %: {verdict}".replace("-", "−")


def describe_bound(low: float, high: float) -> str:
    """What an interval of differences excludes; a gain is negative."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "nothing"
    gain = "any gain" if low > 0 else f"a gain above {abs(low):.2g} %"
    loss = "any loss" if high < 0 else f"a loss above {high:.2g} %"
    if low > 0:
        return f"{gain}; a loss below {low:.2g} % or above {high:.2g} %"
    if high < 0:
        return f"{loss}; a gain below {-high:.2g} % or above {-low:.2g} %"
    return f"{gain} and {loss}"
