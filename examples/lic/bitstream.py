"""From images to bytes and back: a codec's symbols through a range coder.

The hyper-latent is coded first, with a table for each channel from its distribution; from it the
decoder predicts how each symbol of the latent was coded. Both ends have to make the same
prediction, and this is what is assumed about floating point:

- The scale of each symbol is replaced by the nearest of :data:`SCALES`. Scales and tables are
  computed in float64 from integers and weights that both ends have; their last digits matter only
  next to a border between two entries. A checksum of the symbols detects that.
- The image is then synthesised in float32, as in evaluation: bit by bit the same on the machine,
  device and PyTorch that evaluated it, and to some 1e-6 elsewhere.

Another checksum, of the codec and of the whole file, comes first: what is damaged, cut or another
codec's is not decoded.
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
    height: int
    width: int
    largest_z: int
    largest_y: int
    checksum: int


_LAYOUT = struct.Struct(">HHHHI")
_MAGIC = b"m\x03"  # format 3

_SEAL = struct.Struct(">2sI")


def seal(magic: bytes, codec: int, content: bytes) -> bytes:
    """A file of the kind `magic`: a checksum of all that follows it and of `codec`, and `content`.

    `codec` is the fingerprint of the codec that has made the content.
    """
    return _SEAL.pack(magic, zlib.crc32(content, codec)) + content


def is_sealed(magic: bytes, codec: int, data: bytes) -> bool:
    """Whether :func:`seal` has made these bytes, and all of them, of this kind and codec."""
    return data == seal(magic, codec, data[_SEAL.size :])


def unseal(magic: bytes, codec: int, data: bytes) -> bytes:
    """The content of what :func:`seal` has made.

    Raises:
        BitstreamError: The bytes are damaged, or of another kind or codec.
    """
    if not is_sealed(magic, codec, data):
        raise BitstreamError(
            "The file should be one that this codec has made, and whole. Found "
            f"{len(data)} bytes of something else. Name the codec that it was encoded with, or "
            "encode the image again."
        )
    return data[_SEAL.size :]


def sides(image: Tensor) -> tuple[int, int]:
    """Height and width of an image ``[3, H, W]``, if files have room for them."""
    height, width = image.shape[-2:]
    if max(height, width) >= 2**16:
        raise BitstreamError(
            f"Sides should be below 65536. Found {height} x {width}. Code a smaller image."
        )
    return height, width


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
        size = sides(image)
        z, y = map(_to_integers, symbols or self._symbols(image))
        largest = (int(np.abs(z).max()), int(np.abs(y).max()))
        header = _Header(*size, *largest, _checksum(z, y))
        content = _LAYOUT.pack(*header) + self._encode_symbols(header, z, y)
        return seal(_MAGIC, self._fingerprint, content)

    def has_made(self, data: bytes) -> bool:
        """Whether these are the bytes of an image, all of them, and encoded by this codec."""
        return is_sealed(_MAGIC, self._fingerprint, data)

    def decode(self, data: bytes) -> Tensor:
        """The uint8 image ``[3, H, W]`` that was encoded, as the codec reconstructs it."""
        return to_pixels(self.decode_exactly(data))

    def decode_exactly(self, data: bytes) -> Tensor:
        """The same before it is rounded to 8 bits: float32 ``[3, H, W]``, not clamped.

        Raises:
            BitstreamError: The bytes are damaged or another codec's, or arithmetic differs.
        """
        content = unseal(_MAGIC, self._fingerprint, data)
        header = _Header(*_LAYOUT.unpack_from(content))
        words = np.frombuffer(content[_LAYOUT.size :], dtype="<u4").astype(np.uint32)
        try:
            z, y = self._decode_symbols(header, RangeDecoder(words))
        except AssertionError:  # constriction's error for data that it cannot have written
            z = y = np.zeros(0, np.int32)
        if _checksum(z, y) != header.checksum:
            raise BitstreamError(
                "The symbols should have the checksum that was sent. Found another: this machine "
                "predicts other scales than the encoder's. Decode the file where it was encoded."
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


def _gaussian(largest: int) -> QuantizedGaussian:
    """The family over −largest … largest, and one to spare at each end: it needs two symbols."""
    return QuantizedGaussian(-largest - 1, largest + 1)


def _to_integers(symbols: Tensor) -> np.ndarray:
    if not (symbols.abs() <= LARGEST).all():  # nor is NaN
        raise BitstreamError(
            f"Symbols should be at most {LARGEST}. Found a symbol of {symbols.abs().max():.0f}. "
            "Choose another codec, or train it until its latents settle."
        )
    return symbols[0].to(torch.int32).cpu().contiguous().numpy()


def _checksum(z: np.ndarray, y: np.ndarray) -> int:
    return zlib.crc32(y.astype("<i4").tobytes(), zlib.crc32(z.astype("<i4").tobytes()))
