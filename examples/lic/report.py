"""What a comparison found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from examples.lic.comparison import BALANCED, Plan, Run, Rung

SENTENCE = (
    "Rows of one λ share checkpoint, crops and noise: balancing takes that checkpoint to another "
    "rate, about where a plain sum with λ' goes, so any gain is in the last column alone (PSNR "
    "above fixed weights at the same rate; – where their rates do not reach), and as it changes "
    "with the seed, a run of minutes shows how balancing works, not whether it gains the few per "
    "cent that were published."
)

_COLUMNS = "{:<8}{:<20}{:>7}{:>9}{:>10}{:>16}{:>9}{:>9}"


def table(rungs: Sequence[Rung]) -> str:
    """One row for each model; for λ' see :func:`effective_lambda`, for the gap ``Rung.gap``."""
    names = ("λ", "method", "bpp", "PSNR/dB", "ms/step", "last w_R : w_D", "λ'", "gap/dB")
    lines = [_COLUMNS.format(*names)]
    for rung in rungs:
        lines.append("─" * len(lines[0]))
        lines.append(_row(rung, "checkpoint", rung.start))
        lines += [_row(rung, name, run) for name, run in rung.runs.items()]
    return "\n".join(lines)


def _row(rung: Rung, name: str, run: Run) -> str:
    gap = rung.gap(name) if name in BALANCED else None
    last = run.trace.last("weight")
    return _COLUMNS.format(
        f"{rung.lmbda:g}",
        name,
        f"{run.mean.bpp:.3f}",
        f"{run.mean.psnr:.2f}",
        f"{run.trace.milliseconds:.1f}",
        f"{last['rate']:.2f} : {last['distortion']:.2f}",
        f"{effective_lambda(rung.lmbda, run):.2g}",
        "" if name not in BALANCED else "–" if gap is None else f"{gap:+.2f}".replace("-", "−"),
    )


def effective_lambda(lmbda: float, run: Run) -> float:
    """The λ' of a plain sum whose gradient points where the run's settled coefficients do."""
    settled = run.trace.settled("coefficient")
    return lmbda * settled["distortion"] / settled["rate"]


def as_json(rungs: Sequence[Rung], plan: Plan) -> dict[str, Any]:
    """Everything that the table and the figures show, per image and per step."""
    return {"plan": asdict(plan), "rungs": [_rung_as_json(rung) for rung in rungs]}


def _rung_as_json(rung: Rung) -> dict[str, Any]:
    return {
        "lambda": rung.lmbda,
        "checkpoint": _run_as_json(rung.start, rung.lmbda),
        "runs": {name: _run_as_json(run, rung.lmbda) for name, run in rung.runs.items()},
        "gap_db": {name: rung.gap(name) for name in BALANCED},
    }


def _run_as_json(run: Run, lmbda: float) -> dict[str, Any]:
    history = run.trace.history
    keys = history.keys()
    return {
        **run.mean._asdict(),
        "images": {name: score._asdict() for name, score in run.scores.items()},
        "ms_per_step": run.trace.milliseconds,
        "effective_lambda": effective_lambda(lmbda, run),
        "history": {key: history.series(key)[1] for key in keys},
    }
