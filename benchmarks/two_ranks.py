"""Two processes that average K rows: how much of the communication is felt."""

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

from benchmarks.contestants import PLAIN, Stand, Step, balanced, plain
from benchmarks.processes import fresh
from benchmarks.settings import Settings
from benchmarks.tables import table
from benchmarks.timing import Patience, Runner, Spread, race
from benchmarks.workloads import TINY, Workload, codec, mlp
from moo_balance import MGDA
from moo_balance.engine.distributed import RowAverager

TITLE = "Two ranks"
RANKS = 2
MAKES: tuple[Callable[[], Workload], ...] = (codec, partial(mlp, 2), partial(mlp, 8))
ROUNDS, IN_A_ROW = 20, 3
PLAIN_DDP = "plain sum, DistributedDataParallel"
SILENT, OVERLAPPED, IN_TURN = (
    "MGDA, each rank by itself",
    "MGDA, rows averaged while the next is computed",
    "MGDA, each row averaged before the next",
)


@contextmanager
def _waiting() -> Iterator[None]:
    """Let each row arrive before the next one is differentiated."""
    start = RowAverager.begin_all_reduce

    def patient(self: RowAverager, *arguments: Any) -> Any:
        pending = start(self, *arguments)
        for bucket in pending.buckets:
            bucket.work.wait()
        return pending

    RowAverager.begin_all_reduce = patient  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowAverager.begin_all_reduce = start  # type: ignore[method-assign]


def _in_turn(step: Step) -> Step:
    def patient() -> None:
        with _waiting():
            step()

    return patient


def _plain_ddp(stand: Stand) -> Step:
    stand.model = DistributedDataParallel(_Losses(stand))
    losses, optimizer = stand.model, stand.optimizer

    def step() -> None:
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()

    return step


class _Losses(torch.nn.Module):
    """A model's losses as its forward pass, which is what the wrapper expects."""

    def __init__(self, stand: Stand) -> None:
        super().__init__()
        self.model, self.workload, self.batch = stand.model, stand.workload, stand.batch

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.workload.forward(self.model, self.batch).losses.values()))


def _steps(stand: Stand) -> dict[str, Step]:
    return {
        PLAIN: plain(stand.copy()),
        PLAIN_DDP: _plain_ddp(stand.copy()),
        SILENT: balanced(MGDA(), process_group=None)(stand.copy()),
        OVERLAPPED: balanced(MGDA())(stand.copy()),
        IN_TURN: _in_turn(balanced(MGDA())(stand.copy())),
    }


def _rank(rank: int, store: str, settings: Settings, sender: Any) -> None:
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    rounds = 1 if settings.quick else ROUNDS
    results = []
    for make in TINY[-1:] if settings.quick else MAKES:
        stand = Stand.of(make(), torch.device("cpu"))
        runners = {name: Runner(step) for name, step in _steps(stand).items()}
        seconds = race(runners, Patience(0.0, rounds, rounds), dist.barrier, IN_A_ROW)
        results.append({"name": stand.workload.name, **_figures(seconds, stand)})
    if rank == 0:
        sender.send({"rounds": rounds, "models": results})
    dist.barrier()
    dist.destroy_process_group()


def _figures(seconds: dict[str, list[float]], stand: Stand) -> dict[str, Any]:
    def exposed(name: str, alone: str) -> Spread:
        pairs = zip(seconds[name], seconds[alone], strict=True)
        return Spread.of([1000 * (own - other) for own, other in pairs])

    return {
        "megabytes": sum(4e-6 * p.numel() for p in stand.params),
        "ms": {name: Spread.of([1000 * v for v in values]) for name, values in seconds.items()},
        "exposed ms": {
            PLAIN_DDP: exposed(PLAIN_DDP, PLAIN),
            OVERLAPPED: exposed(OVERLAPPED, SILENT),
            IN_TURN: exposed(IN_TURN, SILENT),
        },
    }


def run(settings: Settings) -> dict[str, Any]:
    context = fresh()
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
    exposed = [
        [
            name,
            *("{:.2f} ({:.2f} to {:.2f})".format(*model["exposed ms"][name]) for model in models),
        ]
        for name in models[0]["exposed ms"]
    ]
    return "\n\n".join(
        [
            f"Two processes on this machine's processor (gloo), {results['rounds']} rounds of "
            f"{IN_A_ROW} steps. Milliseconds per step of the slower rank:",
            table(["", *heads], rows),
            "Of these, what communication adds to the same step without any: milliseconds, in "
            "the median and the middle half. On processors the averaging itself takes a core's "
            "time, so what can be hidden depends on cores that are free.",
            table(["", *heads], exposed),
        ]
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
