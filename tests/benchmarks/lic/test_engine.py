"""Jobs: done once, in order, and kept."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace

import pytest
import torch

from benchmarks.lic import cache
from benchmarks.lic.cache import CacheError
from benchmarks.lic.engine import Engine, waves
from examples.lic.images import Photographs

IMAGE = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
PHOTOGRAPHS = Photographs({"a": IMAGE}, {"b": IMAGE})


@dataclass(frozen=True)
class Add:
    """1, and the sum of what it needs."""

    name: str
    needs: tuple[Add, ...] = ()

    def __str__(self):
        return f"add {self.name}"

    def __call__(self, engine):
        return {"sum": 1 + sum(engine.result(job)["sum"] for job in self.needs), "pair": (1, 2)}


@dataclass(frozen=True)
class Sums:
    all: tuple[Add, ...]

    def jobs(self):
        return self.all

    def read(self, result):
        return {job.name: result(job)["sum"] for job in self.all}


BOTTOM = Add("bottom")
LEFT, RIGHT = Add("left", (BOTTOM,)), Add("right", (BOTTOM,))
TOP = Add("top", (LEFT, RIGHT))


def engine(folder, **options):
    said = []
    return Engine(PHOTOGRAPHS, folder, say=said.append, **options), said


def test_waves_put_a_job_after_all_that_it_needs():
    assert list(waves([TOP, LEFT])) == [[BOTTOM], [LEFT, RIGHT], [TOP]]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_and_found_again(tmp_path, workers):
    first, said = engine(tmp_path, workers=workers)
    expected = {"top": 5, "left": 2}
    assert first.collect(Sums((TOP, LEFT))) == expected
    assert sorted(said) == ["add bottom", "add left", "add right", "add top"]
    again, said = engine(tmp_path)
    assert again.collect(Sums((TOP, LEFT))) == expected
    assert not said


def test_a_result_is_what_json_gives_back_the_first_time_too(tmp_path):
    made, _ = engine(tmp_path)
    assert made.result(BOTTOM) == made.result(BOTTOM) == {"sum": 1, "pair": [1, 2]}


@pytest.mark.parametrize(
    "photographs",
    [
        Photographs({"c": IMAGE}, {"b": IMAGE}),
        Photographs({"a": IMAGE.flip(-1)}, {"b": IMAGE}),
        Photographs({"a": IMAGE}, {"b": IMAGE.flip(-1)}),
    ],
    ids=["name", "pixels", "held out"],
)
def test_other_photographs_have_other_results(tmp_path, photographs):
    made, said = engine(tmp_path)
    made.result(BOTTOM)
    replace(made, photographs=photographs).result(BOTTOM)
    assert said == ["add bottom"] * 2


def test_results_of_another_version_are_not_used(tmp_path, monkeypatch):
    made, said = engine(tmp_path)
    made.result(BOTTOM)
    monkeypatch.setattr("benchmarks.lic.engine.VERSIONS", "moo-balance 0")
    replace(made).result(BOTTOM)
    assert len(said) == 2


def test_a_job_that_its_representation_does_not_tell_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Vague(Add):
        function: object = field(default_factory=object)

    with pytest.raises(ValueError, match="representation of a job should tell what it does"):
        engine(tmp_path)[0].result(Vague("x"))


def test_a_stopped_job_leaves_nothing_and_finished_ones_stay(tmp_path):
    @dataclass(frozen=True)
    class Stopped(Add):
        def __call__(self, engine):
            raise KeyboardInterrupt

    made, _ = engine(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.collect(Sums((Stopped("x", (BOTTOM,)),)))
    assert [path.name[:10] for path in (tmp_path / "results").iterdir()] == ["add-bottom"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}'])
def test_a_file_that_is_no_result_is_named_and_kept(tmp_path, text):
    made, _ = engine(tmp_path)
    made.result(BOTTOM)
    (path,) = (tmp_path / "results").iterdir()
    path.write_text(text)
    with pytest.raises(CacheError, match=rf"{path.name} is not a result .* Remove it"):
        made.result(BOTTOM)
    assert path.read_text() == text


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_atomically", fail)
    with pytest.raises(CacheError, match=r"cannot be written \(No space left on device\)"):
        engine(tmp_path)[0].result(BOTTOM)
