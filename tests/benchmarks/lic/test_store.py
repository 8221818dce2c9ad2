"""Results are found by all that they depend on, and by nothing else."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace

import pytest

from benchmarks.lic import store
from benchmarks.lic.jobs import Context, ScoreCodec, Train
from benchmarks.lic.regime import Regime
from benchmarks.lic.store import Store, StoreError, describe, make_key
from moo_balance import AnalyticQP, Sum

CONTEXT = Context(None, 64, 64)


@pytest.fixture
def ladder(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def job(ladder):
    regime = Regime({0.01: ladder}, arch="mbt2018-mean:4,6", crop=64)
    return Train(regime.run(0.01, AnalyticQP(), 3, 1e-3, start=ladder))


def test_a_key_depends_on_settings_images_and_the_content_of_files(job, ladder, tmp_path):
    key = make_key(job, CONTEXT)
    moved = shutil.copy(ladder, tmp_path / "b.safetensors")
    assert make_key(replace(job, run=replace(job.run, start=moved)), CONTEXT) == key
    others = [
        make_key(replace(job, run=replace(job.run, seed=1)), CONTEXT),
        make_key(replace(job, run=replace(job.run, weighting=AnalyticQP(shift=0.0))), CONTEXT),
        make_key(job, replace(CONTEXT, side=128)),
    ]
    ladder.write_bytes(b"other weights")
    others.append(make_key(job, CONTEXT))
    assert len({key, *others}) == 5


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("examples.lic.training", True),
        ("examples.lic.gdn", True),
        ("benchmarks.lic.jobs", True),
        ("moo_balance.weighting.balanced_rd", True),
        ("moo_balance.functional.analytic_qp", True),
        ("moo_balance.weighting.pcgrad", False),
        ("examples.lic.demo", False),
        ("benchmarks.lic.page", False),
    ],
)
def test_a_key_depends_on_the_code_that_a_job_uses(job, monkeypatch, module, changes):
    monkeypatch.setattr(store, "_digest", store._digest.__wrapped__)
    key, read = make_key(job, CONTEXT), store._read_module
    monkeypatch.setattr(
        store, "_read_module", lambda name: (read(name)[0] * (1 + (name == module)), read(name)[1])
    )
    assert (make_key(job, CONTEXT) != key) == changes


def test_a_key_depends_on_the_versions(job, monkeypatch):
    key = make_key(job, CONTEXT)
    monkeypatch.setattr("moo_balance.__version__", "0")
    assert make_key(job, CONTEXT) != key


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(TypeError, match="should consist of dataclasses"):
        describe(replace(ScoreCodec(None), codec=object()))


def test_results_are_found_again_and_those_of_other_keys_are_dropped(tmp_path):
    first = Store(tmp_path)
    first.add("one", "a", {"images": {"x": (1 / 3, 30.0)}})
    first.add("one", "b", {"step": 1.0})
    again = Store(tmp_path)
    assert again["a"] == first["a"] == {"images": {"x": [0.3333333, 30.0]}}
    assert again.finish("one", {"a"}, {"title": "One"}) == 1
    last = Store(tmp_path)
    assert "a" in last
    assert "b" not in last


def test_a_file_of_something_else_and_a_full_disk_are_sentences(tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_atomically", fail)
    with pytest.raises(StoreError, match=r"Found No space left on device\. Make room"):
        Store(tmp_path).add("one", "a", {})
    (tmp_path / "two.json").write_text("[]")
    with pytest.raises(StoreError, match=r"two\.json should hold results .* Remove it"):
        Store(tmp_path)


def test_the_plain_sum_and_a_solution_have_different_keys(job):
    assert make_key(job, CONTEXT) != make_key(
        replace(job, run=replace(job.run, weighting=Sum())), CONTEXT
    )
