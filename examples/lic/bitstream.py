"""From images to bytes and back: a codec's symbols through a range coder.

The hyper-latent is coded first, with a table for each channel from its distribution; from it the
decoder predicts how each symbol of the latent was coded. Both ends have to make the same
prediction, and this is what is assumed about floating point:

- The scale of each symbol is replaced by the nearest of :data:`SCALES`. Scales and tables are
  computed in float64 from integers and weights that both ends have; their last digits matter only
  next to a border between two entries. A checksum of the symbols detects that.
- The image is then synthesised in float32, as in evaluation: bit by bit the same on the machine,
  device and PyTorch that evaluated it, and to some 1e-6 elsewhere.
"""

from __future__ import annotations

import copy
import struct
import zlib
from typing import NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor, nn

from examples.lic.entropy_bottleneck import SCALE_FLOOR
from examples.lic.evaluation import pad_to_multiple, to_pixels
from examples.lic.hyperprior import Codec

# Attributes, not modules: constriction is one compiled extension.
Categorical = constriction.stream.model.Categorical
QuantizedGaussian = constriction.stream.model.QuantizedGaussian
RangeEncoder = constriction.stream.queue.RangeEncoder
RangeDecoder = constriction.stream.queue.RangeDecoder

SCALES = np.exp(np.linspace(np.log(SCALE_FLOOR), np.log(256.0), 128))
"""Standard deviations that the coder uses; the nearest one is at most 3.1 % off."""

_BORDERS = torch.from_numpy(np.sqrt(SCALES[1:] * SCALES[:-1]))

LARGEST = 2**15 - 1
"""Bound on the absolute value of symbols; those of a trained codec stay within some hundred."""

LATENT_STEP = 4
"""Positions of y along each side for one position of z."""


class BitstreamError(Exception):
    """Bytes that cannot be decoded, or an image that cannot be encoded; says why."""


class _Header(NamedTuple):
    magic: bytes
    fingerprint: int
    height: int
    width: int
    largest_z: int
    largest_y: int
    checksum: int


_LAYOUT = struct.Struct(">2sIHHHHI")
_MAGIC = b"m\x02"  # format 2


def fingerprint(model: nn.Module) -> int:
    """A checksum of all weights, by which a decoder recognises the encoder's model."""
    total = 0
    for name, value in sorted(model.state_dict().items()):
        array = value.detach().cpu().contiguous().numpy()
        total = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), total))
    return total


class Coder:
    """Encodes and decodes images with one codec."""

    def __init__(self, model: Codec) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._precise = copy.deepcopy(self._model).double()
        self._fingerprint = fingerprint(model)
        self._device = next(model.parameters()).device

    def encode(self, image: Tensor, symbols: tuple[Tensor, Tensor] | None = None) -> bytes:
        """The bytes of a uint8 image ``[3, H, W]``.

        Args:
            image: What to encode.
            symbols: Of z and y, each ``[1, C, h, w]``, such as refinement finds them for this
                image; without them those of the codec.

        Raises:
            BitstreamError: The image is too large for the format, or the codec's symbols are.
        """
        z, y = map(_to_integers, symbols or self._symbols(image))
        largest_z, largest_y = (int(np.abs(latent).max()) for latent in (z, y))
        height, width = image.shape[-2:]
        if max(largest_z, largest_y) > LARGEST or max(height, width) >= 2**16:
            raise BitstreamError(
                f"Sides should be below 65536 and symbols at most {LARGEST}. Found an image of "
                f"{height} x {width} and a symbol of {max(largest_z, largest_y)}. Code smaller "
                "images, or train the codec until its latents settle."
            )
        header = _Header(
            _MAGIC, self._fingerprint, height, width, largest_z, largest_y, _checksum(z, y)
        )
        return _LAYOUT.pack(*header) + self._encode_symbols(header, z, y)

    def decode(self, data: bytes) -> Tensor:
        """The uint8 image ``[3, H, W]`` that was encoded, as the codec reconstructs it."""
        return to_pixels(self.decode_exactly(data))

    def decode_exactly(self, data: bytes) -> Tensor:
        """The same before it is rounded to 8 bits: float32 ``[3, H, W]``, not clamped.

        Raises:
            BitstreamError: The bytes are damaged or another codec's, or arithmetic differs.
        """
        header = self._read_header(data)
        words = np.frombuffer(data[_LAYOUT.size :], dtype="<u4").astype(np.uint32)
        try:
            z, y = self._decode_symbols(header, RangeDecoder(words))
        except AssertionError:  # constriction's error for data that it cannot have written
            z = y = np.zeros(0, np.int32)
        if _checksum(z, y) != header.checksum:
            raise BitstreamError(
                "The symbols should have the checksum that was sent. Found another: the bytes are "
                "damaged, or this machine predicts other scales than the encoder's. Encode again, "
                "or decode where it was encoded."
            )
        decoded = self._synthesize(z, y)
        return decoded[0, :, : header.height, : header.width]

    @torch.no_grad()
    def _symbols(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols of hyper-latent ``[1, N, h, w]`` and latent ``[1, M, 4h, 4w]``."""
        images = image[None].to(self._device, torch.float32) / 255
        return self._model.to_symbols(pad_to_multiple(images, self._model.stride))

    def _encode_symbols(self, header: _Header, z: np.ndarray, y: np.ndarray) -> bytes:
        encoder = RangeEncoder()
        for symbols, table in zip(z, self._z_tables(header.largest_z), strict=True):
            encoder.encode((symbols + header.largest_z + 1).ravel(), table)
        scales = self._scales(z)
        gaussian = _gaussian(header.largest_y)
        encoder.encode(y.ravel(), gaussian, np.zeros_like(scales), scales)
        return encoder.get_compressed().astype("<u4").tobytes()

    def _decode_symbols(
        self, header: _Header, decoder: RangeDecoder
    ) -> tuple[np.ndarray, np.ndarray]:
        stride = self._model.stride
        height, width = -(-header.height // stride), -(-header.width // stride)
        tables = self._z_tables(header.largest_z)
        z = np.stack([decoder.decode(table, height * width) for table in tables])
        z = (z - header.largest_z - 1).reshape(-1, height, width).astype(np.int32)
        scales = self._scales(z)
        gaussian = _gaussian(header.largest_y)
        y = decoder.decode(gaussian, np.zeros_like(scales), scales)
        return z, y.reshape(-1, LATENT_STEP * height, LATENT_STEP * width)

    @torch.no_grad()
    def _z_tables(self, largest: int) -> list[Categorical]:
        """Probabilities of −largest … largest for each channel, and one to spare at each end."""
        tables = self._precise.z_probabilities(largest + 1).clamp(min=1e-12).cpu().numpy()
        return [Categorical(row, perfect=False) for row in tables]

    @torch.no_grad()
    def _scales(self, z: np.ndarray) -> np.ndarray:
        """The entry of the table that is nearest to the predicted scale, for each symbol of y."""
        sent = torch.from_numpy(z)[None].to(self._device, torch.float64)
        scale = self._precise.y_scale(sent)
        return SCALES[torch.bucketize(scale.flatten().cpu(), _BORDERS).numpy()]

    @torch.no_grad()
    def _synthesize(self, z: np.ndarray, y: np.ndarray) -> Tensor:
        """The decoded image, from symbols in the memory layout of the codec's own pass."""
        sent = (torch.from_numpy(s)[None].to(self._device, torch.float32) for s in (z, y))
        layout = torch.channels_last
        return self._model.from_symbols(*(s.contiguous(memory_format=layout) for s in sent))

    def _read_header(self, data: bytes) -> _Header:
        if len(data) < _LAYOUT.size or len(data) % 4 != _LAYOUT.size % 4 or data[:2] != _MAGIC:
            raise BitstreamError(
                "This should be an image that was encoded by this example, and all of it. Found "
                f"{len(data)} bytes of something else. Encode the image again."
            )
        header = _Header(*_LAYOUT.unpack_from(data))
        if header.fingerprint != self._fingerprint:
            raise BitstreamError(
                "The image should be decoded by the codec that encoded it, with the checksum "
                f"{header.fingerprint:08x}. Found {self._fingerprint:08x}. Name the checkpoint "
                "that it was encoded with."
            )
        return header


def _gaussian(largest: int) -> QuantizedGaussian:
    """The family over −largest … largest, and one to spare at each end: it needs two symbols."""
    return QuantizedGaussian(-largest - 1, largest + 1)


def _to_integers(symbols: Tensor) -> np.ndarray:
    return symbols[0].clamp(-(2**24), 2**24).to(torch.int32).cpu().contiguous().numpy()


def _checksum(z: np.ndarray, y: np.ndarray) -> int:
    return zlib.crc32(y.astype("<i4").tobytes(), zlib.crc32(z.astype("<i4").tobytes()))
