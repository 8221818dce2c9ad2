"""Latent refinement: which cases, and gains from their records."""

from __future__ import annotations

import pytest

from benchmarks.lic.engine import waves
from benchmarks.lic.jobs import Keep
from benchmarks.lic.refinement import CURVE, NONE, SGA_PLUS
from benchmarks.lic.refinement_page import deltas, gaps, relative_loss, section, select
from benchmarks.lic.roundings import TWO_CLASS
from benchmarks.lic.study import full

STUDY = full().others["Latent refinement"]


def test_codecs_continue_each_other_and_are_trained_once():
    kept = [job for wave in waves(STUDY.jobs()) for job in wave if isinstance(job, Keep)]
    assert [job.run.lambdas[0] for job in kept] == list(STUDY.lambdas)
    assert [job.run.start for job in kept] == [None, *(job.run for job in kept[:-1])]


def test_equal_jobs_of_two_groups_are_one():
    jobs = {(case.group, case.name, case.lmbda): STUDY._job(case) for case in STUDY.cases()}
    base = STUDY.base
    same = [(CURVE, SGA_PLUS, base), ("probability", "SSL", base), ("τ_max 1", "SSL", base)]
    assert len({repr(jobs[key]) for key in same}) == 1
    assert jobs[CURVE, NONE, base].how.steps == 0


def made_up():
    """Data in which SGA+ saves a tenth of the rate everywhere, and nothing else anything."""
    points = {lmbda: (0.1 * 2**k, 25.0 + 3 * k) for k, lmbda in enumerate(STUDY.lambdas)}
    points |= dict.fromkeys(STUDY.others, (0.15, 26.0))

    def result(job):
        bpp, psnr = points[job.lmbda]
        part = 0.9 if "StraightThrough" not in repr(job.how) and job.how.steps else 1.0
        score = [part * bpp, psnr]
        return {"images": {"a": {"score": score, "course": {"0": [bpp, psnr], "30": score}}}}

    return STUDY.read(result)


def test_gains_follow_from_the_records():
    data = made_up()
    none, own = (select(data["records"], group=CURVE, name=n) for n in (NONE, SGA_PLUS))
    assert [delta.rate for delta in deltas(own, none)] == pytest.approx([-10.0])
    text = section("Latent refinement", data)
    assert "| SGA+, SSL | no refinement | −10.0 % [−10.0, −10.0] |" in text
    assert "| straight-through rounding | no refinement | +0.0 % [+0.0, +0.0] |" in text
    error = STUDY.base * 255**2 * 10**-2.8
    expected = 100 * ((0.18 + error) / (0.2 + error) - 1)
    at_base = [select(r, **{"lambda": STUDY.base})[0] for r in (own, none)]
    assert relative_loss(*at_base) == pytest.approx([expected])
    assert f"| SSL, rounding y | −{-expected:.1f} % [" in text
    assert gaps(at_base[0], none) == pytest.approx([3 - 3 * 0.847997], abs=1e-5)


def test_section_names_every_probability():
    text = section("Latent refinement", made_up())
    for name in (*TWO_CLASS, "three integers", "cut off", "τ_max 0.2", "Solution 2"):
        assert name in text
