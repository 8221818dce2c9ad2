"""Each example runs as its docstring says; ``tests/distributed`` runs those for several ranks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from examples import frameworks
from examples.frameworks import plain_tensorboard

FOLDER = Path(frameworks.__file__).parent
ALONE = [
    file.stem
    for file in sorted(FOLDER.glob("*.py"))
    if f"\n    python -m examples.frameworks.{file.stem}\n" in file.read_text()
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", ALONE)
def test_an_example_runs_and_prints_metrics(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "moo/" in printed or "event files" in printed


def test_every_example_is_run():
    several_ranks = {"ddp", "fsdp2"}
    without_main = {"__init__", "tiny"}
    assert {file.stem for file in FOLDER.glob("*.py")} == {*ALONE, *several_ranks, *without_main}


@pytest.mark.capability("checkpoint and resume to the last bit")
def test_the_plain_loop_resumes_to_the_last_bit(tmp_path):
    whole = plain_tensorboard.train(tmp_path / "whole", epochs=3)
    plain_tensorboard.train(tmp_path / "parts", epochs=1)
    parts = plain_tensorboard.train(tmp_path / "parts", epochs=3)
    for parameter, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(parameter, other)
