"""Checkpoints: written whole or not at all, with a clear error for what does not fit.

One format for all runs: ``format``; ``run``, the settings that a resumed run has to share
(:meth:`examples.lic.runs.Run.as_dict`); ``images``, which of them it saw; ``taken``, the steps;
the states of ``model``, ``optimizer``, ``schedule``, and where there are any ``ema`` and
``auxiliary``; ``crops``, the place in their stream; ``random``, the random states of each process.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.lic import architectures
from examples.lic.variable_rate import VariableRateCodec

FORMAT = 2
"""Raised when the content of a checkpoint changes its meaning."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used or written; the message names it and says what to do."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Put `content` at `path`; whatever happens, the old file or the new one is there."""
    # Into memory first: given a file, torch reports a full disk as an error of its own format.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        old = "The one that was there is as it was. " if path.exists() else ""
        raise CheckpointError(
            f"The checkpoint {path} could not be saved ({error.strerror}). {old}"
            "Free some space, or make the folder writable."
        ) from error


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file next to `path`, wait until it is on the disk, and only then rename it."""
    # A name of this process, since two may be writing the same file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Return the content of the checkpoint at `path`, on the CPU."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        advice = "`python -m examples.lic train` makes one."
        raise CheckpointError(f"There is no checkpoint {path}. {advice}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({reason}). Train it again, or remove it."
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} should be a checkpoint of `python -m examples.lic train`, format {FORMAT}. "
            "Found something else. Name another file."
        )
    return content


def trained_weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights to use: the moving average where the run kept one."""
    if "ema" not in content:
        return content["model"]
    prefix, ema = "module.", content["ema"]
    return {name.removeprefix(prefix): ema[name] for name in ema if name.startswith(prefix)}


def load_start(model: nn.Module, path: Path, arch: str) -> None:
    """Set `model`, built as `arch`, to the trained weights at `path`.

    A variable-rate codec may start from its fixed-rate base, whose λ then has a step of 1.
    """
    content = load(path)
    weights, saved = trained_weights(content), content["run"]
    if saved["arch"] == arch:
        model.load_state_dict(weights)
    elif isinstance(model, VariableRateCodec) and saved["arch"] == architectures.base_of(arch):
        model.base.load_state_dict(weights)
        model.highest.fill_(saved["lambdas"][-1])
    else:
        raise CheckpointError(
            f"{path} should hold a codec of the architecture {arch}. Found {saved['arch']}. Choose "
            f"--arch {saved['arch']}, or another checkpoint."
        )


def load_codec(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The codec at `path` in evaluation mode, and all else that the checkpoint holds."""
    content = load(path)
    model = architectures.build(content["run"]["arch"])
    model.load_state_dict(trained_weights(content))
    return model.eval(), content
