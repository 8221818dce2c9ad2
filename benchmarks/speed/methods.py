"""Time of each Gramian method from a Gramian to coefficients, next to TorchJD's and to budgets."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.speed.tables import table
from benchmarks.speed.timing import Budget, Runner, interleave
from moo_balance import weighting as package
from moo_balance.weighting import Statistics, Weighting

COUNTS = (2, 8, 32)
BUDGETS = {2: 60.0, 32: 2000.0}
"""Microseconds that a method may take for so many losses, on the host."""

PEER_ARGUMENTS: dict[str, dict[str, float]] = {"CAGrad": {"c": 0.4}, "FairGrad": {"alpha": 1.0}}
"""What TorchJD gives no default: ours."""

NAMES_A_LOSS = {"primary", "reference"}
"""Arguments without a default that name a loss: the first."""

GRAMIANS = 4

Step = Callable[[], object]


def gramian_methods(names: Sequence[str]) -> dict[str, Weighting]:
    """All methods of the package that a Gramian is enough for, with default arguments.

    A method that is about one loss gets the name of the first. Those that need another argument
    are left out: they contain one of the others.
    """
    found: dict[str, Weighting] = {}
    for name in sorted(package.__all__):
        cls = getattr(package, name)
        if not (inspect.isclass(cls) and issubclass(cls, Weighting)) or inspect.isabstract(cls):
            continue
        needed = {
            field.name
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if needed <= NAMES_A_LOSS:
            method = cls(**dict.fromkeys(needed, names[0]))
            needs = method.needs(0)
            if needs.gramian and needs.rows is None:
                found[name] = method
    return found


def peers(names: Sequence[str]) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """TorchJD's weightings of these methods that run, and why others do not."""
    if importlib.util.find_spec("torchjd") is None:
        return {}, {"TorchJD": "torchjd is not installed"}
    from torchjd import aggregation

    available: dict[str, Callable[[Tensor], Tensor]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        cls = getattr(aggregation, f"{name}Weighting", None)
        if cls is None:
            continue
        try:
            peer = cls(**PEER_ARGUMENTS.get(name, {}))
            peer(torch.eye(3))
        except Exception as error:
            left_out[f"TorchJD {name}"] = str(error).splitlines()[0]
        else:
            # One that has a state takes one number of losses only.
            available[name] = cls(**PEER_ARGUMENTS.get(name, {}))
    return available, left_out


def _gramians(count: int) -> Iterator[Tensor]:
    """Random Gramians in float32, as gradients give them, again and again."""
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randn(count, 2 * count + 8, generator=generator) for _ in range(GRAMIANS)]
    return cycle([row @ row.T for row in rows])


def own_step(method: Weighting, names: tuple[str, ...]) -> Step:
    """Steps of a method, each with the state that the one before has left."""
    gramians, losses = _gramians(len(names)), torch.ones(len(names))
    state, count = method.init(names, torch.device("cpu")), 0

    def step() -> object:
        nonlocal state, count
        answer = method.weights(Statistics(names, losses, next(gramians), count), state)
        state, count = answer.state, count + 1
        return answer.coefficients

    return step


def peer_step(peer: Callable[[Tensor], Tensor], count: int) -> Step:
    gramians = _gramians(count)
    return lambda: peer(next(gramians))


def run(settings: Settings) -> dict[str, Any]:
    entries = []
    left_out: dict[str, str] = {}
    budget = Budget(0.0, 1, 1) if settings.quick else Budget(10.0)
    for count in COUNTS[:1] if settings.quick else COUNTS:
        names = tuple(map(str, range(count)))
        methods = gramian_methods(names)
        others, left_out = peers(list(methods))
        runners = {f"our {name}": Runner(own_step(m, names)) for name, m in methods.items()}
        runners |= {f"peer {name}": Runner(peer_step(p, count)) for name, p in others.items()}
        seconds = interleave(runners, budget)
        entries += [
            {"method": name, "losses": count, "microseconds": _median(seconds, f"our {name}")}
            | ({"TorchJD": _median(seconds, f"peer {name}")} if name in others else {})
            for name in methods
        ]
    return {"entries": entries, "left out": left_out}


def _median(seconds: dict[str, list[float]], name: str) -> float:
    return 1e6 * median(seconds[name])


def section(results: dict[str, Any]) -> str:
    entries = results["entries"]
    counts = sorted({entry["losses"] for entry in entries})
    cells = {(entry["method"], entry["losses"]): entry for entry in entries}
    head = ["method", *(text for count in counts for text in (f"K = {count}", "TorchJD"))]
    rows = [
        [name, *(text for count in counts for text in _cells(cells[name, count]))]
        for name in dict.fromkeys(entry["method"] for entry in entries)
    ]
    budgets = ", ".join(f"{BUDGETS[k]:.0f} for K = {k}" for k in counts if k in BUDGETS)
    parts = [
        "Every method that uses a Gramian, with default arguments, from a float32 Gramian on the "
        "host to its coefficients: median microseconds, all taking turns. TorchJD's weighting is "
        "next to it where there is one of that name. The budgets are "
        f"{budgets}; {_verdict(entries)}.",
        table(head, rows),
    ]
    parts += [f"Left out: {name}. {reason}" for name, reason in results["left out"].items()]
    return "\n\n".join(parts)


def exceeds(entry: dict[str, Any]) -> bool:
    """Whether a method takes longer than its budget."""
    return bool(entry["microseconds"] > BUDGETS.get(entry["losses"], float("inf")))


def _cells(entry: dict[str, Any]) -> list[str]:
    own = f"{entry['microseconds']:.0f}"
    peer = f"{entry['TorchJD']:.0f}" if "TorchJD" in entry else "–"
    return [f"**{own}**" if exceeds(entry) else own, peer]


def _verdict(entries: list[dict[str, Any]]) -> str:
    beyond = sum(map(exceeds, entries))
    return f"figures in bold exceed them: {beyond}" if beyond else "no figure exceeds them"
