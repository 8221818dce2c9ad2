"""Checkpoints and codec files: written whole or not at all, with a clear error for what is wrong.

A *checkpoint* (``.pt``) is what a run goes on from: ``format``; ``run``, the settings that a
resumed run has to share (:meth:`examples.lic.runs.Run.as_dict`); ``images``, which of them it saw;
``taken``, the steps; the states of ``model``, ``optimizer``, ``schedule``, and where there are any
``ema`` and ``auxiliary``; ``crops``, the place in their stream; ``random``, the random states of
each process.

A *codec file* (``.safetensors``) has the weights only, and in its metadata ``codec``, a JSON
object: ``arch``, ``lambdas``, and anything on how it was made.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from examples.lic import architectures

FORMAT = 3
"""Raised when the content of a checkpoint changes its meaning."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used or written; the message names it and says what to do."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Put `content` at `path`; whatever happens, the old file or the new one is there."""
    # Into memory first: given a file, torch reports a full disk as an error of its own format.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    _write(path, buffer.getbuffer())


def save_codec(
    path: Path,
    model: nn.Module,
    about: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the weights of a codec to a codec file.

    Args:
        path: Of the file, whose name has to end in ``.safetensors``.
        model: The codec.
        about: ``arch``, ``lambdas`` and anything on how it was made, in types that JSON has.
        dtype: Of the parameters: ``torch.float32`` or ``torch.float16``. Buffers stay as they are;
            some of their constants are 0 in float16.
    """
    parameters = {name for name, _ in model.named_parameters()}
    weights = {
        name: (value.to(dtype) if name in parameters else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    _write(path, to_safetensors(weights, {"codec": json.dumps(about)}))


def _write(path: Path, data: bytes | memoryview) -> None:
    try:
        write_atomically(path, data)
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
    with _refuse_unreadable(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _something_else(path, f"a checkpoint of format {FORMAT}")
    return content


def load_start(model: nn.Module, path: Path, arch: str) -> None:
    """Set `model`, built as `arch`, to the trained weights at `path`.

    A variable-rate codec may start from its fixed-rate base, whose λ then has a step of 1.
    """
    weights, about = _read(path)
    saved = architectures.full_name(about["arch"])
    if saved == architectures.full_name(arch):
        model.load_state_dict(weights)
    elif saved == architectures.full_name(architectures.base_of(arch)):
        model.base.load_state_dict(weights)
        model.highest.fill_(about["lambdas"][-1])
    else:
        raise CheckpointError(
            f"{path} should hold a codec of the architecture {arch}. Found {about['arch']}. Choose "
            f"--arch {about['arch']}, or another checkpoint."
        )


def load_codec(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The codec in a checkpoint or codec file, in evaluation mode, and what is known about it.

    The latter has ``arch`` and ``lambdas``; of a checkpoint also ``run``, its settings, and
    ``taken``, the steps so far; of a codec file what :func:`save_codec` was given.
    """
    weights, about = _read(path)
    model = architectures.build(about["arch"])
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # which lists all that differs
        raise CheckpointError(
            f"{path} should hold the weights of {about['arch']}. Found others. Train it again."
        ) from None
    return model.eval(), about


def trained_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint to use: the moving average where the run kept one."""
    if "ema" not in content:
        return content["model"]
    prefix, ema = "module.", content["ema"]
    return {name.removeprefix(prefix): ema[name] for name in ema if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and the description that :func:`load_codec` returns."""
    if path.suffix != ".safetensors":
        content = load(path)
        run = content["run"]
        about = {"arch": run["arch"], "lambdas": run["lambdas"], "run": run}
        return trained_weights(content), about | {"taken": content["taken"]}
    with _refuse_unreadable(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "codec" not in metadata:
        raise _something_else(path, "a codec file of this example")
    return weights, json.loads(metadata["codec"])


@contextmanager
def _refuse_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        advice = "`python -m examples.lic train` makes one."
        raise CheckpointError(f"There is no checkpoint {path}. {advice}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({reason}). Train it again, or remove it."
        ) from None


def _something_else(path: Path, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} should be {expected}, made by `python -m examples.lic train`. Found something "
        "else. Name another file, or train it again."
    )
