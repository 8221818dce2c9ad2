"""Which entries of a method's state belong to which losses, and what a step commits."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance._record import Record, Staged, loss_positions, merge_losses, select_losses

CPU = torch.device("cpu")
NAMES = ("a", "b", "c", "d")

subsets = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)


def full_state() -> dict[str, Tensor]:
    """State of each allowed shape, with entries that tell which losses they belong to."""
    return {
        "shared": torch.tensor(7.0),
        "per_loss": torch.arange(4.0),
        "per_pair": 10 * torch.arange(4.0)[:, None] + torch.arange(4.0),
    }


@given(present=subsets)
def test_selected_entries_are_those_of_the_present_losses(present: list[str]) -> None:
    positions = loss_positions(NAMES, present, CPU)
    part = select_losses(full_state(), positions)
    index = [NAMES.index(name) for name in present]
    assert part["shared"].item() == 7.0
    assert part["per_loss"].tolist() == [float(i) for i in index]
    assert part["per_pair"].tolist() == [[10.0 * i + j for j in index] for i in index]


@given(present=subsets)
def test_merging_replaces_the_entries_of_present_losses_and_no_other(present: list[str]) -> None:
    state = full_state()
    positions = loss_positions(NAMES, present, CPU)
    part = {key: -value - 1.0 for key, value in select_losses(state, positions).items()}
    merged = merge_losses(state, part, positions)
    index = {NAMES.index(name) for name in present}
    assert merged["shared"].item() == -8.0
    for i in range(4):
        changed = -state["per_loss"][i] - 1.0 if i in index else state["per_loss"][i]
        assert merged["per_loss"][i] == changed
        for j in range(4):
            entry = state["per_pair"][i, j]
            assert merged["per_pair"][i, j] == (-entry - 1.0 if {i, j} <= index else entry)
    assert state["per_loss"].tolist() == [0.0, 1.0, 2.0, 3.0]  # the state before is not written to


def test_all_losses_in_declared_order_copy_nothing() -> None:
    state = full_state()
    assert loss_positions(NAMES, NAMES, CPU) is None
    assert select_losses(state, None) is state
    assert merge_losses({}, state, None) == state


def test_a_commit_applies_what_was_staged_and_nothing_before() -> None:
    record = Record()
    staged = Staged(NAMES, ("a", "b"), full_state(), torch.ones(2), observes=True)
    record.stage(staged)
    assert (record.names, record.state, record.steps) == (None, None, 0)
    record.commit(staged)
    assert (record.names, record.steps, record.awaiting) == (NAMES, 1, ("a", "b"))
    assert record.state is staged.state
    assert record.staged is None


def test_a_skipped_step_is_counted_and_leaves_the_state() -> None:
    record = Record()
    staged = Staged(NAMES, NAMES, full_state(), torch.ones(4), skip=True)
    record.stage(staged)
    record.skip(staged, most=None)
    assert (record.steps, record.skipped, record.state, record.staged) == (0, 1, None, None)
