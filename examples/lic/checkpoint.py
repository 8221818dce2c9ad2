"""Checkpoints and codec files: written whole or not at all, with a clear error for what is wrong.

A *checkpoint* (``.pt``) is what a run goes on from: ``format``; ``run``, the settings that a
resumed run has to share (:meth:`examples.lic.runs.Run.as_dict`); ``lambdas``, of the codec, where
they are others than those of the settings; ``images``, which of them it saw; ``taken``, the steps;
the states of ``model``, ``optimizer``, ``schedule``, and where there are any ``ema`` and
``auxiliary``; ``crops``, the place in their stream; ``random``, the random states of each process.

A *codec file* (``.safetensors``) has the weights only, and in its metadata ``codec``, a JSON
object: ``arch``, ``lambdas``, and anything on how it was made.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
    """Write a file next to `path`, wait until it is on the disk, and only then rename it.

    A link stays one: the file that it names is written. A device or a pipe gets the data.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    # A name of this process, since two may be writing the same file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Return the content of the checkpoint at `path`, on the CPU."""
    kind = f"a checkpoint of format {FORMAT}"
    with _refuse_unreadable(path, kind):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not _is_checkpoint(content):
        raise _something_else(path, kind)
    return content


def _is_checkpoint(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.get("format") == FORMAT
        and isinstance(content.get("taken"), int)
        and _describes_a_codec(content.get("run"))
        and _are_lambdas(content.get("lambdas", [1]))
        and _are_weights(content.get("model"))
        and _are_weights(content.get("ema", {}))
    )


def _describes_a_codec(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and isinstance(about.get("arch"), str)
        and _are_lambdas(about.get("lambdas"))
    )


def _are_lambdas(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(x, int | float) and 0 < x < math.inf for x in values)
    )


def _are_weights(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    )


def load_start(model: nn.Module, path: Path, arch: str) -> None:
    """Set `model`, built as `arch`, to the trained weights at `path`.

    A variable-rate codec may start from its fixed-rate base, whose λ then has a step of 1.
    """
    weights, about = _read(path)
    saved = architectures.full_name(about["arch"])
    if saved == architectures.full_name(arch):
        _set_weights(model, weights, path, arch)
    elif saved == architectures.full_name(architectures.base_of(arch)):
        _set_weights(model.base, weights, path, saved)
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
    _set_weights(model, weights, path, about["arch"])
    return model.eval(), about


def _set_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, arch: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # which lists all that differs
        raise CheckpointError(
            f"{path} should hold the weights of {arch}. Found others. Train it again."
        ) from None


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
        lambdas = content.get("lambdas", run["lambdas"])
        about = {"arch": run["arch"], "lambdas": lambdas, "run": run, "taken": content["taken"]}
        return trained_weights(content), about
    kind = "a codec file of this example"
    with _refuse_unreadable(path, kind), safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["codec"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not _describes_a_codec(about):
        raise _something_else(path, kind)
    return weights, about


@contextmanager
def _refuse_unreadable(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        advice = "`python -m examples.lic train` makes one."
        raise CheckpointError(f"There is no checkpoint {path}. {advice}") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}). Make it readable, or name another "
            "file."
        ) from None
    except Exception:  # bytes that are no pickle, or part of one, lead to errors of any kind
        raise _something_else(path, expected) from None


def _something_else(path: Path, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} should be {expected}, made by `python -m examples.lic train`. Found something "
        "else, or a damaged file. Name another file, or train it again."
    )
