"""A run that is killed at any moment ends, once resumed, as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support import resumable_run
from tests.support.problems import snapshot

ROOT = Path(__file__).parents[1]


def run(folder: Path, method: str, kill_at: int | None, delay: float) -> None:
    """Run to the end, or until `delay` seconds after that many steps of it."""
    command = [sys.executable, "-m", "tests.support.resumable_run", str(folder), method]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == kill_at:
                time.sleep(delay)
                process.kill()  # SIGKILL: no chance to tidy up
                break
    assert process.returncode == (0 if kill_at is None else -9)


@pytest.mark.capability("kill -9 and resume", "FAMO", "AnalyticQP")
@pytest.mark.parametrize("method", ["FAMO-adam", "AnalyticQP"])
def test_a_killed_run_resumes_to_the_last_bit(method, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    resumable_run.main(whole, method)
    chance = random.Random(0)
    for step in (1, 4, 8):
        run(broken, method, step, chance.uniform(0, 2 * resumable_run.PAUSE))
        assert not (broken / "final.pt").exists()
    run(broken, method, None, 0.0)
    expected = torch.load(whole / "final.pt", weights_only=True)
    found = torch.load(broken / "final.pt", weights_only=True)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    saved = torch.load(broken / "checkpoint.pt", weights_only=True)
    there = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert snapshot(saved["optimizer"]) == snapshot(there["optimizer"])
