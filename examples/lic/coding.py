"""Images as files: which codec codes an image, at which rate, and which one decodes it again.

A file is what a codec's coder makes of an image. Before that of a variable-rate codec stands the
quantization step, which a decoder cannot know otherwise. The checksum covers it, as a codec of
another step has another fingerprint.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.lic.architectures import coder_for
from examples.lic.bitstream import BitstreamError, Coder
from examples.lic.checkpoint import CheckpointError, load_codec
from examples.lic.evaluation import psnr, reconstruct, to_pixels
from examples.lic.variable_rate import FixedStep, VariableRateCodec

PRETRAINED = Path(__file__).parent / "pretrained"
"""Codecs that come with the example."""

SUFFIXES = (".pt", ".safetensors")

ROUNDS = 16
"""Of a search for a quantization step; each halves the interval of log λ."""

_STEP = struct.Struct(">2sd")
_MAGIC = b"mS"


class TargetError(Exception):
    """A rate or a quality that no codec reaches; the message says what is reached."""


class StepCoder:
    """Codes images with a variable-rate codec at one step, which it writes into the file."""

    def __init__(self, codec: FixedStep) -> None:
        self._coder, self._head = Coder(codec), _STEP.pack(_MAGIC, codec.y_step)

    def encode(self, image: Tensor, symbols: tuple[Tensor, Tensor] | None = None) -> bytes:
        """See :meth:`examples.lic.bitstream.Coder.encode`."""
        return self._head + self._coder.encode(image, symbols)

    def decode_exactly(self, data: bytes) -> Tensor:
        """See :meth:`examples.lic.bitstream.Coder.decode_exactly`."""
        return self._coder.decode_exactly(data.removeprefix(self._head))


def file_coder(codec: nn.Module) -> Any:
    """What makes files of images with a fixed-rate codec, or one step of a variable-rate one."""
    return StepCoder(codec) if isinstance(codec, FixedStep) else coder_for(codec)


@dataclass(frozen=True)
class CodecFile:
    """A trained codec, its architecture, and the λ that it was trained for."""

    path: Path
    model: nn.Module
    arch: str
    lambdas: tuple[float, ...]

    @property
    def variable(self) -> bool:
        """Whether it codes at any λ between the least and the greatest."""
        return isinstance(self.model, VariableRateCodec)

    def at(self, lmbda: float) -> nn.Module:
        """The codec at one λ; a fixed-rate codec has only one."""
        return self.model.at(lmbda) if self.variable else self.model


def list_codecs(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and those in folders.

    Raises:
        CheckpointError: A folder has none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = [path]
        if path.is_dir() or path == PRETRAINED:
            inside = sorted(p for p in path.glob("*") if p.suffix in SUFFIXES)
        if not inside:
            raise CheckpointError(
                f"{path} holds no codecs (*{', *'.join(SUFFIXES)}). Train some with "
                "`python -m examples.lic train`, or name another folder."
            )
        found |= dict.fromkeys(inside)
    return list(found)


def load_codecs(paths: Iterable[Path], device: torch.device | str = "cpu") -> list[CodecFile]:
    """All codecs among `paths`, see :func:`list_codecs` and :func:`load`; on the device."""
    loaded = []
    for path in list_codecs(paths):
        model, about = load(path)
        loaded.append(CodecFile(path, model.to(device), about["arch"], tuple(about["lambdas"])))
    return loaded


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A codec to use, see :func:`examples.lic.checkpoint.load_codec`.

    A line on standard error says if its run has not taken all its steps.

    Raises:
        CheckpointError: It cannot be read, or has weights that are not finite.
    """
    model, about = load_codec(path)
    _check_finite(path, model)
    match about:
        case {"run": {"steps": int(steps)}, "taken": int(taken)} if taken < steps:
            print(f"{path} is at step {taken} of {steps}.", file=sys.stderr)
    return model, about


def _check_finite(path: Path, model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{path} should have finite weights. Found NaN or infinity in {name}. Train it "
                "again, or name another codec."
            )


@dataclass(frozen=True)
class Coded:
    """An image as a file, and what that costs.

    Attributes:
        data: The file.
        bpp: Bits of the file per pixel.
        psnr: Of the decoded image, in dB.
        codec: What it was coded with.
        lmbda: At which λ.
    """

    data: bytes
    bpp: float
    psnr: float
    codec: CodecFile
    lmbda: float

    def __str__(self) -> str:
        return f"{len(self.data)} bytes, {self.bpp:.4f} bpp, {self.psnr:.2f} dB"


def encode(
    image: Tensor, codec: CodecFile, lmbda: float, symbols: tuple[Tensor, Tensor] | None = None
) -> Coded:
    """Code a uint8 image ``[3, H, W]`` of any size, and decode it.

    `symbols` are those of a refinement, see :meth:`examples.lic.bitstream.Coder.encode`.
    """
    model = codec.at(lmbda)
    coder = file_coder(model)
    if symbols is None:
        data, decoded = coder.encode(image), reconstruct(model, image)[0]
    else:
        data = coder.encode(image, symbols)
        decoded = coder.decode_exactly(data)
    bpp = 8 * len(data) / image[0].numel()
    return Coded(data, bpp, psnr(to_pixels(decoded), image), codec, lmbda)


def choose(
    image: Tensor,
    codecs: Sequence[CodecFile],
    *,
    bpp: float | None = None,
    decibels: float | None = None,
) -> Coded:
    """Code an image at the rate, or with the PSNR, that is wanted.

    Of the files with at most `bpp` it takes the one with the highest PSNR, and of those with at
    least `decibels` the smallest. A variable-rate codec gives its nearest one by bisection, on the
    sizes of real files. Without a target there is one codec, and of a variable-rate one the
    highest λ.

    Raises:
        TargetError: No codec reaches the target; or there is none, but there are several codecs.
    """
    if bpp is None and decibels is None:
        if len(codecs) > 1:
            raise TargetError(
                "A rate or a PSNR should be given, as there are several codecs to choose from. "
                f"Found {len(codecs)} codecs. Give --bpp or --psnr, or one --codec."
            )
        return encode(image, codecs[0], max(codecs[0].lambdas))
    coded = [c for codec in codecs for c in _candidates(image, codec, bpp, decibels)]
    if bpp is not None:
        fitting = [c for c in coded if c.bpp <= bpp]
        if not fitting:
            least = min(c.bpp for c in coded)
            raise TargetError(
                f"--bpp should be at least {least:.4f} for this image and these codecs. Found "
                f"{bpp:g}. Ask for a higher rate, or give codecs of a lower one."
            )
        return max(fitting, key=lambda c: c.psnr)
    fitting = [c for c in coded if c.psnr >= decibels]
    if not fitting:
        most = max(c.psnr for c in coded)
        raise TargetError(
            f"--psnr should be at most {most:.2f} dB for this image and these codecs. Found "
            f"{decibels:g}. Ask for a lower PSNR, or give codecs of a higher rate."
        )
    return min(fitting, key=lambda c: c.bpp)


def _candidates(
    image: Tensor, codec: CodecFile, bpp: float | None, decibels: float | None
) -> list[Coded]:
    """A fixed-rate codec's only file; of a variable-rate one those next to the target."""
    lowest = encode(image, codec, min(codec.lambdas))
    if not codec.variable:
        return [lowest]
    highest = encode(image, codec, max(codec.lambdas))

    def above(coded: Coded) -> bool:
        return coded.bpp > bpp if bpp is not None else coded.psnr >= decibels

    if above(lowest) or not above(highest):
        return [lowest, highest]
    for _ in range(ROUNDS):
        middle = encode(image, codec, math.sqrt(lowest.lmbda * highest.lmbda))
        lowest, highest = (lowest, middle) if above(middle) else (middle, highest)
    return [lowest, highest]


def decode(data: bytes, codecs: Sequence[CodecFile]) -> tuple[Tensor, CodecFile]:
    """The uint8 image ``[3, H, W]`` in a file, and the codec that it was coded with.

    Raises:
        BitstreamError: The file is damaged, or none of the codecs has made it.
    """
    for codec, model, stream in _readings(data, codecs):
        coder = coder_for(model)
        if coder.has_made(stream):
            return to_pixels(coder.decode_exactly(stream)), codec
    raise BitstreamError(
        f"The file should be one that one of the {len(codecs)} codecs has made, and whole. "
        f"Found {len(data)} bytes of something else. Name the codec that it was encoded with, or "
        "encode the image again."
    )


def _readings(
    data: bytes, codecs: Sequence[CodecFile]
) -> Iterator[tuple[CodecFile, nn.Module, bytes]]:
    """The codecs of the kind that has made a file, each with the rest of the file."""
    stepped = len(data) >= _STEP.size and data.startswith(_MAGIC)
    for codec in codecs:
        if stepped and codec.variable:
            _, step = _STEP.unpack_from(data)
            if 0 < step < math.inf:
                yield codec, FixedStep(codec.model, step), data[_STEP.size :]
        elif not stepped and not codec.variable:
            yield codec, codec.model, data
