"""The study: its runs, what it concludes from them, and its page."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from examples.lic.evaluation import Score
from examples.lic.study import cli, figures, page, results, scales
from examples.lic.study.analysis import OWN, STATIC, Finding, above, finding, findings
from examples.lic.study.conduct import Conduct
from examples.lic.study.experiments import RIVALS, SOLUTIONS, Unit
from examples.lic.study.laboratory import SUM, Laboratory, Run
from examples.lic.study.sentences import reading, summary
from examples.lic.study.tuning import Grid, Tuned, loss, tune_standard

DOCS = Path(__file__).parents[2] / "docs"
PRICES = (0.0005, 0.001, 0.002, 0.004)


def curve(shift=0.0, lambdas=PRICES, series=False):
    """Runs on a straight line in log-rate, 3 dB an octave, `shift` dB above it."""
    return [
        {
            "lambda": lmbda,
            "steps": 4,
            "effective_lambda": lmbda / 10,
            "milliseconds": 20.0,
            "scores": {
                image: (1000 * lmbda, 40 + 3 * math.log2(lmbda) + shift + better)
                for image, better in (("a", 0.0), ("b", 1.0))
            },
            **({"series": courses()} if series else {}),
        }
        for lmbda in lambdas
    ]


def courses():
    kinds = ("loss", "weight", "coefficient")
    falling = [1.0, 0.5, 0.25, 0.125]
    return {f"{kind}/{name}": falling for kind in kinds for name in ("rate", "distortion")}


def unit(against_own=0.0, against_rest=0.0, series=False):
    rivals = {name: curve() for name in RIVALS}
    rivals[OWN] = curve(against_rest - against_own, series=series)
    return {
        solution: {"balanced": curve(against_rest, series=series), **rivals}
        for solution in SOLUTIONS
    }


def made_up(**shifts):
    seeds = {str(seed): unit(series=seed == 0, **shifts) for seed in range(3)}
    cell = {"lr": 1e-3, "clip": None, "loss": 1.0}
    return {
        "about": {
            "date": "2000-01-01", "processor": "a processor", "cores": 2, "workers": 2,
            "versions": {"Python": "3"}, "trained on": ["c"], "held out": ["a", "b"],
            "crop": 64, "widths": [8, 8], "batch": 2,
        },
        "seconds per step": {"standard": 1.0, "Solution 1": 1.25, "Solution 2": 1.5},
        "tuning": {"fine-tuned": [cell, {**cell, "loss": 1.25}]},
        "experiments": {
            "fine-tuned": {
                "name": "fine-tuned", "steps": 4, "lambdas": dict.fromkeys(SOLUTIONS, PRICES),
                "prices": dict.fromkeys(SOLUTIONS, PRICES), "rivals": list(RIVALS),
                "start": (0.01, 2), "batch": 2, "shape": {}, "planned seeds": [0, 1, 2],
                "seeds": seeds,
            },
        },
        "parts": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert cli.main(["--tiny", "--folder", str(folder)]) == 0
    return folder


def test_a_study_runs_and_writes_its_page(tiny):
    text = (tiny / "lic_report.md").read_text(encoding="utf-8")
    for word in ("## In short", "Solution 1", "Solution 2", *RIVALS, "chelsea", "λ′"):
        assert word in text
    for stem in ("rd-fine-tuned", "course-fine-tuned", "bd-rates"):
        assert f"(figures/lic/{stem}.png)" in text
        with Image.open(tiny / "figures" / "lic" / f"{stem}.png") as figure:
            assert figure.size[0] > 400


def test_what_is_finished_is_not_run_again(tiny, capsys):
    before = (tiny / "lic_report.json").read_text(encoding="utf-8")
    assert cli.main(["--tiny", "--folder", str(tiny)]) == 0
    assert "ms/step" not in capsys.readouterr().out
    assert (tiny / "lic_report.json").read_text(encoding="utf-8") == before


def test_the_page_follows_from_the_results_alone(tiny, tmp_path):
    shutil.copy(tiny / "lic_report.json", tmp_path)
    assert cli.main(["--page-only", "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "lic_report.md").read_bytes() == (tiny / "lic_report.md").read_bytes()


def test_processes_find_what_one_process_finds(tmp_path):
    jobs = {number: partial(math.sqrt, number) for number in (4, 9, 16)}
    one, two = (dict(Conduct(scales.tiny(), tmp_path, n)._each(jobs)) for n in (1, 2))
    assert one == two == {4: 2, 9: 3, 16: 4}


@pytest.mark.parametrize("text", [None, "{", "[]", '{"about": 1}'])
def test_results_that_are_none_are_named(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "lic_report.json").write_text(text)
    assert cli.main(["--page-only", "--docs", str(tmp_path)]) == 2
    assert "lic_report.json holds no results of a study" in capsys.readouterr().err


def test_no_workers_are_too_few(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--tiny", "--workers", "0", "--folder", str(tmp_path)])
    assert "--workers: should be positive, found 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["--tiny", "--folder", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.skipif(not (DOCS / "lic_report.json").exists(), reason="no study was run yet")
def test_the_page_in_the_docs_is_that_of_its_results(tmp_path):
    shutil.copy(DOCS / "lic_report.json", tmp_path)
    assert cli.main(["--page-only", "--docs", str(tmp_path)]) == 0
    written = (tmp_path / "lic_report.md").read_text(encoding="utf-8")
    assert written == (DOCS / "lic_report.md").read_text(encoding="utf-8")
    for figure in (tmp_path / "figures" / "lic").iterdir():
        assert (DOCS / "figures" / "lic" / figure.name).exists()


def test_runs_of_a_unit_are_paired_and_each_rival_has_what_it_needs():
    experiment = scales.tiny().families["fine-tuned"].experiments[0]
    settled = {"rate": 0.75, "distortion": 0.25}

    class Measured:
        def __call__(self, run):
            return type("Result", (), {"settled": settled})

    unit = Unit(Measured(), experiment, Tuned(2e-3, 5.0, 1.4), seed=3)
    runs = {name: rival(unit, "Solution 2") for name, rival in RIVALS.items()}
    for run in (run for curve in runs.values() for run in curve):
        assert (run.seed, run.start.seed, run.start.steps) == (3, 3, 2)
        assert run.lr == 2e-3
    assert {run.clip for run in runs[STATIC]} == {None}
    assert {(run.clip, run.steps) for run in runs["standard, equal steps"]} == {(5.0, 2)}
    assert {(run.clip, run.steps) for run in runs["standard, equal time"]} == {(5.0, 3)}
    assert {(run.weighting.values["rate"], run.clip) for run in runs[OWN]} == {(0.75, None)}
    assert [run.lmbda for run in runs[OWN]] == list(experiment.lambdas["Solution 2"])


def test_keys_differ_with_weighting_start_and_everything_else():
    run = Run(SUM, 0.01, 5, 1e-3)
    others = [
        Run(SOLUTIONS["Solution 1"], 0.01, 5, 1e-3), Run(SUM, 0.01, 5, 1e-3, start=run),
        Run(SUM, 0.01, 5, 1e-3, clip=1.0), Run(SUM, 0.01, 5, 1e-3, scored_on="train"),
    ]  # fmt: skip
    keys = {json.dumps(r.key(), sort_keys=True) for r in (run, *others)}
    assert len(keys) == 5


def test_tuning_ranks_by_the_loss(tmp_path):
    rates = {(1e-3, None): 0.3, (1e-3, 1.0): 0.2, (2e-3, None): 0.1, (2e-3, 1.0): 0.4}

    class Measured(Laboratory):
        def __call__(self, run):
            return type("R", (), {"scores": {"a": Score(rates[run.lr, run.clip], 30.0)}})

    grid = Grid((1e-3, 2e-3), (None, 1.0), price=0.01)
    cells = tune_standard(Measured(None, tmp_path), Run(SUM, 0.0, 1, 0.0), grid)
    assert [(cell["lr"], cell["clip"]) for cell in cells] == sorted(rates, key=rates.get)
    assert cells[0]["loss"] == pytest.approx(0.1 + 0.01 * 255**2 * 1e-3)


@pytest.mark.parametrize(("shift", "rate"), [(0.5, -10.91), (-0.5, 12.25)])
def test_findings_recover_a_known_shift(shift, rate):
    curves = {seed: unit(against_own=shift, against_rest=shift)["Solution 1"] for seed in range(3)}
    for rival in (STATIC, OWN):
        found = finding("x", "Solution 1", rival, curves)
        assert found.rate.mean == pytest.approx(rate, abs=0.01)
        assert found.gap.mean == pytest.approx(shift, abs=0.01)
        assert found.sign() == -math.copysign(1, shift)
        assert not found.refusals


def test_curves_apart_have_no_rate_and_it_is_said_why():
    apart = unit(against_rest=99.0)["Solution 1"]
    found = finding("x", "Solution 1", STATIC, {0: apart, 1: apart})
    assert (found.rate, found.overlap) == (None, 0.0)
    assert "should overlap in PSNR" in found.refusals[0]


def test_short_curves_are_judged_by_psnr():
    short = {name: runs[1:3] if name in ("balanced", OWN) else runs
             for name, runs in unit(against_rest=0.5)["Solution 1"].items()}  # fmt: skip
    found = finding("x", "Solution 1", STATIC, dict.fromkeys(range(3), short))
    assert found.rate is None
    assert found.gap.mean == pytest.approx(0.5)
    assert found.sign() == -1
    assert finding("x", "Solution 1", STATIC, dict.fromkeys(range(2), short)).sign() is None


def test_a_seed_that_disagrees_takes_the_verdict_away():
    units = {
        seed: unit(against_rest=shift)["Solution 1"] for seed, shift in enumerate((2, 2, 2, -0.1))
    }
    found = finding("x", "Solution 1", STATIC, units)
    assert found.rate.high < 0
    assert found.sign() == 0


def test_above_a_curve():
    line = [Score(2.0**k, 30.0 + 3 * k) for k in range(4)]
    assert above(Score(2.0, 33.5), line) == pytest.approx(0.5)
    assert above(Score(0.9, 30.0), line) is None
    assert above(Score(8.1, 40.0), line) is None
    assert above(Score(2.0, 33.0), line[:2]) is None


@pytest.mark.parametrize(
    ("against_own", "word", "meaning"),
    [
        (0.5, "better", "its adaptivity pays"),
        (0.0, "not distinguishable", "an effective λ by itself"),
        (-0.5, "worse", "adapting the weights costs"),
    ],
)
def test_sentences_say_what_the_intervals_show(against_own, word, meaning):
    found = [
        f for f in findings(made_up(against_own=against_own, against_rest=0.5))
        if f.solution == "Solution 1"
    ]  # fmt: skip
    text = reading(found)
    assert text.startswith(f"Solution 1 against its own mean weights held constant: {word} (BD-")
    assert meaning in text
    assert "against static weights better (BD-rate −10.9 % [−10.9, −10.9])" in text
    (line,) = [line for line in summary(found) if "fine-tuned, Solution 1" in line]
    assert ("pays" in line, "costs" in line) == (against_own > 0, against_own < 0)


def test_nothing_is_said_without_figures():
    nothing = [Finding("x", "Solution 1", r, None, None, 0.0, []) for r in (STATIC, OWN)]
    assert "Nothing can be said about its adaptivity" in reading(nothing)
    assert summary(nothing)[-1] == "- Too little to say: x, Solution 1."


def test_a_page_holds_every_comparison_and_section():
    made = made_up(against_rest=0.5)
    found = list(findings(made))
    drawn = figures.figures(made, found)
    text = page.page(made, found, drawn, {"Another part": "What it showed."})
    assert "Of 8 comparisons, 6 came out better, 0 worse, and 2 not distinguishable." in text
    assert "## Another part\n\nWhat it showed." in text
    assert "Solution 1 takes 1.25 standard ones" in text
    assert "| fine-tuned | 2 | 0.001 | norm 1 | 25.0 % |" in text
    assert "| Solution 2 | standard, equal time | −10.9 % [−10.9, −10.9] |" in text
    assert set(drawn) == {"rd-fine-tuned", "course-fine-tuned", "bd-rates"}


def test_results_are_rounded_and_keep_the_courses_that_are_shown(tmp_path):
    made = made_up(against_rest=1 / 3)
    results.save(tmp_path / "r.json", made)
    loaded = results.load(tmp_path / "r.json")
    units = loaded["experiments"]["fine-tuned"]["seeds"]
    kept = [
        (seed, rival, run["lambda"])
        for seed, curves in units.items()
        for rival, runs in curves["Solution 1"].items()
        for run in runs
        if "series" in run
    ]
    assert kept == [("0", "balanced", 0.001), ("0", OWN, 0.001)]
    assert units["1"]["Solution 1"]["balanced"][0]["scores"]["a"] == [0.5, 7.436]
    assert "series" in made["experiments"]["fine-tuned"]["seeds"]["0"]["Solution 1"]["balanced"][0]


def test_a_loss_is_rate_and_priced_error():
    result = type("Result", (), {"scores": {"a": Score(0.5, 20.0), "b": Score(0.3, 30.0)}})
    expected = 0.4 + 0.001 * 255**2 * (0.01 + 0.001) / 2
    assert loss(result, 0.001) == pytest.approx(expected)
