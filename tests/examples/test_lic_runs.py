"""Runs and their checkpoints: stopped and resumed to the same bits, starts, what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.lic import checkpoint
from examples.lic.architectures import ArchitectureError
from examples.lic.checkpoint import CheckpointError, load
from examples.lic.evaluation import evaluate
from examples.lic.images import ImageError, read_all
from examples.lic.log import Log, Progress
from examples.lic.losses import WEIGHTINGS, RateDistortion, bounded_rate, fixed
from examples.lic.runs import Run, TrainingError, check, train
from examples.lic.training import Observer, Recipe
from moo_balance import BalanceError
from tests.support.disk import full_disk
from tests.support.photographs import write_photographs

STEPS = 5
TINY = "mbt2018-mean:8,8"


@pytest.fixture
def pictures():
    return [torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8) for _ in range(3)]


@pytest.fixture
def folder(tmp_path):
    """Three small photographs."""
    return write_photographs(tmp_path / "photos", 3)


def make_run(weighting="standard", arch=TINY, lambdas=(0.01,), recipe=None, **options):
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
    "variable rate": make_run("mgda", arch=f"variable-rate:{TINY}", lambdas=(0.01, 0.05)),
    "random levels": make_run(arch=f"gains:{TINY}", lambdas=(0.01, 0.05), one_level=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits(name, pictures, tmp_path):
    run, whole, stopped = RUNS[name], tmp_path / "whole.pt", tmp_path / "stopped.pt"
    train(run, pictures, whole)
    with pytest.raises(KeyboardInterrupt):
        train(run, pictures, stopped, observers=[After(3, stop)])
    assert load(stopped)["taken"] == 3
    torch.rand(9)  # another process begins elsewhere in the stream of random numbers
    train(run, pictures, stopped)
    assert same(load(stopped), load(whole))


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(pictures, tmp_path):
    run, whole, broken = make_run("solution1"), tmp_path / "whole.pt", tmp_path / "broken.pt"
    train(run, pictures, whole)
    with pytest.raises(RuntimeError, match="power failure"):
        train(run, pictures, broken, save_every=3, observers=[After(4, crash)])
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


def test_a_second_signal_ends_a_run_at_once(pictures, tmp_path):
    def kill(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    # A shell starts jobs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_run(), pictures, tmp_path / "run.pt", observers=[After(2, kill)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_a_signal_during_the_last_save_ends_a_run_with_its_state_saved(
    complete, pictures, tmp_path, monkeypatch
):
    original = checkpoint.save

    def interrupted(path, content):
        os.kill(os.getpid(), signal.SIGTERM)
        original(path, content)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    # Without a handler of the run, SIGTERM would end the tests.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    observers = [] if complete else [After(3, stop)]
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_run(), pictures, tmp_path / "run.pt", observers=observers)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert load(tmp_path / "run.pt")["taken"] == (STEPS if complete else 3)


def poison_weights(trainer):
    next(trainer.model.parameters()).data.fill_(math.nan)


def poison_averages(trainer):
    next(trainer.trained.parameters()).data.fill_(math.inf)


@pytest.mark.parametrize("poison", [poison_weights, poison_averages])
def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(poison, pictures, tmp_path):
    """With "skip" all later steps were skipped, and the run was complete."""
    run, path = make_run(recipe=Recipe(STEPS, 1e-3, ema=0.9)), tmp_path / "run.pt"
    message = r"weights after step 4 for .*run\.pt should be finite.*run\.pt is there from an earl"
    with pytest.raises(TrainingError, match=message):
        train(run, pictures, path, nonfinite="skip", save_every=2, observers=[After(3, poison)])
    assert load(path)["taken"] == 2
    train(run, pictures, path)
    assert load(path)["taken"] == STEPS


def test_a_run_whose_last_step_ruins_the_weights_is_not_complete(pictures, tmp_path):
    ruin = After(STEPS, poison_weights)
    with pytest.raises(TrainingError, match=r"step 5 .*lower learning rate\. Nothing is saved\."):
        train(make_run(), pictures, tmp_path / "run.pt", observers=[ruin])
    assert list(tmp_path.iterdir()) == []


class NotFinite(RateDistortion):
    """Losses that are NaN, or have a NaN gradient, for the second of three pictures."""

    kind = "loss"

    def forward(self, images):
        losses = super().forward(images)
        if images.min() < 1:
            return losses
        if self.kind == "loss":
            return {**losses, "rate": losses["rate"] * torch.nan}
        zero = self.model.g_a[0].weight.sum() * 0
        return {**losses, "rate": losses["rate"] + zero.abs().sqrt()}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_a_run_until_it_may_be_skipped(
    kind, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(NotFinite, "kind", kind)
    monkeypatch.setattr("examples.lic.runs.RateDistortion", NotFinite)
    pictures[1] = torch.full_like(pictures[1], 255)
    run, path = make_run(recipe=Recipe(STEPS, 1e-3, clip="unit")), tmp_path / "run.pt"
    for _ in range(2):  # an exact resume meets it again
        with pytest.raises(TrainingError, match=r"run\.pt should be finite.*--nonfinite skip"):
            train(run, pictures, path, save_every=1)
    assert 0 < load(path)["taken"] < 3
    train(run, pictures, path, nonfinite="skip")
    content = load(path)
    assert content["taken"] == STEPS
    assert content["optimizer"]["balance"]["skipped"] in (1, 2)
    train(run, pictures, tmp_path / "whole.pt", nonfinite="skip")
    assert same(load(tmp_path / "whole.pt"), content)


def test_nothing_but_steps_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.lic.runs.RateDistortion", NotFinite)
    white = [torch.full((3, 64, 64), 255, dtype=torch.uint8)]
    run = make_run(recipe=Recipe(200, 1e-3))
    message = "Too many steps in a row are not: .* lower learning rate. Nothing is saved."
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(TrainingError, match=message):
        train(run, white, tmp_path / "run.pt", nonfinite="skip")


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


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {}},
        {"optimizer": "state"},
        {"schedule": None},
        {"crops": {}},
        {"crops": {"taken": "all"}},
        {"random": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
        {"model": {}},
    ],
    ids=str,
)
def test_a_run_does_not_go_on_from_a_damaged_state(change, pictures, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(make_run(), pictures, path, observers=[After(2, stop)])
    checkpoint.save(path, {**load(path), **change})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.pt should hold the whole state of a run\."):
        train(make_run(), pictures, path)
    assert path.read_bytes() == before


def test_a_codec_with_a_bound_on_its_rate_says_which_lambda_that_is(pictures, tmp_path):
    class Read(Observer):
        def after(self, trainer):
            self.figures = trainer.optimizer.log_dict(prefix="")

    run, read = make_run(lambdas=(0.013,), recipe=Recipe(STEPS, 1e-3)), Read()
    for bpp, name in ((1e-3, "tight"), (1e3, "slack")):
        bounded, path = replace(run, weighting=bounded_rate(bpp)), tmp_path / f"{name}.pt"
        with pytest.raises(KeyboardInterrupt):
            train(bounded, pictures, path, observers=[After(3, stop)])
        train(bounded, pictures, path, observers=[read])
        _, about = checkpoint.load_codec(path)
        assert about["run"]["lambdas"] == [0.013]
        if name == "slack":
            assert about["lambdas"] == [0.013]
        else:
            rate, distortion = (read.figures[f"coefficient/{x}"] for x in ("rate", "distortion"))
            assert about["lambdas"] == [float(f"{0.013 * distortion / rate:.4g}")] != [0.013]
    train(run, pictures, tmp_path / "plain.pt")
    assert "lambdas" not in load(tmp_path / "plain.pt")


def test_what_a_bound_amounted_to_is_known_without_a_further_step(folder, tmp_path):
    """Also of a run that is resumed and can take no step."""
    photos, path = read_all(sorted(folder.iterdir())), tmp_path / "run.pt"
    run = replace(make_run(), weighting=bounded_rate(1e-3))
    with pytest.raises(KeyboardInterrupt):
        train(run, photos, path, observers=[After(3, stop)])
    saved = load(path)["lambdas"]
    assert saved != [0.01]
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ImageError):
        train(run, photos, path)
    assert load(path)["lambdas"] == saved


def test_a_start_that_is_a_run_is_trained_first(pictures, tmp_path):
    still = Recipe(1, 1e-30, auxiliary_lr=1e-30)  # so that the start is what is saved
    start = make_run(recipe=Recipe(2, 1e-2))
    run = make_run(recipe=still, start=start)
    train(run, pictures, tmp_path / run.file_name())
    kept = load(tmp_path / start.file_name())
    assert kept["taken"] == 2
    assert same(load(tmp_path / run.file_name())["model"], kept["model"])
    variable = make_run(arch=f"gains:{TINY}", lambdas=(0.001, 0.01), recipe=still, start=start)
    train(variable, pictures, tmp_path / "variable.pt")
    model = load(tmp_path / "variable.pt")["model"]
    assert torch.equal(model["base.g_a.0.weight"], kept["model"]["g_a.0.weight"])
    assert model["highest"] == 0.01


def test_runs_of_one_seed_share_crops_and_noise_and_a_continued_run_sees_others(pictures, tmp_path):
    start, first = make_run(), {}
    still = Recipe(1, 1e-30, auxiliary_lr=1e-30)
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
    assert start.file_name().startswith("mbt2018-mean-8-8-0.01-")


def test_an_image_that_breaks_off_is_named_and_nothing_lost(folder, tmp_path, capsys):
    paths = sorted(folder.iterdir())
    photos = read_all(paths)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:3000])
    with pytest.raises(ImageError, match=r"1\.png cannot be read"):
        train(make_run(), photos, tmp_path / "run.pt")
    taken = load(tmp_path / "run.pt")["taken"]
    assert taken < 3
    train(make_run(), [photos[0], photos[2]], tmp_path / "run.pt")
    printed = capsys.readouterr().out
    assert f"goes on from step {taken}." in printed
    assert "the images are not those" in printed
    with pytest.raises(CheckpointError, match="complete, on others"):
        train(make_run(), photos[:1], tmp_path / "run.pt")


def make_log(folder, pictures, **options):
    return Log(folder, every=2, images={"a": pictures[0]}, crop=64, **options)


def test_a_log_holds_losses_weights_cosine_and_validation(pictures, tmp_path, capsys):
    log = make_log(tmp_path / "log", pictures, validate_every=3)
    train(make_run("solution2"), pictures, tmp_path / "run.pt", observers=[log])
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    kinds = {f"{kind}/{name}" for kind in ("loss", "weight", "coefficient")
             for name in ("rate", "distortion")}  # fmt: skip
    assert kinds | {"cosine/rate,distortion", "lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lr")] == [2, 4]
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 5]
    bpp, psnr = (events.Scalars(f"validation/{name}")[1].value for name in ("bpp", "psnr"))
    expected = f"log: validation after step 5, {bpp:.3f} bpp, {psnr:.2f} dB\n"
    assert capsys.readouterr().err.endswith(expected)


def test_validation_is_of_averaged_weights(pictures, tmp_path):
    run = make_run(recipe=Recipe(2, 1e-2, ema=0.999))
    log = make_log(tmp_path / "log", pictures, validate_every=1)
    train(run, pictures, tmp_path / "run.pt", observers=[log])
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    codec, _ = checkpoint.load_codec(tmp_path / "run.pt")
    score = evaluate(codec, {"a": pictures[0]})["a"]
    assert events.Scalars("validation/psnr")[-1].value == pytest.approx(score.psnr)


@pytest.mark.parametrize("arch", [TINY, f"variable-rate:{TINY}"])
def test_being_watched_changes_nothing(arch, pictures, tmp_path):
    run = make_run("mgda", arch=arch)
    log = make_log(tmp_path / "log", pictures, validate_every=3)
    train(run, pictures, tmp_path / "watched.pt", observers=[log, Progress("run", seconds=0)])
    train(run, pictures, tmp_path / "plain.pt")
    assert same(load(tmp_path / "watched.pt"), load(tmp_path / "plain.pt"))


@pytest.mark.parametrize(
    ("arch", "lambdas", "text"),
    [
        (TINY, (0.01,), r"loss [\d.]+, [\d.]+ bpp, [\d.]+ dB"),
        (f"gains:{TINY}", (0.01, 0.05), r"λ=0.01 [\d.e+]+, λ=0.05 [\d.e+]+"),
    ],
)
def test_progress_is_told_line_by_line_where_there_is_no_terminal(
    arch, lambdas, text, pictures, tmp_path, capsys
):
    run = make_run(arch=arch, lambdas=lambdas)
    train(run, pictures, tmp_path / "a.pt", observers=[Progress("often", seconds=0)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == STEPS
    for step, line in enumerate(lines, 1):
        assert re.fullmatch(f"often: step {step} of {STEPS}, {text}", line)
    train(run, pictures, tmp_path / "b.pt", observers=[Progress("seldom", seconds=1e9)])
    assert re.fullmatch(f"seldom: step {STEPS} of {STEPS}, {text}\n", capsys.readouterr().err)


def test_figures_of_progress_are_those_of_the_batch(pictures, tmp_path, capsys):
    class Read(Observer):
        def after(self, trainer):
            self.losses = trainer.optimizer.metrics.losses

    read = Read()
    train(make_run(), pictures, tmp_path / "a.pt", observers=[read, Progress("run")])
    rate, distortion = (read.losses[name].item() for name in ("rate", "distortion"))
    psnr = 10 * math.log10(255**2 * 0.01 / distortion)
    expected = f"loss {rate + distortion:.3g}, {rate:.3f} bpp, {psnr:.2f} dB\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_plan_is_checked_before_anything_is_trained(pictures, tmp_path):
    first, second = (tmp_path / f"{name}.pt" for name in "ab")
    plan = [(make_run(), first), (make_run(lambdas=(0.02,), start=first), second)]
    check(plan)
    train(make_run(lambdas=(0.02,), recipe=Recipe(1, 1.0)), pictures, second)
    with pytest.raises(CheckpointError, match=r"b\.pt should go on with .* steps 1, lr 1\.0"):
        check(plan)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere\.pt"):
        check([*plan[:1], (make_run(start=tmp_path / "nowhere.pt"), second)])
    with pytest.raises(ArchitectureError):
        check([*plan[:1], (make_run(arch="huge"), tmp_path / "c.pt")])
    with pytest.raises(BalanceError, match="rate"):
        check([(make_run("fixed", arch=f"gains:{TINY}", lambdas=(0.01, 0.02)), first)])


def make_plan(folder, *lambdas):
    """Runs that each start from the one before, as the train command has them."""
    plan = []
    for lmbda in lambdas:
        start = plan[-1][1] if plan else None
        plan.append((make_run(lambdas=(lmbda,), start=start), folder / f"{lmbda}.pt"))
    return plan


def test_a_plan_that_was_stopped_anywhere_passes_its_check(pictures, tmp_path):
    plan = make_plan(tmp_path, 0.01, 0.02)
    for run, path in plan:
        with pytest.raises(KeyboardInterrupt):
            train(run, pictures, path, observers=[After(2, stop)])
        check(plan)
        train(run, pictures, path)
        check(plan)


@pytest.mark.parametrize("lambdas", [(0.001, 0.01, 0.02), (0.01, 0.015, 0.02)])
def test_a_start_that_a_finished_run_did_not_have_is_found_before_anything_is_trained(
    lambdas, pictures, tmp_path
):
    """It was refused after hours, when its turn came."""
    for run, path in make_plan(tmp_path, 0.01, 0.02):
        train(run, pictures, path)
    message = r"0\.0[12]\.pt should go on with .*: start .*Found start .*0\.0[01]+5?\.pt\."
    with pytest.raises(CheckpointError, match=message):
        check(make_plan(tmp_path, *lambdas))


def test_a_start_that_was_trained_anew_is_found_before_anything_is_trained(pictures, tmp_path):
    plan = make_plan(tmp_path, 0.01, 0.02)
    for run, path in plan:
        train(run, pictures, path)
    (run, path), _ = plan
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        train(run, pictures[:1], path, observers=[After(2, stop)])
    for _ in ("on its way", "complete"):
        with pytest.raises(CheckpointError, match=r"0\.02\.pt should go on with .*: start"):
            check(plan)
        train(run, pictures[:1], path)


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
