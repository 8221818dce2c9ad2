"""Weights from a Gramian: their time, their accuracy, and conflicts of the direction."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.speed import methods
from benchmarks.speed.tables import loglog, table
from benchmarks.speed.timing import latency
from moo_balance.functional import analytic_qp_weights, min_norm_weights

TITLE = "Solvers"
OUR_MIN_NORM, OUR_QP = "min_norm_weights", "analytic_qp_weights"
COUNTS = (2, 4, 8, 16, 32, 64)
MAX_ENUMERATED = 8
CONFLICT = 1e-8
"""A direction conflicts with a gradient if their cosine is below minus this."""

Solver = Callable[[Tensor], Tensor]


def _random(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2 * count + 8, generator=generator, dtype=torch.float64)


def _ill_conditioned(count: int, seed: int) -> Tensor:
    """Singular values from 1 down to a millionth: a Gramian of condition 1e12."""
    left, _, right = torch.linalg.svd(_random(count, seed), full_matrices=False)
    return left @ torch.diag(torch.logspace(0, -6, count, dtype=torch.float64)) @ right


def _uneven(count: int, seed: int) -> Tensor:
    """Norms from 1 to a million, as those of rate and distortion may differ."""
    return torch.logspace(0, 6, count, dtype=torch.float64)[:, None] * _random(count, seed)


def _dependent(count: int, seed: int) -> Tensor:
    """More gradients than dimensions, so that the best combination may be zero."""
    return _random(count, seed)[:, : max(count // 2, 1)]


def _almost_equal(count: int, seed: int) -> Tensor:
    """One gradient, and others that differ from it by small orthogonal vectors."""
    rows = _random(count, seed)
    common = rows.mean(0, keepdim=True) / rows.mean(0).norm()
    return common + 1e-4 * (rows - (rows @ common.T) * common)


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "random": _random,
    "condition 1e12": _ill_conditioned,
    "lengths 1 to 1e6": _uneven,
    "dependent": _dependent,
    "almost equal": _almost_equal,
}


def slsqp(gramian: Tensor) -> Tensor:
    """SLSQP of scipy on the simplex, tolerance 1e-12."""
    from scipy.optimize import minimize

    matrix = gramian.numpy()
    matrix = matrix / np.abs(matrix).max()
    solution = minimize(
        lambda w: w @ matrix @ w,
        np.full(len(matrix), 1 / len(matrix)),
        jac=lambda w: 2 * matrix @ w,
        bounds=[(0, None)] * len(matrix),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    weights = np.clip(solution.x, 0, None)
    return torch.from_numpy(weights / weights.sum())


def enumeration(gramian: Tensor) -> Tensor:
    """Solve for every subset of the gradients, and return the best feasible solution."""
    matrix = gramian.numpy()
    best, least = np.full(len(matrix), 1 / len(matrix)), np.inf
    for size in range(1, len(matrix) + 1):
        for support in map(list, itertools.combinations(range(len(matrix)), size)):
            weights = np.zeros(len(matrix))
            weights[support] = _solve_on_support(matrix[np.ix_(support, support)])
            if (weights >= 0).all() and (value := weights @ matrix @ weights) < least:
                best, least = weights, value
    return torch.from_numpy(best)


def _solve_on_support(block: np.ndarray) -> np.ndarray:
    """Weights of sum 1 for which all products are equal: a bordered linear system."""
    size, scale = len(block), np.abs(block).max()
    system = np.ones((size + 1, size + 1))
    system[:size, :size], system[size, size] = block / scale, 0.0
    weights = np.linalg.lstsq(system, np.eye(size + 1)[size], rcond=None)[0][:size]
    return weights / weights.sum()


def solvers() -> tuple[dict[str, Solver], dict[str, str]]:
    """Return the solvers that are installed, and why the others are left out."""
    available: dict[str, Solver] = {OUR_MIN_NORM: min_norm_weights, OUR_QP: analytic_qp_weights}
    left_out: dict[str, str] = {}
    if importlib.util.find_spec("torchjd") is None:
        left_out["TorchJD"] = "torchjd is not installed"
    else:
        from torchjd.aggregation import MGDAWeighting, UPGradWeighting

        available["TorchJD MGDA"] = MGDAWeighting()
        try:
            available["TorchJD UPGrad"] = UPGradWeighting()
            available["TorchJD UPGrad"](torch.eye(2, dtype=torch.float64))
        except ImportError as error:
            available.pop("TorchJD UPGrad", None)
            left_out["TorchJD UPGrad"] = str(error).splitlines()[0]
    if importlib.util.find_spec("scipy") is None:
        left_out["scipy SLSQP"] = "scipy is not installed"
    else:
        available["scipy SLSQP"] = slsqp
    return {**available, "support enumeration": enumeration}, left_out


def gap(gramian: Tensor, weights: Tensor) -> float:
    r"""Duality gap of the min-norm problem, independent of all scales, in extended precision.

    :math:`\max_i (w^\top G w - (G w)_i) / (\|g_i\| \sigma)` with
    :math:`\sigma = \sum_j w_j \|g_j\|`; 0 at the solution.
    """
    matrix, w = gramian.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    norms = np.sqrt(np.diag(matrix))
    products = matrix @ w
    return float(max(((w @ products - products) / (norms * (w @ norms))).max(), 0.0))


def conflicts(gramian: Tensor, weights: Tensor) -> bool:
    """Whether the direction conflicts with a gradient by more than rounding."""
    matrix, w = gramian.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    norms = np.sqrt(np.diag(matrix))
    products = matrix @ w
    length = np.sqrt(max(w @ products, np.longdouble(0)))
    if length <= CONFLICT * (np.abs(w) @ norms):  # the direction is zero up to rounding
        return False
    return bool((products / (norms * length)).min() < -CONFLICT)


def run(settings: Settings) -> dict[str, Any]:
    counts = COUNTS[:2] if settings.quick else COUNTS
    seeds = 1 if settings.quick else 5
    chosen, left_out = solvers()
    entries = [
        _measure(name, solver, kind, count, seeds, settings.quick)
        for kind in KINDS
        for count in counts
        for name, solver in chosen.items()
        if name != "support enumeration" or count <= MAX_ENUMERATED
    ]
    return {"entries": entries, "left out": left_out, "methods": methods.run(settings)}


def _measure(
    name: str, solver: Solver, kind: str, count: int, seeds: int, quick: bool
) -> dict[str, Any]:
    entry: dict[str, Any] = {"solver": name, "kind": kind, "losses": count}
    times, gaps, conflicting, refused = [], [], 0, 0
    for seed in range(seeds):
        rows = KINDS[kind](count, seed)
        gramian = rows @ rows.T
        try:
            weights = solver(gramian)
        except Exception:
            refused += 1
            continue
        times.append(latency(lambda: solver(gramian), 0.0 if quick else 0.1))  # noqa: B023
        conflicting += conflicts(gramian, weights)
        gaps.append(gap(gramian, weights))
    if times:
        entry |= {"microseconds": 1e6 * median(times), "gap": max(gaps)}
    return entry | {"conflicts": conflicting, "refused": refused, "gramians": seeds}


def section(results: dict[str, Any]) -> str:
    entries = results["entries"]
    names = list(dict.fromkeys(entry["solver"] for entry in entries))
    counts = sorted({entry["losses"] for entry in entries})
    parts = [
        "Median microseconds for a float64 Gramian on the host, over all kinds of Gramian; the "
        f"enumeration goes up to K = {MAX_ENUMERATED}:",
        table(
            ["K", *map(str, counts)], [[n, *(_time(entries, n, k) for k in counts)] for n in names]
        ),
        "Largest duality gap over all K, relative to the norms of the gradients and computed in "
        "extended precision, and the number of directions that conflict with a gradient, or of "
        "Gramians without an answer. The gap is that of the min-norm problem; the analytic QP and "
        "UPGrad solve other problems, so that for them it only says how different their answer is:",
        table(
            ["", *KINDS],
            [[name, *(_exactness(entries, name, kind) for kind in KINDS)] for name in names],
        ),
        "![Latency of the solvers](figures/benchmarks/solvers.svg)",
    ]
    parts += [f"Left out: {name}. {reason}" for name, reason in results["left out"].items()]
    if "methods" in results:  # older figures have none
        parts.append(methods.section(results["methods"]))
    return "\n\n".join(parts)


def times(entries: list[dict[str, Any]], name: str, count: int) -> list[float]:
    """Microseconds, one figure for each kind of Gramian."""
    return [
        entry["microseconds"]
        for entry in entries
        if (entry["solver"], entry["losses"]) == (name, count) and "microseconds" in entry
    ]


def _time(entries: list[dict[str, Any]], name: str, count: int) -> str:
    measured = times(entries, name, count)
    return f"{median(measured):.0f}" if measured else "–"


def _exactness(entries: list[dict[str, Any]], name: str, kind: str) -> str:
    own = [e for e in entries if (e["solver"], e["kind"]) == (name, kind)]
    gaps = [entry["gap"] for entry in own if "gap" in entry]
    total = sum(entry["gramians"] for entry in own)
    text = f"{max(gaps):.1e}" if gaps else "–"
    for key, words in (("conflicts", "conflict"), ("refused", "no answer")):
        if number := sum(entry[key] for entry in own):
            text += f"; {number} of {total} {words}"
    return text


def figures(results: dict[str, Any]) -> dict[str, Any]:
    entries = results["entries"]
    curves: dict[str, dict[float, float]] = {}
    for entry in entries:
        measured = times(entries, entry["solver"], entry["losses"])
        if measured:
            curves.setdefault(entry["solver"], {})[entry["losses"]] = median(measured) * 1e-6
    return {"solvers": loglog(curves, "number of losses K", "seconds", base=2)}
