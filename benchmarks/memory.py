"""Peak memory of a step: each contestant in a fresh process, or by the accelerator's allocator."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import counts
from benchmarks.contestants import LIMIT, PLAIN, Stand, Step
from benchmarks.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.processes import fresh
from benchmarks.settings import Settings
from benchmarks.step_cost import CONTESTANTS, first_words
from benchmarks.tables import table
from benchmarks.workloads import TINY, Workload, codec, mlp, resnet

TITLE = "Peak memory"
MIB = 2**20
MAKES: tuple[Callable[[], Workload], ...] = (
    partial(codec, channels=128, latent_channels=192),
    partial(mlp, 2, width=1024),
    partial(mlp, 8, width=1024),
    partial(mlp, 32, width=1024),
    partial(resnet, 8),
)
NAMES = (
    *(PLAIN, LIMIT, "Sum", "FAMO, lagged", "MGDA at features", "AnalyticQP", "MGDA"),
    *("MGDA, streaming", AUTOJAC, CHUNKS, MTL, AUTOGRAM),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
_STEPS = 2
_M_MMAP_THRESHOLD = -3


class Job(NamedTuple):
    """What one process measures."""

    make: Callable[[], Workload]
    name: str
    settings: Settings


def measured(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each job in a process of its own; on an accelerator one after the other in this one."""
    if jobs and jobs[0].settings.on_gpu:
        most = torch.cuda.max_memory_allocated
        return [_measure(job, _at_rest_on_gpu, most) for job in jobs]
    context, results = fresh(), []
    for job in jobs:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, job))
        process.start()
        sender.close()
        try:
            results.append(receiver.recv())
        except EOFError:
            results.append({"left out": "its process was ended, for want of memory perhaps"})
        process.join()
        if process.exitcode == 1:  # an error of its own, not a signal
            raise RuntimeError(f"Measuring `{job.name}` failed; its own message is above.")
    return results


def _send(sender: Any, job: Job) -> None:
    # Let freed memory go back at once: by default the library keeps ever larger pieces.
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(_M_MMAP_THRESHOLD, 2**19)
    torch.set_num_threads(job.settings.threads)
    sender.send(_measure(job, _resident, _most_resident))


def _measure(job: Job, now: Callable[[], int], most: Callable[[], int]) -> dict[str, Any]:
    """Most memory in a few steps above what there is before them."""
    stand, step = _prepared(job)
    if isinstance(step, str):
        return {"left out": step}
    at_rest = now()
    try:
        for _ in range(_STEPS):
            step()
    except Exception as error:
        if not BY_NAME[job.name].of_peer:
            raise
        return {"left out": first_words(error)}
    sizes = [(p.numel(), p.element_size()) for p in stand.params]
    return {
        "parameters": sum(count for count, _ in sizes),
        "bytes": sum(count * size for count, size in sizes),
        "peak": most() - at_rest,
    }


def _prepared(job: Job) -> tuple[Stand, Step | str]:
    """A step that can be taken, or why there is none."""
    workload = job.make()
    obstacle = BY_NAME[job.name].obstacle(workload)
    stand = Stand.of(workload, job.settings.device)
    return stand, BY_NAME[job.name].build(stand) if obstacle is None else obstacle


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _most_resident()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _most_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _at_rest_on_gpu() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def run(settings: Settings) -> dict[str, Any]:
    makes = TINY[-1:] if settings.quick else MAKES
    names = NAMES[:3] if settings.quick else NAMES
    models = []
    for make in makes:
        settings.tell(make().name)
        found = measured([Job(make, name, settings) for name in names])
        models.append({"name": make().name, "contestants": dict(zip(names, found, strict=True))})
    return {"models": models, "held": _held(settings)}


def _held(settings: Settings) -> dict[str, dict[str, float]]:
    """Numbers held when weights are chosen, in multiples of the parameters."""
    held: dict[str, dict[str, float]] = {}
    for make in (
        TINY[-1:] if settings.quick else (partial(mlp, k, width=64, batch=4) for k in (2, 8, 32))
    ):
        workload = make()
        stand = Stand.of(workload, torch.device("cpu"))
        size = sum(p.numel() for p in stand.params)
        held[workload.name] = {
            name: counts.held_numbers(partial(_step_under, stand.copy(), build)) / size
            for name, build in counts.WAYS.items()
        }
    return held


def _step_under(stand: Stand, build: Any, weighting: Any) -> Step:
    return build(weighting)(stand)


def section(results: dict[str, Any]) -> str:
    parts = [
        "Peak of two steps above the model at rest, each in a fresh process: resident memory "
        "in MiB (on an accelerator: its allocator's), and in brackets how far that lies above the "
        "plain step, in multiples of the memory P of the parameters, where that is a MiB or more."
    ]
    models = results["models"]
    sizes = [_mebibytes(model) for model in models]
    heads = [f"{m['name']} (P = {size:.3g} MiB)" for m, size in zip(models, sizes, strict=True)]
    names = list(models[0]["contestants"])
    rows = [[name, *(_cell(model, name) for model in models)] for name in names]
    parts.append(table(["", *heads], rows))
    parts.append(
        "Numbers that are held beside the graph when the weights are chosen, in multiples of the "
        "number of parameters, counted over all living tensors:"
    )
    ways = list(next(iter(results["held"].values())))
    held = results["held"]
    parts.append(
        table(["", *held], [[way, *(f"{held[m][way]:.2f}" for m in held)] for way in ways])
    )
    return "\n\n".join(parts)


def _mebibytes(model: dict[str, Any]) -> float:
    return model["contestants"][PLAIN]["bytes"] / MIB


def above_plain(model: dict[str, Any], name: str) -> float | None:
    """Peak above that of the plain step, in multiples of the parameters' memory."""
    entry, plain = model["contestants"].get(name, {}), model["contestants"][PLAIN]
    return (entry["peak"] - plain["peak"]) / plain["bytes"] if "peak" in entry else None


def _cell(model: dict[str, Any], name: str) -> str:
    entry = model["contestants"][name]
    if "peak" not in entry:
        return "–"
    peak = f"{entry['peak'] / MIB:.0f}"
    if entry["bytes"] < MIB:  # too small beside all else to be a unit
        return peak
    return f"{peak} ({above_plain(model, name):+.2f} P)"


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
