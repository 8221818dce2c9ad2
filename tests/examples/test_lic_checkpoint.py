"""Checkpoints: whole or not at all, with a clear error for what does not fit; codecs by name."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from examples.lic import checkpoint
from examples.lic.architectures import ArchitectureError, build, full_name
from examples.lic.checkpoint import (
    CheckpointError,
    load,
    load_codec,
    load_start,
    save,
    save_codec,
    write_atomically,
)
from examples.lic.hyperprior import MeanScaleHyperprior, ScaleHyperprior
from tests.support.disk import full_disk

TINY = "mbt2018-mean:8,8"


def content(value):
    return trained("small", {"weight": torch.full((9000,), value)})


def trained(arch, state, lambdas=(0.05,), **more):
    """What a training run saves of its codec."""
    return {"run": {"arch": arch, "lambdas": lambdas}, "taken": 7, "model": state, **more}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new folder" / "codec.pt"
    save(path, content(1.0))
    assert torch.equal(load(path)["model"]["weight"], torch.ones(9000))
    assert [p.name for p in path.parent.iterdir()] == ["codec.pt"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "codec.pt"
    save(path, content(1.0))
    message = r"codec\.pt could not be saved \(File too large\)\. The one that was there is as it"
    with full_disk(), pytest.raises(CheckpointError, match=message):
        save(path, content(2.0))
    assert torch.equal(load(path)["model"]["weight"], torch.ones(9000))
    assert [p.name for p in tmp_path.iterdir()] == ["codec.pt"]


def test_a_full_disk_without_an_old_checkpoint(tmp_path):
    with full_disk(), pytest.raises(CheckpointError, match=r"large\)\. Free some space, or make"):
        save(tmp_path / "codec.pt", content(1.0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/codec\.pt could not be saved"):
        save(tmp_path / "file" / "codec.pt", content(1.0))


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_whenever_saving_fails_the_old_checkpoint_stays(tmp_path, monkeypatch, moment):
    save(tmp_path / "codec.pt", content(1.0))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"examples.lic.checkpoint.{moment}", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path / "codec.pt", content(2.0))
    monkeypatch.undo()
    assert torch.equal(load(tmp_path / "codec.pt")["model"]["weight"], torch.ones(9000))
    assert [p.name for p in tmp_path.iterdir()] == ["codec.pt"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.lic.checkpoint.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "codec.pt", content(1.0))
    assert list(tmp_path.iterdir()) == []


def test_the_file_that_a_link_names_is_written(tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    link.symlink_to(target)
    for data in (b"new", b"again"):
        write_atomically(link, data)
        assert target.read_bytes() == data
    assert link.is_symlink()


def test_a_pipe_gets_the_data_and_stays(tmp_path):
    """A device was replaced by a file, ``/dev/null`` for all processes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"data")
    assert os.read(reader, 9) == b"data"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(CheckpointError, match=r"could not be saved \(Is a directory\)"):
        save(tmp_path, content(1.0))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        load(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "harm", [lambda b: b"", lambda b: b[:300], lambda b: b"no checkpoint", lambda b: b"\x80"]
)
def test_a_broken_checkpoint_is_named(tmp_path, harm):
    path = tmp_path / "codec.pt"
    save(path, content(1.0))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"codec\.pt should be a .* or a damaged file"):
        load(path)


@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_an_image_is_called_something_else_without_words_of_torch(tmp_path, end):
    path = tmp_path / f"photo{end}"
    Image.new("RGB", (9, 9)).save(path, "jpeg")
    with pytest.raises(CheckpointError, match=r"photo\..*Found something else") as caught:
        load_codec(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"run": None},
        {"run": {"lambdas": [1]}},
        {"run": {"arch": 3, "lambdas": [1]}},
        {"run": {"arch": TINY}},
        {"run": {"arch": TINY, "lambdas": []}},
        {"run": {"arch": TINY, "lambdas": ["low"]}},
        {"lambdas": [torch.nan]},
        {"taken": None},
        {"taken": "all"},
        {"model": "codec"},
        {"model": {"weight": 1.0}},
        {"ema": "average"},
        {"format": 2},
    ],
    ids=str,
)
def test_what_is_no_whole_checkpoint_is_refused(tmp_path, change):
    path = tmp_path / "other.pt"
    save(path, {**trained(TINY, build(TINY).state_dict()), **change})
    for use in (load, load_codec, lambda path: load_start(build(TINY), path, TINY)):
        with pytest.raises(CheckpointError, match=r"other\.pt should be a checkpoint of format 3"):
            use(path)


def test_other_objects_that_torch_saved_are_refused(tmp_path):
    for thing in ({"model": 1}, torch.ones(3), [1]):
        torch.save(thing, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"other\.pt should be a checkpoint of"):
            load(tmp_path / "other.pt")


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere\.pt.*examples\.lic train"):
        load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_a_start_of_another_architecture_is_refused(tmp_path, end):
    path = tmp_path / f"codec{end}"
    put(path, "bmshj2018-hyperprior:8,8", build("bmshj2018-hyperprior:8,8"))
    with pytest.raises(
        CheckpointError, match=r"mbt2018-mean:8,8\. Found bmshj2018-hyperprior:8,8\."
    ):
        load_start(build(TINY), path, TINY)


@pytest.mark.parametrize("end", [".pt", ".safetensors"])
@pytest.mark.parametrize("arch", [TINY, f"gains:{TINY}"])
def test_a_start_with_other_weights_than_it_says_is_refused(tmp_path, arch, end):
    path = tmp_path / f"codec{end}"
    put(path, TINY, build("mbt2018-mean:9,9"))
    with pytest.raises(CheckpointError, match=r"should hold the weights of mbt2018-mean:8,8\. Fou"):
        load_start(build(arch), path, arch)


def put(path, arch, model):
    """Save a codec as a checkpoint or a codec file, by the end of the name."""
    if path.suffix == ".pt":
        save(path, trained(arch, model.state_dict()))
    else:
        save_codec(path, model, {"arch": arch, "lambdas": [0.05]})


def test_averaged_weights_are_the_ones_to_use(tmp_path):
    model, average = build(TINY).state_dict(), build(TINY).state_dict()
    ema = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in average.items()}}
    save(tmp_path / "codec.pt", trained(TINY, model, ema=ema))
    codec, about = load_codec(tmp_path / "codec.pt")
    assert not codec.training
    assert about["arch"] == TINY
    assert about["taken"] == 7
    assert all(torch.equal(value, average[key]) for key, value in codec.state_dict().items())
    fresh = build(TINY)
    load_start(fresh, tmp_path / "codec.pt", TINY)
    assert torch.equal(fresh.g_a[0].weight, average["g_a.0.weight"])


@pytest.mark.parametrize("kind", ["gains", "gains+offsets", "variable-rate"])
@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_a_variable_rate_codec_starts_from_its_base_and_keeps_its_highest_lambda(
    kind, end, tmp_path
):
    arch = f"{kind}:{TINY}"
    base, codec = build(TINY), build(arch, highest=0.2)
    put(tmp_path / f"base{end}", TINY, base)
    load_start(codec, tmp_path / f"base{end}", arch)
    put(tmp_path / f"codec{end}", arch, codec)
    loaded, _ = load_codec(tmp_path / f"codec{end}")
    assert loaded.highest == 0.05
    assert torch.equal(loaded.base.g_a[0].weight, base.g_a[0].weight)
    assert (loaded.offset is not None) == (kind != "gains")
    assert (loaded.hyper_step is not None) == (kind == "variable-rate")


# ------------------------------------------------------------------ codec files


def test_a_codec_file_has_all_that_is_known_about_the_codec(tmp_path):
    model, about = build(TINY), {"arch": TINY, "lambdas": [0.0035], "command": "train λ"}
    save_codec(tmp_path / "codec.safetensors", model, about)
    loaded, read = load_codec(tmp_path / "codec.safetensors")
    assert read == about
    assert not loaded.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["codec.safetensors"]


def test_half_precision_rounds_parameters_and_keeps_constants(tmp_path):
    """Of which some are below what float16 can tell from 0."""
    model, path = build(f"variable-rate:{TINY}", highest=0.1), tmp_path / "codec.safetensors"
    about = {"arch": f"variable-rate:{TINY}", "lambdas": [0.1]}
    save_codec(path, model, about, dtype=torch.float16)
    loaded, _ = load_codec(path)
    for (name, value), (_, read) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        is_parameter = name in dict(model.named_parameters())
        assert torch.equal(read, value.half().float() if is_parameter else value)
        assert read.dtype == value.dtype
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 10_000


def test_a_full_disk_leaves_the_old_codec_file(tmp_path):
    path, about = tmp_path / "codec.safetensors", {"arch": TINY, "lambdas": [1]}
    save_codec(path, build(TINY), {**about, "made": 1})
    with full_disk(), pytest.raises(CheckpointError, match=r"The one that was there is as it was"):
        save_codec(path, build(TINY), {**about, "made": 2})
    assert load_codec(path)[1]["made"] == 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"\x09weights"), "or a damaged file"),
        (lambda path: save_file({"w": torch.ones(1)}, path), "should be a codec file of this"),
        (lambda path: None, "There is no checkpoint"),
        (
            lambda path: save_codec(path, build(TINY), {"arch": "small", "lambdas": [1]}),
            r"should hold the weights of small\. Found others",
        ),
    ],
    ids=["broken", "another's", "missing", "other weights"],
)
def test_a_file_that_is_no_codec_is_refused(tmp_path, write, message):
    write(tmp_path / "codec.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_codec(tmp_path / "codec.safetensors")


@pytest.mark.parametrize(
    "about",
    ["{", "3", "[]", '{"lambdas": [1]}', '{"arch": 3, "lambdas": [1]}']
    + [
        f'{{"arch": "small", "lambdas": {x}}}' for x in ("[]", '["1"]', "[NaN]", "[0]", "1", "null")
    ],
)
def test_a_codec_file_with_another_description_is_refused(tmp_path, about):
    path = tmp_path / "codec.safetensors"
    save_file({"weight": torch.ones(1)}, path, {"codec": about})
    for use in (load_codec, lambda path: load_start(build("small"), path, "small")):
        with pytest.raises(CheckpointError, match="should be a codec file of this example"):
            use(path)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("arch", "kind", "widths"),
    [
        ("small", MeanScaleHyperprior, (32, 48)),
        ("mbt2018-mean", MeanScaleHyperprior, (128, 192)),
        ("mbt2018-mean:high", MeanScaleHyperprior, (192, 320)),
        ("bmshj2018-hyperprior:7,9", ScaleHyperprior, (7, 9)),
    ],
)
def test_names(arch, kind, widths):
    with torch.device("meta"):
        model = build(arch)
    assert type(model) is kind
    assert (model.h_a[0].out_channels, model.g_a[-1].out_channels) == widths


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("small", "mbt2018-mean:32,48"),
        ("gains:small", "gains:mbt2018-mean:32,48"),
        ("bmshj2018-hyperprior:high", "bmshj2018-hyperprior:192,320"),
        ("variable-rate:mbt2018-mean", "variable-rate:mbt2018-mean:128,192"),
        ("compressai:mbt2018-mean@3", "compressai:mbt2018-mean@3"),
    ],
)
def test_full_names(name, full):
    assert full_name(name) == full_name(full) == full


def test_a_start_may_be_named_in_another_way(tmp_path):
    model = build("small")
    put(tmp_path / "codec.pt", "mbt2018-mean:32,48", model)
    fresh = build("small")
    load_start(fresh, tmp_path / "codec.pt", "small")
    assert torch.equal(fresh.g_a[0].weight, model.g_a[0].weight)


@pytest.mark.parametrize(
    "name", ["tiny", "mbt2018-mean:0,8", "variable-rate:tiny", "mbt2018-mean:low", "8,8", "gains:"]
)
def test_an_unknown_architecture_lists_those_there_are(name):
    found = name.removeprefix("variable-rate:").removeprefix("gains:")
    message = rf"--arch should be small \(.*, mbt2018-mean, .*:NAME, or .* Found {found}\."
    with pytest.raises(ArchitectureError, match=message):
        build(name)


def test_the_format_is_part_of_every_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save(tmp_path / "codec.pt", content(1.0))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"codec\.pt should be a checkpoint of format 3, "):
        load(tmp_path / "codec.pt")
