"""Tests in this folder run on two ranks.

The first one that pytest calls starts all of them under one ``torchrun``: two pytest processes run
the same tests together (``tests/support/rank_plugin.py``) and write down the results. Every other
call only reads its result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.fuzz.amounts import MANY
from tests.support.rank_plugin import RANKS, REPORTS

SECONDS = 600 + MANY  # a second for each example of a random sequence
FOLDER = Path(__file__).parent
GROUP = "ranks"

Outcomes = Mapping[str, Sequence[str]]

_collected = pytest.StashKey[list[str]]()
_outcomes = pytest.StashKey[Outcomes]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With pytest-xdist all of them belong to one process, so that the ranks are started once.
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(GROUP))


def pytest_collection_finish(session: pytest.Session) -> None:
    items = [item for item in session.items if FOLDER in item.path.parents]
    session.stash[_collected] = [_nodeid(item) for item in items]


def _nodeid(item: pytest.Item) -> str:
    return item.nodeid.removesuffix(f"@{GROUP}")  # which pytest-xdist appends


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if REPORTS in os.environ:  # this is a rank
        return None
    session = pyfuncitem.session
    if _outcomes not in session.stash:
        session.stash[_outcomes] = _launch(session.stash[_collected], session.config.rootpath)
    failures = session.stash[_outcomes][_nodeid(pyfuncitem)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return True


def _launch(nodeids: Sequence[str], root: Path) -> Outcomes:
    """What each rank found wrong with each test."""
    with tempfile.TemporaryDirectory() as name:
        reports = Path(name)
        (reports / "nodeids").write_text("\n".join(nodeids))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(RANKS), "--log-dir", name, "--module", "pytest"),
            *("-p", "tests.support.rank_plugin", "-p", "no:cacheprovider"),
            *("-m", "", f"@{reports / 'nodeids'}"),
        ]
        environment = {**os.environ, REPORTS: name, "OMP_NUM_THREADS": "1"}
        with (reports / "output").open("w") as output:
            ranks = subprocess.Popen(
                command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                ranks.wait(SECONDS)
            except subprocess.TimeoutExpired:
                ranks.terminate()  # torchrun takes its ranks along
                ranks.wait()
        return _read(reports, nodeids)


def _read(reports: Path, nodeids: Sequence[str]) -> Outcomes:
    outcomes: dict[str, list[str]] = defaultdict(list)
    for rank in range(RANKS):
        file = reports / f"{rank}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        seen = dict(json.loads(line) for line in lines)
        for nodeid in nodeids:
            if nodeid not in seen:
                tail = (reports / "output").read_text()[-3000:]
                outcomes[nodeid].append(f"Rank {rank} never finished this test.\n{tail}")
            elif seen[nodeid]:
                outcomes[nodeid].append(f"On rank {rank}:\n{seen[nodeid]}")
    return outcomes
