"""A pytest plugin that makes a run under ``torchrun`` one rank of two."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

RANKS = 2
REPORTS = "MOO_BALANCE_RANK_REPORTS"
"""Names the folder to which each rank writes how its tests went; set on ranks only."""

# How long one rank waits for the other before it gives up with an error.
PATIENCE = timedelta(seconds=20)


@functools.cache
def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=120)))
    return store


def own_rank() -> int:
    """Which of the ranks this is, in whatever world it finds itself."""
    return int(os.environ["RANK"])


def begin(name: str, alone: bool = False) -> dist.Store:
    """A new world of all ranks, or of this one only."""
    store = dist.HashStore() if alone else dist.PrefixStore(name, _store())
    rank, size = (0, 1) if alone else (own_rank(), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return store


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A process group of its own for each test, so that a failed one spoils no other."""
    store = begin(pyfuncitem.nodeid)
    try:
        result = yield
        # A rank that fails leaves at once, which ends the other one's waiting. A rank that is
        # done stays until the other has heard all it had to say.
        store.set(f"done {own_rank()}", "")
        store.wait([f"done {rank}" for rank in range(RANKS)], PATIENCE)
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # torchrun ends all ranks when one reports a failure; ours are told by the file.
    session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.failed:
        line = json.dumps([item.nodeid, report.longreprtext if report.failed else ""])
        with (Path(os.environ[REPORTS]) / f"{own_rank()}.jsonl").open("a") as file:
            file.write(line + "\n")
    return report
