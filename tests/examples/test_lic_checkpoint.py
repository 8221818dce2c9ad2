"""Checkpoints: whole or not at all, with a clear error for what does not fit; codecs by name."""

from __future__ import annotations

import pytest
import torch

from examples.lic import checkpoint
from examples.lic.architectures import ArchitectureError, build
from examples.lic.checkpoint import CheckpointError, load, load_codec, load_start, save
from tests.support.disk import full_disk


def content(value):
    return {"run": {"arch": "small"}, "model": {"weight": torch.full((9000,), value)}}


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


@pytest.mark.parametrize("harm", [lambda b: b"", lambda b: b[:300], lambda b: b"no checkpoint"])
def test_a_broken_checkpoint_is_named(tmp_path, harm):
    path = tmp_path / "codec.pt"
    save(path, content(1.0))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"codec\.pt cannot be read as a checkpoint \(.+\)"):
        load(path)


def test_something_else_that_torch_saved_is_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt should be a checkpoint of"):
        load(tmp_path / "other.pt")


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere\.pt.*examples\.lic train"):
        load(tmp_path / "nowhere.pt")


def test_a_start_of_another_architecture_is_refused(tmp_path):
    save(tmp_path / "codec.pt", {"run": {"arch": "base"}, "model": build("base").state_dict()})
    with pytest.raises(CheckpointError, match=r"architecture small\. Found base\. .*--arch base"):
        load_start(build("small"), tmp_path / "codec.pt", "small")


def test_averaged_weights_are_the_ones_to_use(tmp_path):
    model, average = build("8,8").state_dict(), build("8,8").state_dict()
    ema = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in average.items()}}
    save(tmp_path / "codec.pt", {"run": {"arch": "8,8"}, "model": model, "ema": ema})
    codec, content = load_codec(tmp_path / "codec.pt")
    assert not codec.training
    assert content["run"]["arch"] == "8,8"
    assert all(torch.equal(value, average[key]) for key, value in codec.state_dict().items())
    fresh = build("8,8")
    load_start(fresh, tmp_path / "codec.pt", "8,8")
    assert torch.equal(fresh.analysis[0].weight, average["analysis.0.weight"])


@pytest.mark.parametrize("arch", ["gains:8,8", "gains+offsets:8,8", "variable-rate:8,8"])
def test_a_variable_rate_codec_starts_from_its_base_and_keeps_its_highest_lambda(arch, tmp_path):
    base, codec = build("8,8"), build(arch, highest=0.2)
    run = {"arch": "8,8", "lambdas": [0.05]}
    save(tmp_path / "base.pt", {"run": run, "model": base.state_dict()})
    load_start(codec, tmp_path / "base.pt", arch)
    save(tmp_path / "codec.pt", {"run": {"arch": arch}, "model": codec.state_dict()})
    loaded, _ = load_codec(tmp_path / "codec.pt")
    assert loaded.highest == 0.05
    assert torch.equal(loaded.base.analysis[0].weight, base.analysis[0].weight)
    assert (loaded.offset is not None) == (arch != "gains:8,8")
    assert (loaded.hyper_step is not None) == (arch == "variable-rate:8,8")


@pytest.mark.parametrize(
    ("arch", "widths"), [("small", (24, 32)), ("base", (32, 48)), ("7,9", (7, 9))]
)
def test_sizes(arch, widths):
    model = build(arch)
    assert (len(model.z_median), model.analysis[-1].out_channels) == widths


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", "--arch should be small, base, large, full, widths like 24,32, .* Found tiny"),
        ("0,8", "Found 0,8"),
        ("variable-rate:tiny", "Found tiny"),
    ],
)
def test_an_unknown_architecture_lists_those_there_are(name, message):
    with pytest.raises(ArchitectureError, match=message):
        build(name)


def test_the_format_is_part_of_every_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save(tmp_path / "codec.pt", content(1.0))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"codec\.pt should be a checkpoint .* format 2\."):
        load(tmp_path / "codec.pt")
