"""The train command: its options, what it refuses before it trains, how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.lic import train
from examples.lic.__main__ import main
from examples.lic.checkpoint import load
from examples.lic.losses import WEIGHTINGS
from moo_balance import AnalyticQP, BalancedTrajectory, MovingAverage
from tests.support.commands import check_refusal
from tests.support.photographs import write_photographs

ROOT = Path(__file__).parents[2]
TINY = "mbt2018-mean:8,8"


@pytest.fixture
def folder(tmp_path):
    """Three small photographs."""
    return write_photographs(tmp_path / "photos", 3)


SMALL = ["--arch", TINY, "--crop", "64", "--batch", "1", "--log-every", "2", "--steps", "1"]


def weight(path):
    return load(path)["model"]["g_a.0.weight"]


def command(folder, output, *more):
    folders = ["--images", str(folder), "--val", str(folder), "--output", str(output)]
    return main(["train", *SMALL, *folders, *more])


def test_each_lambda_starts_from_the_one_below(folder, tmp_path, capsys):
    """With a learning rate of nearly nothing, the start is what is saved."""
    options = ["--lr", "1e-30", "--lambdas", "0.02", "0.01"]
    assert command(folder, tmp_path / "a", *options) == 0
    low, high = (tmp_path / "a" / f"lambda-{x}.pt" for x in (0.01, 0.02))
    assert torch.equal(weight(low), weight(high))
    assert f"{tmp_path}/a/lambda-0.01.pt is complete: 1 steps." in capsys.readouterr().out
    more = ["--lr", "1e-30", "--lambdas", "0.01", "--seed", "1", "--weighting", "fixed",
            "--rate-weight", "0.8"]  # fmt: skip
    assert command(folder, tmp_path / "b", *more, "--from", str(tmp_path / "a")) == 0
    assert torch.equal(weight(tmp_path / "b" / "lambda-0.01.pt"), weight(low))
    assert main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "files")]) == 0
    more = ["--arch", f"variable-rate:{TINY}", "--lambdas", "0.01", "0.02", "--weighting", "mgda"]
    assert command(folder, tmp_path / "c", *more, "--from", str(tmp_path / "files")) == 0
    assert load(tmp_path / "c" / "variable-rate.pt")["model"]["highest"] == 0.02


def test_other_options_starts_and_images_than_before_are_refused(folder, tmp_path, capsys):
    """They were ignored once: exit code 0, and the old weights."""
    for name, seed in (("a", "0"), ("b", "1")):
        assert command(folder, tmp_path / name, "--lambdas", "0.01", "--seed", seed) == 0
    again = ["--lambdas", "0.01", "--from", str(tmp_path / "a")]
    assert command(folder, tmp_path / "c", *again) == 0
    before = (tmp_path / "c" / "lambda-0.01.pt").stat().st_mtime_ns
    assert command(folder, tmp_path / "c", *again) == 0
    others = [[*again[:-1], str(tmp_path / "b")], again[:2], [*again, "--amp"]]
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    for other in (*others, again):
        capsys.readouterr()
        assert command(folder, tmp_path / "c", *other) == 2
        assert "lambda-0.01.pt should " in capsys.readouterr().err
    assert (tmp_path / "c" / "lambda-0.01.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "{starts}"], "There is no checkpoint {starts}/lambda-0.02.pt"),
        (["--from", "{starts}", "--lr", "0.5"], "There is no checkpoint"),
        (["--arch", "gains:" + TINY, "--weighting", "fixed"], "rate"),
    ],
)
def test_what_would_end_a_later_run_is_found_before_the_first(
    options, message, folder, tmp_path, capsys
):
    starts = tmp_path / "starts"
    assert command(folder, starts, "--lambdas", "0.01") == 0
    options = [option.format(starts=starts) for option in options]
    assert command(folder, tmp_path / "out", "--lambdas", "0.01", "0.02", *options) == 2
    assert message.format(starts=starts) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_found_before_training_or_left_out(folder, tmp_path, capsys):
    """Its header is whole, so that it was found in the middle of training once."""
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    options = ["--lambdas", "0.01", "--steps", "4", "--val-every", "9"]
    out, images = tmp_path / "out", ["--images", str(folder), "--crop", "64", "--output"]
    assert main(["train", *SMALL, *images, str(out), *options]) == 2
    assert "1.png cannot be read" in capsys.readouterr().err
    assert not out.exists()
    val = tmp_path / "val"
    val.mkdir()
    (val / "0.png").write_bytes((folder / "0.png").read_bytes())
    options += ["--val", str(val), "--skip-unusable"]
    assert main(["train", *SMALL, *images, str(out), *options]) == 0
    assert "Trains on 2 of the 3 images" in capsys.readouterr().out
    assert load(out / "lambda-0.01.pt")["taken"] == 4


@pytest.mark.parametrize(
    ("moment", "message"),
    [("before", "Nothing is saved in"), ("after", "lambda-0.01.pt has step 1, from which")],
)
def test_an_interrupt_says_what_is_saved(moment, message, folder, tmp_path, capsys, monkeypatch):
    whole = train.runs.train

    def interrupted(*arguments, **options):
        if moment == "after":
            whole(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.runs, "train", interrupted)
    assert command(folder, tmp_path / "out", "--lambdas", "0.01") == 130
    assert message in capsys.readouterr().err


def test_sigterm_to_all_processes_of_a_training_saves_it(folder, tmp_path):
    out = tmp_path / "out"
    options = ["--lambdas", "0.01", "--workers", "1", "--images", folder, "--val", folder,
               "--val-every", "1", "--output", out, *SMALL[:-1], "9999"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.lic", "train", *options],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert any(line.startswith("lambda-0.01: validation after step 2") for line in process.stderr)
    os.killpg(process.pid, signal.SIGTERM)
    *_, last = process.communicate(timeout=180)[1].splitlines()
    assert process.returncode == 130
    path = out / "lambda-0.01.pt"
    expected = f"Stopped. {path} has step {load(path)['taken']}, from which the same command goes"
    assert last.startswith(expected)


def test_training_validates_on_a_folder(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "out", "--lambdas", "0.01") == 0
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "lambda-0.01"))
    events.Reload()
    assert "validation/bpp" in events.Tags()["scalars"]
    assert "lambda-0.01: step 1 of 1, loss " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "weighting"),
    [
        (["--weighting", "solution1", "--lr-weights", "0.1", "--decay", "0", "--shift", "2",
          "--every", "3"], BalancedTrajectory(lr=0.1, decay=0.0, shift=2.0, every=3)),
        (["--weighting", "solution2", "--projection", "exact", "--shift", "0"],
         AnalyticQP(projection="exact", shift=0.0)),
        (["--weighting", "solution2-smoothed", "--momentum", "0.5", "--every", "2"],
         MovingAverage(AnalyticQP(every=2), beta=0.5)),
        (["--weighting", "mgda"], WEIGHTINGS["mgda"]),
    ],
)  # fmt: skip
def test_options_set_the_hyper_parameters_of_a_weighting(options, weighting):
    (run, _), *_ = train._plan(train._parse(options))
    assert run.weighting == weighting


def test_a_quick_run_has_the_lambdas_that_were_asked_for_and_a_place_of_its_own():
    """It replaced them, and wrote where the next command of the README looks."""
    quick = train._parse(["--quick", "--lambdas", "0.1"])
    assert (quick.lambdas, quick.steps) == ([0.1], 6)
    assert "quick" in quick.output.parts
    plain = train._parse([])
    assert "quick" not in plain.output.parts
    assert "target" in train._parse(["--quick", "--target-bpp", "1"]).output.parts
    assert plain.crop == 256
    assert plain.clip == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(folder, tmp_path, "--device", "cuda")
    assert "cuda cannot be used (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--lambdas", "0"], "argument --lambdas: should be above 0, found 0"),
        (["--lambdas", "nan"], "argument --lambdas: should be above 0, found nan"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--weighting", "magic"], "argument --weighting: invalid choice: 'magic'"),
        (["--arch", "huge"], "error: --arch should be small (mbt2018-mean:32,48), "),
        (["--from", "nowhere.pt"], "error: There is no checkpoint nowhere.pt."),
        (["--rate-weight", "0.5"], "--rate-weight needs --weighting fixed"),
        (["--rate-weight", "2", "--weighting", "fixed"], "should be above 0 and below 1, found 2"),
        (["--clip", "0"], "argument --clip: should be above 0, found 0"),
        (["--workers", "-1"], "argument --workers: should be at least 0, found -1"),
        (["--device", "warp"], "argument --device: warp cannot be used (Expected one of cpu"),
        (["--crop", "100"], "should be a multiple of 64, found 100"),
        (["--ema", "1"], "argument --ema: should be above 0 and below 1, found 1"),
        (["--shrink", "0"], "--shrink: should be above 0 and below 1e+06, found 0"),
        (["--shrink", "1", "2"], "0.png should be at least 64 pixels high and wide"),
        (["--crop", "128"], "0.png should be at least 128 pixels high and wide"),
        (["--decay", "1"], "--decay should be given with a weighting that has it. Found Sum"),
        (["--shift", "-1"], "argument --shift: should be at least 0, found -1"),
        (["--momentum", "1"], "argument --momentum: should be at least 0 and below 1, found 1"),
        (["--nonfinite", "stop"], "argument --nonfinite: invalid choice: 'stop'"),
        (["--amp", "--arch", "compressai:mbt2018"], "error: --amp should be given with a codec of"),
        (["--target-bpp", "0"], "argument --target-bpp: should be above 0, found 0"),
        (
            ["--target-bpp", "1", "--weighting", "famo"],
            "--target-bpp has a λ and a weighting of its own",
        ),
        (["--target-bpp", "1", "--arch", "gains:small"], "with a codec of one rate"),
        (["--target-bpp", "1", "--weighting", "standard"], "leave --weighting out"),
        (["--target-bpp", "1", "--lambdas", "0.1"], "leave --lambdas out"),
        (["--target-bpp", "1", "--lambdas=0.1", "--quick"], "leave --lambdas out"),
        (
            ["--weighting", "fixed", "--arch", "gains:small"],
            "fixed should be given with a codec of",
        ),
        (["--seed", "-1"], "argument --seed: should be at least 0 and below 1e+09, found -1"),
        (["--seed", str(2**63)], "argument --seed: should be at least 0 and below 1e+09, found 9"),
        (["--device", "meta"], "argument --device: meta cannot be used (Cannot copy out of meta"),
        (["--device", "hpu"], "argument --device: hpu cannot be used ("),
        (["--threads", "9" * 20], "argument --threads: should be above 0 and below 1025, found 9"),
        (["--lr", "1e39"], "argument --lr: should be above 0 and below 1e+06, found 1e39"),
        (["--lambdas", "inf"], "argument --lambdas: should be above 0 and below inf, found inf"),
        (["--shift", "inf"], "argument --shift: should be at least 0 and below inf, found inf"),
        (["--clip", "nan"], "argument --clip: should be above 0, found nan"),
        (["--memory", "1e300"], "argument --memory: should be at least 0 and below 1e+06, found"),
        (["--shrink", "9" * 20], "argument --shrink: should be above 0 and below 1e+06, found 9"),
        (["--shrink", "999999"], "0.png should be at least 64 pixels high and wide"),
        (["--output", os.fsdecode(b"caf\xe9")], "--output should be UTF-8, which TensorBoard"),
        (["--qui"], "unrecognized arguments: --qui"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, folder, tmp_path, capsys):
    check_refusal(lambda: command(folder, tmp_path / "out", *options), message, capsys)
    assert not (tmp_path / "out").exists()


def test_crops_that_do_not_fit_into_the_bundled_images_are_refused(tmp_path, capsys):
    command = ["train", "--crop", "448", "--output", str(tmp_path / "out")]
    message = "--crop should be at most 400, the least side of the bundled images. Found 448."
    check_refusal(lambda: main(command), message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_lambda_below_finished_ones_is_refused_before_it_is_trained(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "out", "--lambdas", "0.01") == 0
    assert command(folder, tmp_path / "out", "--lambdas", "0.005", "0.01") == 2
    assert "lambda-0.01.pt should go on with the options it was" in capsys.readouterr().err
    assert not (tmp_path / "out" / "lambda-0.005.pt").exists()


def test_a_bound_on_the_rate_takes_the_place_of_lambda(folder, tmp_path):
    assert command(folder, tmp_path / "out", "--target-bpp", "0.5", "0.25") == 0
    for target in (0.25, 0.5):
        weighting = load(tmp_path / "out" / f"bpp-{target}.pt")["run"]["weighting"]
        assert weighting.startswith(f"Lagrangian(targets={{'rate': {target}}}")


def test_an_output_that_is_a_file_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command(folder, tmp_path / "file") == 2
    assert f"error: {tmp_path}/file/logs cannot be written (Not" in capsys.readouterr().err


def test_unknown_commands_are_refused_and_known_ones_listed(capsys):
    assert main(["paint"]) == 2
    assert "python -m examples.lic evaluate" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "python -m examples.lic train" in capsys.readouterr().out
