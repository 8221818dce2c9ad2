"""The training command: ladders, runs that are killed and go on, several processes, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.lic import train
from examples.lic.checkpoint import load, save
from examples.lic.ladder import file_name
from tests.examples.test_lic_checkpoint import full_disk

ROOT = Path(__file__).parents[2]
SMALL = ["--crop", "64", "--batch", "1", "--lambdas", "0.01", "--log-every", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs that are read faster than the bundled ones."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        Image.effect_noise((80, 70), 40 + index).convert("RGB").save(folder / f"{index}.png")
    return folder


def run(folder, output, *more):
    return train.main([*SMALL, "--images", str(folder), "--output", str(output), *more])


def same(first, second):
    """Is everything the same that two checkpoints hold?"""
    assert type(first) is type(second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def weight(output, lmbda):
    return load(output / file_name(lmbda))["model"]["analysis.0.weight"]


def test_quick_run_leaves_a_checkpoint_for_each_lambda(tmp_path, capsys):
    assert train.main(["--quick", "--weighting", "solution1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for lmbda in (0.0035, 0.013):
        content = load(tmp_path / file_name(lmbda))
        assert content["taken"] == 6
        assert content["lmbda"] == lmbda
        assert str(tmp_path / file_name(lmbda)) in printed


def test_each_rung_starts_from_the_one_below(folder, tmp_path):
    """With a learning rate of nearly nothing, the start is what is saved."""
    options = ["--steps", "1", "--lr", "1e-30"]
    assert run(folder, tmp_path / "a", "--lambdas", "0.02", "0.01", *options) == 0
    low, high = (weight(tmp_path / "a", lmbda) for lmbda in (0.01, 0.02))
    assert torch.equal(low, high)
    assert run(folder, tmp_path / "b", "--seed", "1", *options) == 0
    assert not torch.equal(low, weight(tmp_path / "b", 0.01))
    start = ["--seed", "1", "--from", str(tmp_path / "a")]
    assert run(folder, tmp_path / "c", *start, *options) == 0
    assert torch.equal(low, weight(tmp_path / "c", 0.01))


def test_the_first_rung_may_be_longer(folder, tmp_path):
    options = ["--lambdas", "0.01", "0.02", "--steps", "1", "--first-steps", "2"]
    assert run(folder, tmp_path, *options) == 0
    assert [load(tmp_path / file_name(x))["taken"] for x in (0.01, 0.02)] == [2, 1]


def test_a_killed_run_goes_on_to_the_same_bits(folder, tmp_path):
    options = ["--steps", "40", "--save-every", "5", "--weighting", "solution1", "--ema", "0.9",
               "--schedule", "plateau", "--epoch", "4", "--patience", "1"]  # fmt: skip
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "examples.lic.train", *SMALL, "--images", str(folder),
               "--output", str(broken), *options]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (broken / file_name(0.01)).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()  # SIGKILL: no chance to tidy up
    taken = load(broken / file_name(0.01))["taken"]
    assert 0 < taken < 40
    assert taken % 5 == 0
    assert run(folder, broken, *options) == 0
    assert run(folder, tmp_path / "whole", *options) == 0
    assert same(*(load(tmp_path / x / file_name(0.01)) for x in ("broken", "whole")))


def test_a_finished_run_is_left_alone(folder, tmp_path, capsys):
    options = ["--steps", "2"]
    assert run(folder, tmp_path, *options) == 0
    before = (tmp_path / file_name(0.01)).stat().st_mtime_ns
    assert run(folder, tmp_path, *options) == 0
    assert "is complete: 2 steps" in capsys.readouterr().out
    assert (tmp_path / file_name(0.01)).stat().st_mtime_ns == before


def test_a_run_does_not_go_on_with_other_options(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--steps", "2") == 0
    assert run(folder, tmp_path, "--steps", "2", "--lr", "0.5", "--seed", "3") == 2
    printed = capsys.readouterr().err
    assert "started with alone, lr 0.001, seed 0. Found lr 0.5, seed 3." in printed


def test_logs_hold_losses_weights_cosine_and_speeds(folder, tmp_path):
    assert run(folder, tmp_path, "--steps", "4", "--weighting", "solution2") == 0
    events = EventAccumulator(str(tmp_path / "logs" / "lambda-0.01"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    kinds = {f"{kind}/{name}" for kind in ("loss", "weight", "coefficient", "step/speed")
             for name in ("rate", "distortion")}  # fmt: skip
    assert kinds | {"step/cosine", "step/lr"} <= tags
    assert [event.step for event in events.Scalars("step/cosine")] == [2, 4]
    # Over all parameters, as the weighting's own Gramian.
    own = [event.value for event in events.Scalars("cosine/rate,distortion")]
    assert [e.value for e in events.Scalars("step/cosine")] == pytest.approx(own, abs=1e-4)


def test_a_full_disk_is_reported_and_the_old_checkpoint_kept(folder, tmp_path, capsys):
    """At the end that is an error; before, there may be room the next time."""
    path, options = tmp_path / file_name(0.01), ["--steps", "4", "--save-every", "2"]
    original = train.ladder.Run.save

    def attempt(self):
        with full_disk() if self.session.taken > 2 else full_disk(10**9):
            original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.ladder.Run, "save", attempt)
        assert run(folder, tmp_path, *options) == 2
    printed = capsys.readouterr().err
    assert "could not be saved (File too large). The one that was there is as it was." in printed
    assert load(path)["taken"] == 2
    assert run(folder, tmp_path, *options) == 0
    assert load(path)["taken"] == 4


def test_a_full_disk_in_between_does_not_end_the_run(folder, tmp_path, capsys):
    original, attempts = train.ladder.Run.save, []

    def attempt(self):
        attempts.append(self.session.taken)
        with full_disk() if len(attempts) == 1 else full_disk(10**9):
            original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.ladder.Run, "save", attempt)
        assert run(folder, tmp_path, "--steps", "4", "--save-every", "2") == 0
    assert attempts == [2, 4]
    assert "warning: The checkpoint" in capsys.readouterr().err
    assert load(tmp_path / file_name(0.01))["taken"] == 4


def test_a_log_that_cannot_be_written_does_not_end_the_run(folder, tmp_path, capfd):
    """It is written by a thread of TensorBoard's, whose traceback says nothing more."""
    original = train.ladder.Run.save

    def attempt(self):
        with full_disk(10**9):
            original(self)

    with pytest.MonkeyPatch.context() as patch, full_disk(300):
        patch.setattr(train.ladder.Run, "save", attempt)
        code = run(folder, tmp_path, "--steps", "9", "--log-every", "1")
    printed = capfd.readouterr().err
    assert code == 0
    assert printed.startswith(f"warning: The log in {tmp_path}/logs/lambda-0.01 cannot be written")
    assert "Traceback" not in printed
    assert load(tmp_path / file_name(0.01))["taken"] == 9


def test_an_output_that_is_a_file_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(folder, tmp_path / "file", "--steps", "1") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/file/logs cannot be written (Not")


def test_an_image_that_breaks_off_is_named_and_nothing_lost(folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for source in folder.iterdir():
        data = source.read_bytes()
        (photos / source.name).write_bytes(data[:3000] if source.name == "1.png" else data)
    assert run(photos, tmp_path / "out", "--steps", "9") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {photos}/1.png cannot be read")
    assert "Traceback" not in printed
    taken = load(tmp_path / "out" / file_name(0.01))["taken"]
    assert taken < 3
    (photos / "1.png").unlink()
    assert run(photos, tmp_path / "out", "--steps", "9") == 0
    printed = capsys.readouterr().out
    assert f"goes on from step {taken}." in printed
    assert "the images are not those" in printed


def test_converted_images_are_said(folder, tmp_path, capsys):
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    Image.new("I;16", (80, 70)).save(tmp_path / "deep.png")
    assert run(tmp_path, tmp_path / "out", "--steps", "1") == 0
    assert "Converted to 8-bit RGB: deep.png (I;16)." in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--device", "cuda")
    assert "cuda cannot be used, PyTorch finds none here" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["resume", "start"])
def test_a_checkpoint_of_another_architecture_is_refused(how, folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--steps", "1") == 0
    where = {"resume": [], "start": ["--from", str(tmp_path / file_name(0.01))]}[how]
    output = {"resume": tmp_path, "start": tmp_path / "other"}[how]
    assert run(folder, output, "--steps", "1", "--arch", "base", *where) == 2
    message = {"resume": "architecture small. Found architecture base", "start": "--arch small"}
    assert message[how] in capsys.readouterr().err
    assert load(tmp_path / file_name(0.01))["arch"] == "small"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--lambdas", "0"], "argument --lambdas: should be positive, found 0"),
        (["--lmbda", "-0.1"], "argument --lmbda: should be positive, found -0.1"),
        (["--lambdas", "nan"], "argument --lambdas: should be positive, found nan"),
        (["--weighting", "magic"], "argument --weighting: invalid choice: 'magic'"),
        (["--arch", "huge"], "error: --arch should be small, base, large, full or compressai:"),
        (["--from", "nowhere.pt"], "error: There is no checkpoint nowhere.pt."),
        (["--rate-weight", "0.5"], "--rate-weight needs --weighting fixed"),
        (["--rate-weight", "2", "--weighting", "fixed"], "should be between 0 and 1, found 2"),
        (["--clip", "0"], "argument --clip: should be positive, found 0"),
        (["--workers", "-1"], "argument --workers: should not be negative, found -1"),
        (["--device", "warp"], "argument --device: warp cannot be used (Expected one of cpu"),
        (["--crop", "100"], "should be a multiple of 64, found 100"),
        (["--ema", "1"], "argument --ema: should be between 0 and 1, found 1"),
        (["--crop", "128"], "0.png should be at least 128 pixels high and wide"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, folder, tmp_path, capsys):
    try:
        code = run(folder, tmp_path, "--steps", "1", *options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def torchrun(folder, output, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "examples.lic.train", *SMALL, "--images", str(folder), "--output",
               str(output), *more]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    return load(output / file_name(0.01))


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["solution1", "solution2"])
def test_two_processes_train_one_model_and_go_on_exactly(weighting, folder, tmp_path):
    options = ["--steps", "6", "--weighting", weighting, "--ema", "0.9", "--schedule", "plateau"]
    whole = torchrun(folder, tmp_path / "whole", *options)
    assert whole["settings"]["processes"] == 2
    noise = [state["host"] for state in whole["random"]]
    assert not torch.equal(*noise)
    broken = tmp_path / "broken"
    half = torchrun(folder, broken, *options, "--steps", "3")
    half["settings"]["steps"] = 6  # as if it had been killed after the third of six
    save(broken / file_name(0.01), half)
    assert same(torchrun(folder, broken, *options), whole)
