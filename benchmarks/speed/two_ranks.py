"""Time that two processes add to a step by averaging K gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.settings import Settings
from benchmarks.speed.implementations import PLAIN, Setup, Step, balanced_step, plain
from benchmarks.speed.processes import fresh_context
from benchmarks.speed.tables import table
from benchmarks.speed.timing import Budget, Runner, Spread, interleave
from benchmarks.speed.workloads import TINY, Workload, codec, mlp
from moo_balance import MGDA
from moo_balance.engine.distributed import RowAverager

TITLE = "Two ranks"
RANKS = 2
MAKES: tuple[Callable[[], Workload], ...] = (codec, partial(mlp, 2), partial(mlp, 8))
ROUNDS, IN_A_ROW = 20, 3
PLAIN_DDP = "plain sum, DistributedDataParallel"
NOT_AVERAGED, OVERLAPPED, SEQUENTIAL = (
    "MGDA, without averaging",
    "MGDA, each row averaged while the next is computed",
    "MGDA, each row averaged before the next",
)


@contextmanager
def _without_overlap() -> Iterator[None]:
    """Wait for each row's average before the next loss is differentiated."""
    start = RowAverager.begin_all_reduce

    def start_and_wait(self: RowAverager, *arguments: Any) -> Any:
        pending = start(self, *arguments)
        for bucket in pending.buckets:
            bucket.work.wait()
        return pending

    RowAverager.begin_all_reduce = start_and_wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowAverager.begin_all_reduce = start  # type: ignore[method-assign]


def _sequential(step: Step) -> Step:
    def sequential_step() -> None:
        with _without_overlap():
            step()

    return sequential_step


def _plain_ddp(setup: Setup) -> Step:
    setup.model = DistributedDataParallel(_Losses(setup))
    losses, optimizer = setup.model, setup.optimizer

    def step() -> None:
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()

    return step


class _Losses(torch.nn.Module):
    """A model's losses as its forward pass, which is what the wrapper expects."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.model, self.workload, self.batch = setup.model, setup.workload, setup.batch

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.workload.forward(self.model, self.batch).losses.values()))


def _steps(setup: Setup) -> dict[str, Step]:
    return {
        PLAIN: plain(setup.copy()),
        PLAIN_DDP: _plain_ddp(setup.copy()),
        NOT_AVERAGED: balanced_step(MGDA(), process_group=None)(setup.copy()),
        OVERLAPPED: balanced_step(MGDA())(setup.copy()),
        SEQUENTIAL: _sequential(balanced_step(MGDA())(setup.copy())),
    }


def _rank(rank: int, store: str, settings: Settings, sender: Any) -> None:
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    rounds = 1 if settings.quick else ROUNDS
    results = []
    for make in TINY[-1:] if settings.quick else MAKES:
        setup = Setup.create(make(), torch.device("cpu"))
        runners = {name: Runner(step) for name, step in _steps(setup).items()}
        seconds = interleave(runners, Budget(0.0, rounds, rounds), dist.barrier, IN_A_ROW)
        results.append({"name": setup.workload.name, **_figures(seconds, setup)})
    if rank == 0:
        sender.send({"rounds": rounds, "models": results})
    dist.barrier()
    dist.destroy_process_group()


def _figures(seconds: dict[str, list[float]], setup: Setup) -> dict[str, Any]:
    def difference(name: str, without: str) -> Spread:
        pairs = zip(seconds[name], seconds[without], strict=True)
        return Spread.of([1000 * (own - other) for own, other in pairs])

    return {
        "megabytes": sum(4e-6 * p.numel() for p in setup.params),
        "ms": {name: Spread.of([1000 * v for v in values]) for name, values in seconds.items()},
        "added ms": {
            PLAIN_DDP: difference(PLAIN_DDP, PLAIN),
            OVERLAPPED: difference(OVERLAPPED, NOT_AVERAGED),
            SEQUENTIAL: difference(SEQUENTIAL, NOT_AVERAGED),
        },
    }


def run(settings: Settings) -> dict[str, Any]:
    context = fresh_context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_rank, args=(rank, store, settings, sender))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            results = receiver.recv()
        finally:
            for process in ranks:
                process.join()
    return dict(results)


def section(results: dict[str, Any]) -> str:
    models = results["models"]
    heads = [f"{model['name']} ({model['megabytes']:.1f} MB a row)" for model in models]
    rows = [
        [name, *(f"{model['ms'][name][0]:.2f}" for model in models)] for name in models[0]["ms"]
    ]
    differences = [
        [
            name,
            *("{:.2f} ({:.2f} to {:.2f})".format(*model["added ms"][name]) for model in models),
        ]
        for name in models[0]["added ms"]
    ]
    return "\n\n".join(
        [
            f"Two processes on this machine's processor (gloo), {results['rounds']} rounds of "
            f"{IN_A_ROW} steps. Milliseconds per step of the slower rank:",
            table(["", *heads], rows),
            "Of these, the milliseconds that communication adds to the same step without it: the "
            "median and the two quartiles. On processors the averaging itself takes a core's "
            "time, so overlap only helps where cores are free.",
            table(["", *heads], differences),
        ]
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
