"""Results on disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from examples.lic.store import StoreError, cached, file_name

KEY = {"what": "fine-tuning", "λ": 0.01, "steps": 5}


def test_a_result_is_computed_once_and_comes_back_the_same(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"scores": (1.5, 2)}

    folder = tmp_path / "new" / "folder"
    first, second = cached(folder, KEY, compute), cached(folder, KEY, compute)
    assert first == second == {"scores": [1.5, 2]}
    assert len(calls) == 1
    assert cached(folder, dict(reversed(KEY.items())), compute) == first
    assert [path.name for path in folder.iterdir()] == [file_name(KEY)]


def test_names_are_readable_and_differ_with_any_part_of_the_key():
    names = {file_name({**KEY, **change}) for change in ({}, {"steps": 6}, {"λ": 0.02})}
    assert len(names) == 3
    assert all(name.startswith("fine-tuning-") and name.endswith(".json") for name in names)
    assert file_name({"n": 1})[0] != "-"


def test_a_run_that_fails_keeps_what_was_finished_and_leaves_nothing_half_done(tmp_path):
    cached(tmp_path, KEY, lambda: 1)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, {**KEY, "steps": 6}, killed)
    with pytest.raises(TypeError, match="not JSON serializable"):
        cached(tmp_path, {**KEY, "steps": 7}, object)
    assert [path.name for path in tmp_path.iterdir()] == [file_name(KEY)]
    assert cached(tmp_path, KEY, lambda: 2) == 1


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
        cached(tmp_path, KEY, lambda: 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"key": KEY})])
def test_a_file_that_is_no_result_is_named_and_kept(tmp_path, text):
    path = tmp_path / file_name(KEY)
    path.write_text(text)
    with pytest.raises(StoreError, match=rf"{path.name} is not a result .* Remove it"):
        cached(tmp_path, KEY, lambda: 1)
    assert path.read_text() == text


def test_a_file_of_another_key_is_refused(tmp_path):
    path = tmp_path / file_name(KEY)
    path.write_text(json.dumps({"key": {"steps": 9}, "value": 1}))
    with pytest.raises(StoreError, match=r"Found that for .*9"):
        cached(tmp_path, KEY, lambda: 1)
