"""Peak memory of a step: resident memory of a fresh process, or the accelerator's allocator."""

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

from benchmarks.settings import Settings
from benchmarks.speed import counts
from benchmarks.speed.implementations import LIMIT, PLAIN, Setup, Step
from benchmarks.speed.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.speed.processes import fresh_context
from benchmarks.speed.step_cost import IMPLEMENTATIONS, first_sentence
from benchmarks.speed.tables import table
from benchmarks.speed.workloads import TINY, Workload, codec, mlp, resnet

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
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
_STEPS = 2
_M_MMAP_THRESHOLD = -3


class Job(NamedTuple):
    """What one process measures: one implementation on one model."""

    make: Callable[[], Workload]
    name: str
    settings: Settings


def measure_all(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Run each job in a process of its own; on an accelerator one after the other in this one."""
    if jobs and jobs[0].settings.on_gpu:
        peak = torch.cuda.max_memory_allocated
        return [_measure(job, _reset_gpu_peak, peak) for job in jobs]
    context, results = fresh_context(), []
    for job in jobs:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, job))
        process.start()
        sender.close()
        try:
            results.append(receiver.recv())
        except EOFError:
            results.append({"left out": "its process was ended, perhaps for lack of memory"})
        process.join()
        if process.exitcode == 1:  # an error of its own, not a signal
            raise RuntimeError(f"Measuring `{job.name}` failed; the process printed its error.")
    return results


def _send(sender: Any, job: Job) -> None:
    # Return freed memory to the system at once: by default the C library keeps ever larger pieces.
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(_M_MMAP_THRESHOLD, 2**19)
    torch.set_num_threads(job.settings.threads)
    sender.send(_measure(job, _resident, _peak_resident))


def _measure(job: Job, current: Callable[[], int], peak: Callable[[], int]) -> dict[str, Any]:
    """Return the peak memory of a few steps above that before them, in bytes."""
    setup, step = _prepare(job)
    if isinstance(step, str):
        return {"left out": step}
    before = current()
    try:
        for _ in range(_STEPS):
            step()
    except Exception as error:
        if not BY_NAME[job.name].third_party:
            raise
        return {"left out": first_sentence(error)}
    sizes = [(p.numel(), p.element_size()) for p in setup.params]
    return {
        "parameters": sum(count for count, _ in sizes),
        "bytes": sum(count * size for count, size in sizes),
        "peak": peak() - before,
    }


def _prepare(job: Job) -> tuple[Setup, Step | str]:
    """Return a step that can be taken, or why there is none."""
    workload = job.make()
    reason = BY_NAME[job.name].unsupported(workload)
    setup = Setup.create(workload, job.settings.device)
    return setup, BY_NAME[job.name].build(setup) if reason is None else reason


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_resident()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_gpu_peak() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def run(settings: Settings) -> dict[str, Any]:
    makes = TINY[-1:] if settings.quick else MAKES
    names = NAMES[:3] if settings.quick else NAMES
    models = []
    for make in makes:
        settings.report(make().name)
        peaks = measure_all([Job(make, name, settings) for name in names])
        models.append(
            {"name": make().name, "implementations": dict(zip(names, peaks, strict=True))}
        )
    return {"models": models, "held": _held(settings)}


def _held(settings: Settings) -> dict[str, dict[str, float]]:
    """Elements held when weights are computed, in multiples of the number of parameters."""
    held: dict[str, dict[str, float]] = {}
    for make in (
        TINY[-1:] if settings.quick else (partial(mlp, k, width=64, batch=4) for k in (2, 8, 32))
    ):
        workload = make()
        setup = Setup.create(workload, torch.device("cpu"))
        size = sum(p.numel() for p in setup.params)
        held[workload.name] = {
            name: counts.held_elements(partial(_step_under, setup.copy(), build)) / size
            for name, build in counts.MODES.items()
        }
    return held


def _step_under(setup: Setup, build: Any, weighting: Any) -> Step:
    return build(weighting)(setup)


def section(results: dict[str, Any]) -> str:
    parts = [
        "Peak of two steps above the memory before them, each in a fresh process: resident memory "
        "in MiB (on an accelerator: its allocator's). In brackets: how far that lies above the "
        "plain step, in multiples of the memory P of the parameters, if P is at least one MiB."
    ]
    models = results["models"]
    sizes = [_mebibytes(model) for model in models]
    heads = [f"{m['name']} (P = {size:.3g} MiB)" for m, size in zip(models, sizes, strict=True)]
    names = list(models[0]["implementations"])
    rows = [[name, *(_cell(model, name) for model in models)] for name in names]
    parts.append(table(["", *heads], rows))
    parts.append(
        "Elements that are held in addition to the graph when the weights are computed, in "
        "multiples of the number of parameters, counted over all living tensors:"
    )
    held = results["held"]
    modes = list(next(iter(held.values())))
    parts.append(
        table(["", *held], [[mode, *(f"{held[m][mode]:.2f}" for m in held)] for mode in modes])
    )
    return "\n\n".join(parts)


def _mebibytes(model: dict[str, Any]) -> float:
    return model["implementations"][PLAIN]["bytes"] / MIB


def above_plain(model: dict[str, Any], name: str) -> float | None:
    """Peak above that of the plain step, in multiples of the parameters' memory, if measured."""
    entry, plain = model["implementations"].get(name, {}), model["implementations"][PLAIN]
    return (entry["peak"] - plain["peak"]) / plain["bytes"] if "peak" in entry else None


def _cell(model: dict[str, Any], name: str) -> str:
    entry = model["implementations"][name]
    if "peak" not in entry:
        return "–"
    peak = f"{entry['peak'] / MIB:.0f}"
    if entry["bytes"] < MIB:  # too small a unit to be measured
        return peak
    return f"{peak} ({above_plain(model, name):+.2f} P)"


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
