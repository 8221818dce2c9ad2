"""The export command: codec files of checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from examples.lic.__main__ import main
from examples.lic.architectures import build
from examples.lic.checkpoint import load_codec, save

TINY = "mbt2018-mean:8,8"


def make_checkpoint(path):
    """A checkpoint with averaged weights, which are returned."""
    states = [build(TINY).state_dict() for _ in range(2)]
    ema = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in states[1].items()}}
    run = {"arch": TINY, "lambdas": [0.02], "steps": 9, "lr": 1e-3}
    save(path, {"run": run, "taken": 7, "model": states[0], "ema": ema})
    return states[1]


@pytest.mark.parametrize(("options", "dtype"), [([], torch.float32), (["--half"], torch.float16)])
def test_averaged_weights_are_written_with_all_that_is_known(tmp_path, options, dtype, capsys):
    averaged = make_checkpoint(tmp_path / "run" / "lambda-0.02.pt")
    file = tmp_path / "codecs" / "lambda-0.02.safetensors"
    command = ["export", str(tmp_path / "run"), "--output", str(file.parent)]
    assert main([*command, *options]) == 0
    assert f"{file}: {TINY}, λ 0.02, {file.stat().st_size} bytes" in capsys.readouterr().out
    with safe_open(file, framework="pt") as content:
        assert content.get_tensor("g_a.0.weight").dtype == dtype
    codec, about = load_codec(file)
    assert torch.equal(codec.g_a[0].weight, averaged["g_a.0.weight"].to(dtype).float())
    assert (about["arch"], about["lambdas"], about["taken"]) == (TINY, [0.02], 7)
    assert about["run"]["lr"] == 1e-3


def test_checkpoints_of_one_name_do_not_replace_each_other(tmp_path, capsys):
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name / "codec.pt")
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["export", *folders, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert f"error: Checkpoints should have names that differ. Found {tmp_path}/a" in printed
    assert not (tmp_path / "out").exists()


def test_codec_files_do_not_go_where_the_checkpoints_are(tmp_path, capsys):
    make_checkpoint(tmp_path / "lambda-0.02.pt")
    assert main(["export", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "--output should be another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lambda-0.02.pt"]


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    model = build(TINY)
    torch.nn.init.constant_(model.g_s[0].bias, torch.inf)
    run = {"arch": TINY, "lambdas": [0.02], "steps": 9}
    save(tmp_path / "codec.pt", {"run": run, "taken": 9, "model": model.state_dict()})
    assert main(["export", str(tmp_path / "codec.pt"), "--output", str(tmp_path / "out")]) == 2
    message = f"{tmp_path}/codec.pt should have finite weights. Found NaN or infinity in g_s.0.bias"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
