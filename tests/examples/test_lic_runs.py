"""Runs and their checkpoints: stopped and resumed to the same bits, starts, what is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.lic import checkpoint
from examples.lic.__main__ import main
from examples.lic.checkpoint import CheckpointError, load
from examples.lic.images import ImageError
from examples.lic.log import Log, Progress
from examples.lic.losses import WEIGHTINGS, fixed
from examples.lic.runs import Run, train
from examples.lic.training import Observer, Recipe
from tests.support.disk import full_disk

STEPS = 7


@pytest.fixture
def pictures():
    return [torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8) for _ in range(3)]


@pytest.fixture
def folder(tmp_path):
    """Three photographs, which are read faster than the bundled ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.effect_noise((80, 70), 40 + index).convert("RGB").save(folder / f"{index}.png")
    return folder


def make_run(weighting="standard", arch="8,8", lambdas=(0.01,), recipe=None, **options):
    recipe = Recipe(STEPS, 1e-3) if recipe is None else recipe
    return Run(arch, lambdas, WEIGHTINGS[weighting], recipe, crop=64, batch=1, **options)


class After(Observer):
    """Does something after a step."""

    def __init__(self, step, action):
        self._step, self._action = step, action

    def after(self, trainer):
        if trainer.taken == self._step:
            self._action(trainer)


def stop(trainer):
    trainer.stop = True


def crash(trainer):
    raise RuntimeError("power failure")


def same(first, second):
    """Whether two checkpoints hold the same, bit by bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


RUNS = {
    "sum": make_run(),
    "averaged weights": make_run("solution1", recipe=Recipe(STEPS, 1e-3, clip=0.5, ema=0.9)),
    "averaged gradients": make_run("solution2-smoothed"),
    "random weights": make_run("random", recipe=Recipe(STEPS, 1e-3, clip="unit", ema=0.9)),
    "variable rate": make_run("mgda", arch="variable-rate:8,8", lambdas=(0.01, 0.05)),
    "random levels": make_run(arch="gains:8,8", lambdas=(0.01, 0.05), one_level=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits(name, pictures, tmp_path):
    run, whole, stopped = RUNS[name], tmp_path / "whole.pt", tmp_path / "stopped.pt"
    train(run, pictures, whole)
    with pytest.raises(KeyboardInterrupt):
        train(run, pictures, stopped, observers=[After(4, stop)])
    assert load(stopped)["taken"] == 4
    torch.rand(9)  # another process begins elsewhere in the stream of random numbers
    train(run, pictures, stopped)
    assert same(load(stopped), load(whole))


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(pictures, tmp_path):
    run, whole, broken = make_run("solution1"), tmp_path / "whole.pt", tmp_path / "broken.pt"
    train(run, pictures, whole)
    with pytest.raises(RuntimeError, match="power failure"):
        train(run, pictures, broken, save_every=3, observers=[After(5, crash)])
    assert load(broken)["taken"] == 3
    train(run, pictures, broken)
    assert same(load(broken), load(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_the_step_with_its_state_saved(number, pictures, tmp_path):
    before = signal.getsignal(number)
    kill = After(2, lambda trainer: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train(make_run(), pictures, tmp_path / "run.pt", observers=[kill])
    assert load(tmp_path / "run.pt")["taken"] == 2
    assert signal.getsignal(number) == before


def test_a_complete_run_is_left_as_it_is(pictures, tmp_path):
    train(make_run(), pictures, tmp_path / "run.pt")
    before = (tmp_path / "run.pt").stat().st_mtime_ns
    train(make_run(), pictures, tmp_path / "run.pt", observers=[After(1, crash)])
    assert (tmp_path / "run.pt").stat().st_mtime_ns == before


def test_a_run_does_not_go_on_with_other_settings(pictures, tmp_path):
    train(make_run(), pictures, tmp_path / "run.pt")
    other = make_run(recipe=Recipe(STEPS, 0.5), seed=3)
    with pytest.raises(CheckpointError, match=r"with: seed 0, lr 0\.001\. Found seed 3, lr 0\.5"):
        train(other, pictures, tmp_path / "run.pt")


def test_a_run_does_not_go_on_from_another_start(pictures, tmp_path):
    """Starts are told apart by their weights, whatever their files are called."""
    for seed in (0, 1):
        train(make_run(seed=seed), pictures, tmp_path / f"{seed}.pt")
    train(make_run(start=tmp_path / "0.pt"), pictures, tmp_path / "run.pt")
    (tmp_path / "0.pt").rename(tmp_path / "moved.pt")
    train(make_run(start=tmp_path / "moved.pt"), pictures, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"with: start [0-9a-f]{8}\. Found start"):
        train(make_run(start=tmp_path / "1.pt"), pictures, tmp_path / "run.pt")


def test_a_start_that_is_a_run_is_trained_first(pictures, tmp_path):
    still = Recipe(1, 1e-30)  # so that the start is what is saved
    start = make_run(recipe=Recipe(2, 1e-2))
    run = make_run(recipe=still, start=start)
    train(run, pictures, tmp_path / run.file_name())
    kept = load(tmp_path / start.file_name())
    assert kept["taken"] == 2
    assert same(load(tmp_path / run.file_name())["model"], kept["model"])
    variable = make_run(arch="gains:8,8", lambdas=(0.001, 0.01), recipe=still, start=start)
    train(variable, pictures, tmp_path / "variable.pt")
    model = load(tmp_path / "variable.pt")["model"]
    assert torch.equal(model["base.analysis.0.weight"], kept["model"]["analysis.0.weight"])
    assert model["highest"] == 0.01


def test_runs_of_one_seed_share_crops_and_noise_and_a_continued_run_sees_others(pictures, tmp_path):
    start, first = make_run(), {}
    still = Recipe(1, 1e-30)
    train(start, pictures, tmp_path / "start.pt")
    runs = {
        "scratch": make_run(recipe=still),
        "sum": make_run(recipe=still, start=tmp_path / "start.pt"),
        "solution1": make_run("solution1", recipe=still, start=tmp_path / "start.pt"),
        "as a run": make_run(recipe=still, start=start),
    }
    for name, run in runs.items():
        keep = After(1, lambda t, name=name: first.update({name: t.optimizer.metrics.as_floats()}))
        train(run, pictures, tmp_path / f"{name}.pt", observers=[keep])
    losses = {name: figures["loss/rate"] for name, figures in first.items()}
    assert losses["sum"] == losses["solution1"] == losses["as a run"] != losses["scratch"]
    assert runs["sum"].stream == runs["as a run"].stream != runs["scratch"].stream


def test_runs_are_told_apart_by_name_and_are_json():
    start = make_run()
    runs = [
        start, make_run("solution1"), make_run(seed=1), make_run(start=start),
        make_run(start=Path("a.pt")), replace(start, weighting=fixed(0.5)),
        make_run(recipe=Recipe(STEPS, 1e-3, ema=0.9)),
    ]  # fmt: skip
    assert len({run.file_name() for run in runs}) == len(runs)
    assert make_run(start=start).as_dict()["start"] == json.loads(json.dumps(start.as_dict()))
    assert start.file_name().startswith("8-8-0.01-")


def test_an_image_that_breaks_off_is_named_and_nothing_lost(folder, tmp_path, capsys):
    paths = sorted(folder.iterdir())
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:3000])
    with pytest.raises(ImageError, match=r"1\.png cannot be read"):
        train(make_run(), paths, tmp_path / "run.pt")
    taken = load(tmp_path / "run.pt")["taken"]
    assert taken < 3
    train(make_run(), [paths[0], paths[2]], tmp_path / "run.pt")
    printed = capsys.readouterr().out
    assert f"goes on from step {taken}." in printed
    assert "the images are not those" in printed


def test_a_log_holds_losses_weights_cosine_and_held_out_scores(pictures, tmp_path):
    log = Log(tmp_path / "log", every=2, held_out={"a": pictures[0]}, validate_every=4)
    train(make_run("solution2"), pictures, tmp_path / "run.pt", observers=[log])
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    kinds = {f"{kind}/{name}" for kind in ("loss", "weight", "coefficient")
             for name in ("rate", "distortion")}  # fmt: skip
    assert kinds | {"cosine/rate,distortion", "lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lr")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("held out/psnr")] == [4, 7]


@pytest.mark.parametrize("arch", ["8,8", "variable-rate:8,8"])
def test_being_watched_changes_nothing(arch, pictures, tmp_path):
    run = make_run("mgda", arch=arch)
    log = Log(tmp_path / "log", every=2, held_out={"a": pictures[0]}, validate_every=3)
    train(run, pictures, tmp_path / "watched.pt", observers=[log, Progress("run", seconds=0)])
    train(run, pictures, tmp_path / "plain.pt")
    assert same(load(tmp_path / "watched.pt"), load(tmp_path / "plain.pt"))


def test_a_full_disk_ends_a_run_at_its_last_checkpoint(pictures, tmp_path, monkeypatch):
    original = checkpoint.save

    def attempt(path, content):
        with full_disk() if content["taken"] > 2 else full_disk(10**9):
            original(path, content)

    monkeypatch.setattr(checkpoint, "save", attempt)
    message = r"could not be saved \(File too large\)\. The one that was there is as it was\."
    with pytest.raises(CheckpointError, match=message):
        train(make_run(), pictures, tmp_path / "run.pt", save_every=2)
    monkeypatch.undo()
    assert load(tmp_path / "run.pt")["taken"] == 2
    train(make_run(), pictures, tmp_path / "run.pt")
    assert load(tmp_path / "run.pt")["taken"] == STEPS


# The train command.

SMALL = ["--arch", "8,8", "--crop", "64", "--batch", "1", "--log-every", "2", "--steps", "1"]


def weight(content):
    return content["model"]["analysis.0.weight"]


def command(folder, output, *more):
    return main(["train", *SMALL, "--images", str(folder), "--output", str(output), *more])


def test_each_lambda_starts_from_the_one_below(folder, tmp_path, capsys):
    """With a learning rate of nearly nothing, the start is what is saved."""
    options = ["--lr", "1e-30", "--lambdas", "0.02", "0.01"]
    assert command(folder, tmp_path / "a", *options) == 0
    low, high = (load(tmp_path / "a" / f"lambda-{x}.pt") for x in (0.01, 0.02))
    assert same(weight(low), weight(high))
    assert f"{tmp_path}/a/lambda-0.01.pt is complete: 1 steps." in capsys.readouterr().out
    more = ["--lr", "1e-30", "--lambdas", "0.01", "--seed", "1", "--weighting", "fixed",
            "--rate-weight", "0.8"]  # fmt: skip
    assert command(folder, tmp_path / "b", *more, "--from", str(tmp_path / "a")) == 0
    assert same(weight(load(tmp_path / "b" / "lambda-0.01.pt")), weight(low))
    more = ["--arch", "variable-rate:8,8", "--lambdas", "0.01", "0.02", "--weighting", "mgda"]
    start = str(tmp_path / "a" / "lambda-0.02.pt")
    assert command(folder, tmp_path / "c", *more, "--from", start) == 0
    assert load(tmp_path / "c" / "variable-rate.pt")["model"]["highest"] == 0.02


def test_training_scores_a_folder_of_held_out_images(folder, tmp_path):
    options = ["--lambdas", "0.01", "--eval-images", str(folder)]
    assert command(folder, tmp_path / "out", *options) == 0
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "lambda-0.01"))
    events.Reload()
    assert "held out/bpp" in events.Tags()["scalars"]


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
        (["--arch", "huge"], "error: --arch should be small, base, large, full, widths like"),
        (["--from", "nowhere.pt"], "error: There is no checkpoint nowhere.pt."),
        (["--rate-weight", "0.5"], "--rate-weight needs --weighting fixed"),
        (["--rate-weight", "2", "--weighting", "fixed"], "should be above 0 and below 1, found 2"),
        (["--clip", "0"], "argument --clip: should be above 0, found 0"),
        (["--workers", "-1"], "argument --workers: should be above -1, found -1"),
        (["--device", "warp"], "argument --device: warp cannot be used (Expected one of cpu"),
        (["--crop", "100"], "should be a multiple of 64, found 100"),
        (["--ema", "1"], "argument --ema: should be above 0 and below 1, found 1"),
        (["--crop", "128"], "0.png should be at least 128 pixels high and wide"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, folder, tmp_path, capsys):
    try:
        code = command(folder, tmp_path / "out", *options)
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command(folder, tmp_path / "file") == 2
    assert f"error: {tmp_path}/file/logs cannot be written (Not" in capsys.readouterr().err


def test_unknown_commands_are_refused_and_known_ones_listed(capsys):
    assert main(["paint"]) == 2
    assert "python -m examples.lic evaluate" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "python -m examples.lic train" in capsys.readouterr().out
