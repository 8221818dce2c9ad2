"""What intervals allow one to say, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from examples.lic.bd import Interval
from examples.lic.study.analysis import OWN, Finding

WORDS = {
    -1: "better",
    0: "not distinguishable",
    1: "worse",
    None: "too little to say",
}
"""By :meth:`Finding.sign`."""

MEANING = {
    -1: "Here its adaptivity pays.",
    0: "What it does here is find an effective λ by itself, and nothing beyond that is seen.",
    1: "Here adapting the weights costs bits.",
    None: "Nothing can be said about its adaptivity.",
}
"""The same, when the rival are the solution's own mean weights."""


def signed(value: float, digits: int) -> str:
    """A number with its sign, and a minus that is one."""
    return f"{value:+.{digits}f}".replace("-", "−")


def with_interval(interval: Interval | None, digits: int, unit: str) -> str:
    if interval is None:
        return "–"
    low, high = signed(interval.low, digits), signed(interval.high, digits)
    return f"{signed(interval.mean, digits)} {unit} [{low}, {high}]"


def agreement(interval: Interval | None) -> str:
    """How many seeds lie on the side of zero where the mean lies."""
    if interval is None:
        return "–"
    same = sum(value * interval.mean > 0 for value in interval.by_seed)
    return f"{same} of {len(interval.by_seed)}"


def measured(finding: Finding) -> str:
    """The figure that the verdict rests on: the BD-rate, or where there is none the PSNR."""
    if finding.rate is not None:
        return f"BD-rate {with_interval(finding.rate, 1, '%')}"
    if finding.gap is not None:
        return f"{with_interval(finding.gap, 2, 'dB')} at equal rate"
    return "no curves that could be compared"


def reading(findings: Sequence[Finding]) -> str:
    """What one solution shows in one experiment, rival by rival; all of them, none left out."""
    own = next(f for f in findings if f.rival == OWN)
    others = [f"against {f.rival} {WORDS[f.sign()]} ({measured(f)})"
              for f in findings if f.rival != OWN]  # fmt: skip
    return (
        f"{own.solution} against its own mean weights held constant: {WORDS[own.sign()]} "
        f"({measured(own)}). {MEANING[own.sign()]} It comes out {'; '.join(others)}."
    )


def summary(findings: Iterable[Finding]) -> list[str]:
    """Where adaptivity pays, where it merely finds an effective λ, and where it costs."""
    heads = {
        -1: "Adaptivity pays (fewer bits than the run's own mean weights held constant)",
        0: "An effective λ is all that is seen (not distinguishable from own mean weights)",
        1: "Adapting costs (more bits than own mean weights)",
        None: "Too little to say",
    }
    own = [f for f in findings if f.rival == OWN]
    lines = []
    for sign, head in heads.items():
        where = [f"{f.experiment}, {f.solution}" for f in own if f.sign() == sign]
        if where or sign is not None:
            lines.append(f"- {head}: {'; '.join(where) or 'nowhere'}.")
    return lines


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
