"""Counting instructions: what is counted, and how the counts are read and shown."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed import instructions
from benchmarks.speed.instructions_step import WEIGHTINGS, make_step


def test_every_method_has_a_step():
    assert set(instructions.METHODS) == {instructions.PLAIN, *WEIGHTINGS}
    with torch.random.fork_rng():
        for method in instructions.METHODS:
            make_step(method)()


def test_the_total_is_read_from_the_profile():
    assert instructions.total("events: Ir\nfn=(1) main\n3 100\n\ntotals: 1234\n") == 1234
    assert instructions.total("summary: 55\n") == 55
    assert instructions.total("events: Ir\n") == 0


def test_counts_are_shown_compared_with_the_plain_loop():
    text = instructions.section({instructions.PLAIN: 2_000_000, "Sum": 3_000_000})
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["Sum", "3.00", "1.00", "1.5000"]


@pytest.mark.parametrize(
    ("missing", "sentence"), [(None, "METHOD should be one of"), ("no valgrind", "no valgrind")]
)
def test_wrong_arguments_and_missing_tools_are_explained(missing, sentence, monkeypatch, capsys):
    monkeypatch.setattr(instructions, "missing", lambda: missing)
    with pytest.raises(SystemExit):
        instructions.main(["Adam"] if missing is None else [])
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_of_the_plain_loop_is_counted(tmp_path):
    if reason := instructions.missing():
        pytest.skip(reason)
    assert instructions.count(instructions.PLAIN, instructions.ROOT, tmp_path, 1) > 1_000_000
