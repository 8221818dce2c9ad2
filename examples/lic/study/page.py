"""The page: every number in it comes from the results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.lic.bd import OVERLAP, POINTS
from examples.lic.study.analysis import SEEDS, Finding, mean_curve
from examples.lic.study.figures import stem
from examples.lic.study.sentences import WORDS, agreement, listed, reading, summary, with_interval

FIGURES = "figures/lic"
METHOD = Path(__file__).with_name("method.md").read_text(encoding="utf-8")

TEXTS = {
    "fine-tuned": "All runs of a seed go on from one standard checkpoint, so that no curve profits "
        "from the longer training of another.",
    "from scratch": "All runs of a seed begin with the same random weights.",
    "far from balance": "As fine-tuned, but the checkpoint was trained with a λ far above the "
        "trade-offs that the balanced runs then head for.",
    "from scratch, longer": "As from scratch, with more steps, and the learning rate that was "
        "tuned for fewer.",
}  # fmt: skip


def page(
    results: Mapping[str, Any],
    found: Sequence[Finding],
    shown: Collection[str],
    parts: Mapping[str, str],
) -> str:
    """The whole page in Markdown.

    Args:
        results: Of the study.
        found: Its findings.
        shown: File stems of the figures that there are.
        parts: Sections of the example's other parts, by title.
    """
    blocks = [
        *_opening(results, found),
        *_setup(results),
        *_tuning(results),
        *(_experiment(name, results, found, shown) for name in _done(results)),
        _figure("bd-rates", "BD-rates of all comparisons, with their intervals."),
        *(f"## {title}\n\n{text}" for title, text in parts.items()),
        _method(found),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _done(results: Mapping[str, Any]) -> list[str]:
    return [name for name, experiment in results["experiments"].items() if experiment["seeds"]]


def _opening(results: Mapping[str, Any], found: Sequence[Finding]) -> list[str]:
    head = (
        "# Learned image compression: the evidence\n\n"
        "What does balancing rate and distortion gain on a small codec and real photographs? This "
        "page is written by `make lic-report` from the results of its runs, and no number in it "
        "by hand. A negative BD-rate means that the balanced run needs fewer bits."
    )
    rivals = list(dict.fromkeys(f.rival for f in found))
    rows = []
    for (experiment, solution), group in groupby(found, lambda f: (f.experiment, f.solution)):
        words = {f.rival: WORDS[f.sign()] for f in group}
        rows.append((experiment, solution, *(words.get(rival, "") for rival in rivals)))
    matrix = table(("", "", *(f"against {rival}" for rival in rivals)), rows)
    return [head, "## In short", "\n".join(summary(found)), matrix, _by_chance(found)]


def _by_chance(found: Sequence[Finding]) -> str:
    told = [f for f in found if f.sign() is not None]
    better, worse = (sum(f.sign() == s for f in told) for s in (-1, 1))
    return (
        f"Of {len(told)} comparisons, {better} came out better, {worse} worse, and "
        f"{len(told) - better - worse} not distinguishable. Better or worse means that the 95 % "
        f"interval leaves out zero and that each of at least {SEEDS} seeds agrees. Where nothing "
        "differed at all, "
        f"about {0.05 * len(told):.1f} of {len(told)} intervals would leave out zero by chance; "
        "and comparisons of one solution share its runs."
    )


def _setup(results: Mapping[str, Any]) -> list[str]:
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rows = [
        ("trained on", listed(about["trained on"])),
        ("evaluated on", f"{listed(about['held out'])}, in full, symbols and pixels rounded"),
        ("codec", f"mean-scale hyperprior, widths {about['widths'][0]} and {about['widths'][1]}"),
        ("batch", f"{about['batch']} crops of {about['crop']} × {about['crop']} pixels, "
                  "where nothing else is said"),
        ("optimizer", "Adam, gradients of norm 1 except where clipping was tuned; the learning "
                      "rate falls to 0.3 of itself at 70 % and again at 90 % of the steps"),
        ("machine", f"{about['processor']}, {about['cores']} cores; at most "
                    f"{about['workers']} process{'es' * (about['workers'] > 1)} of one thread"),
        ("versions", versions),
        ("date", about["date"]),
    ]  # fmt: skip
    experiments = [
        (
            name,
            _start(experiment),
            experiment["steps"],
            experiment["batch"],
            ", ".join(experiment["seeds"]),
            f"{_minutes(experiment):.0f}",
        )
        for name, experiment in results["experiments"].items()
        if experiment["seeds"]
    ]
    head = ("experiment", "starts from", "steps", "batch", "seeds", "minutes in steps")
    return ["## Setup", table(("", ""), rows), table(head, experiments)]


def _start(experiment: Mapping[str, Any]) -> str:
    if experiment["start"] is None:
        return "random weights"
    lmbda, steps = experiment["start"]
    return f"standard, λ = {lmbda:g}, {steps} steps"


def _minutes(experiment: Mapping[str, Any]) -> float:
    """Time in steps as the clock saw it; curves that two solutions share count once."""
    distinct = {
        (run["lambda"], run["steps"], run["milliseconds"])
        for unit in experiment["seeds"].values()
        for curves in unit.values()
        for curve in curves.values()
        for run in curve
    }
    return sum(steps * milliseconds for _, steps, milliseconds in distinct) / 60_000


def _tuning(results: Mapping[str, Any]) -> list[str]:
    costs = results["seconds per step"]
    ratios = [
        f"a step of {name} takes {cost / costs['standard']:.2f} standard ones"
        for name, cost in costs.items()
        if name != "standard"
    ]
    rows = [
        (family, len(cells), f"{cells[0]['lr']:g}", _clip(cells[0]),
         f"{_regret(cells):.1f} %")
        for family, cells in results["tuning"].items()
    ]  # fmt: skip
    return [
        "## Learning rates, clipping and the cost of a step",
        "The standard run's are tuned together, on a seed that is not evaluated, and judged by R + "
        "λD on the training photographs. All other runs take its learning rate, which favours the "
        "standard run if anybody, and gradients of norm 1. The last column says how much larger "
        "the loss of the worst cell was.",
        table(("tuned for", "cells", "learning rate", "gradient", "worst cell"), rows),
        f"Measured side by side, in CPU time on one thread: {listed(ratios)}. In equal time the "
        "standard run takes as many more steps as the slower solution costs.",
    ]


def _clip(cell: Mapping[str, Any]) -> str:
    return "norm 1" if cell["clip"] is None else f"clipped at {cell['clip']:g}"


def _regret(cells: Sequence[Mapping[str, Any]]) -> float:
    return 100 * (cells[-1]["loss"] / cells[0]["loss"] - 1)


def _experiment(
    name: str, results: Mapping[str, Any], found: Sequence[Finding], shown: Collection[str]
) -> str:
    experiment = results["experiments"][name]
    mine = [f for f in found if f.experiment == name]
    rows = [
        (f.solution, f.rival, with_interval(f.rate, 1, "%"),
         _overlap(f), with_interval(f.gap, 2, "dB"), agreement(f.gap))
        for f in mine
    ]  # fmt: skip
    head = ("", "against", "BD-rate [95 %]", "overlap", "PSNR at its rates", "seeds that agree")
    return "\n\n".join(
        [
            f"## {name.capitalize()}",
            TEXTS.get(name, ""),
            table(head, rows),
            *(reading(list(group)) for _, group in groupby(mine, lambda f: f.solution)),
            *_refused(mine),
            "Where each solution lands: its λ, and λ′, the price at which a plain sum has the "
            "coefficients that the run settled on. Means over seeds and photographs.",
            table(("", "λ", "λ′", "bpp", "PSNR/dB"), _landings(experiment)),
            *(
                _figure(stem(kind, name), caption)
                for kind, caption in CAPTIONS.items()
                if stem(kind, name) in shown
            ),
        ]
    )


CAPTIONS = {
    "rd": "Rate and PSNR, mean over the photographs; single seeds faint, their mean strong.",
    "course": "Losses, improvement speeds (relative decrease per step) and λ′, the price that the "
        "weights amount to; running means of one seed, each solution beside its own mean weights "
        "held constant.",
}  # fmt: skip


def _overlap(finding: Finding) -> str:
    return f"{finding.overlap:.0%}" if finding.rate else "–"


def _refused(found: Sequence[Finding]) -> list[str]:
    refused = [f for f in found if f.rate is None and f.refusals]
    if not refused:
        return []
    return [
        f"{len(refused)} pairs have no BD-rate, since their mean curves or more than a tenth of "
        f"the bootstrap's cannot be compared. An example: *{refused[0].refusals[0]}*"
    ]


def _landings(experiment: Mapping[str, Any]) -> list[Sequence[object]]:
    rows = []
    for solution, lambdas in experiment["lambdas"].items():
        curves = [unit[solution]["balanced"] for unit in experiment["seeds"].values()]
        for index, lmbda in enumerate(lambdas):
            effective = fmean(curve[index]["effective_lambda"] for curve in curves)
            bpp, psnr = mean_curve(curves)[index]
            rows.append((solution, f"{lmbda:g}", f"{effective:.2g}", f"{bpp:.3f}", f"{psnr:.2f}"))
    return rows


def _figure(stem: str, caption: str) -> str:
    return f"![{caption}]({FIGURES}/{stem}.png)\n\n*{caption}*"


def _method(found: Sequence[Finding]) -> str:
    seeds = sorted({len(f.gap.by_seed) for f in found if f.gap is not None})
    with_seeds = f"With {' or '.join(map(str, seeds))} seeds they" if seeds else "They"
    return METHOD.format(
        points=POINTS, overlap=f"{OVERLAP:.0%}", with_seeds=with_seeds, least=SEEDS
    )
