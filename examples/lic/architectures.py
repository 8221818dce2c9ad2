"""The codecs by name, as the command line and checkpoints have them; CompressAI's among them."""

from __future__ import annotations

import json
import re
import struct

import torch
from torch import Tensor, nn

from examples.lic.bitstream import Coder, fingerprint, is_sealed, seal, sides, unseal
from examples.lic.evaluation import pad_to_multiple
from examples.lic.hyperprior import MeanScaleHyperprior, Reconstruction, ScaleHyperprior
from examples.lic.variable_rate import VariableRateCodec

HYPERPRIORS = {"mbt2018-mean": MeanScaleHyperprior, "bmshj2018-hyperprior": ScaleHyperprior}
"""The codecs by their published names."""

WIDTHS = {"": "128,192", "high": "192,320"}
"""Published channels of the transforms and of the latent; ``high`` is for high rates."""

SMALL = "mbt2018-mean:32,48"
"""What ``small`` stands for."""

VARIABLE_RATE = {
    "gains": (False, False),
    "gains+offsets": (True, False),
    "variable-rate": (True, True),
}
"""Whether a variable-rate codec has reconstruction offsets, and a step of its own for z."""

NAMES = (
    f"small ({SMALL}), {', '.join(HYPERPRIORS)}, either with :high or widths like :64,96, "
    f"{', '.join(f'{kind}:NAME' for kind in VARIABLE_RATE)}"
)

PREFIX = "compressai:"

INSTALL = (
    "CompressAI 1.2.8 does not run with numpy 2. In an environment of its own, "
    "`pip install compressai -e .[examples]` installs it with numpy 1.26, if constraints.txt is "
    "left out. Or choose a codec of this example."
)
"""What to do where CompressAI is not there."""


class ArchitectureError(Exception):
    """A codec that cannot be built; the message says why and what to do."""


def build(name: str, *, highest: float = 1.0) -> nn.Module:
    """A fresh codec: ``small``, ``variable-rate:mbt2018-mean:64,96``, ``compressai:mbt2018@3``.

    A variable-rate codec has a step of 1 at the λ `highest`; the others do not use it.
    """
    kind, _, base = name.partition(":")
    if name.startswith(PREFIX):
        return _build_compressai(name)
    if kind in VARIABLE_RATE:
        offsets, hyper_step = VARIABLE_RATE[kind]
        return VariableRateCodec(_hyperprior(base), highest, offsets=offsets, hyper_step=hyper_step)
    return _hyperprior(name)


def base_of(name: str) -> str:
    """The fixed-rate codec in a variable-rate one; of any other, its own name."""
    kind, _, base = name.partition(":")
    return base if kind in VARIABLE_RATE else name


def full_name(name: str) -> str:
    """The name with its widths: two codecs of equal ones have the same parameters."""
    base = base_of(name)
    model, _, widths = (SMALL if base == "small" else base).partition(":")
    if model not in HYPERPRIORS:
        return name
    return f"{name.removesuffix(base)}{model}:{WIDTHS.get(widths, widths)}"


def _hyperprior(name: str) -> ScaleHyperprior:
    model, _, widths = full_name(name).partition(":")
    if model in HYPERPRIORS and re.fullmatch(r"[1-9]\d*,[1-9]\d*", widths):
        return HYPERPRIORS[model](*map(int, widths.split(",")))
    raise ArchitectureError(
        f"--arch should be {NAMES}, or {PREFIX}MODEL. Found {name}. Choose one of these."
    )


def coder_for(model: nn.Module) -> Coder | CompressAICoder:
    """What codes images with `model`, a fixed-rate codec or one step of a variable-rate one."""
    return CompressAICoder(model) if isinstance(model, CompressAICodec) else Coder(model)


class CompressAICodec(nn.Module):
    """One of CompressAI's codecs that returns a :class:`Reconstruction`."""

    stride = 64

    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, images: Tensor) -> Reconstruction:
        output = self.codec(images)
        bits = {name: -p.log2().sum() for name, p in output["likelihoods"].items()}
        return Reconstruction(output["x_hat"], bits)

    def aux_loss(self) -> Tensor:
        """The loss of the entropy bottleneck's quantiles."""
        return self.codec.aux_loss()


def _build_compressai(name: str) -> CompressAICodec:
    """From ``compressai:MODEL`` or ``compressai:MODEL@QUALITY``, imported only when asked for.

    MODEL is any image codec of CompressAI's zoo, whose QUALITY, 1 where it is not given, chooses
    the widths; or of its registry, which has codecs of one size.
    """
    model, _, quality = name.removeprefix(PREFIX).partition("@")
    try:
        from compressai.registry import MODELS
        from compressai.zoo import image_models, models
    except ImportError as error:
        raise ArchitectureError(
            f"--arch {name} needs CompressAI, which cannot be imported ({error}). {INSTALL}"
        ) from error
    # `models` has codecs of video and point clouds, too.
    names = {*image_models, *MODELS} - (models.keys() - image_models.keys())
    if model not in names:
        raise ArchitectureError(
            f"--arch {PREFIX}MODEL should name one of {', '.join(sorted(names))}. Found {name}. "
            "Choose one of these."
        )
    try:
        if model in image_models:
            return CompressAICodec(image_models[model](quality=int(quality or 1)))
        if quality:
            raise ValueError("it has one size and no quality")
        return CompressAICodec(MODELS[model]())
    except (ValueError, KeyError, TypeError) as error:
        raise ArchitectureError(
            f"--arch {PREFIX}{model}@QUALITY should be a quality that CompressAI has for this "
            f"model. Found {quality or 'none'} ({error}). Choose another one, or another model."
        ) from error


class CompressAICoder:
    """Puts the strings of CompressAI's own coder into one file, with their shapes and lengths."""

    _head = struct.Struct(">HHHH")
    _magic = b"mD"

    def __init__(self, model: CompressAICodec) -> None:
        self._codec, self._stride = model.codec, model.stride
        self._device = next(model.parameters()).device
        self._codec.update(force=True)  # tables of the distributions as trained
        self._fingerprint = fingerprint(self._codec)

    @torch.no_grad()
    def encode(self, image: Tensor) -> bytes:
        """The bytes of a uint8 image ``[3, H, W]``."""
        size = sides(image)
        images = image[None].to(self._device, torch.float32) / 255
        output = self._codec.compress(pad_to_multiple(images, self._stride))
        strings = [string for (string,) in output["strings"]]
        shape = json.dumps(output["shape"], separators=(",", ":")).encode()
        head = self._head.pack(*size, len(shape), len(strings))
        lengths = struct.pack(f">{len(strings)}I", *map(len, strings))
        content = head + shape + lengths + b"".join(strings)
        return seal(self._magic, self._fingerprint, content)

    def has_made(self, data: bytes) -> bool:
        """See :meth:`examples.lic.bitstream.Coder.has_made`."""
        return is_sealed(self._magic, self._fingerprint, data)

    @torch.no_grad()
    def decode_exactly(self, data: bytes) -> Tensor:
        """The image ``[3, H, W]`` before it is rounded to 8 bits."""
        content = unseal(self._magic, self._fingerprint, data)
        height, width, size, count = self._head.unpack_from(content)
        offset = self._head.size + size
        shape = json.loads(content[self._head.size : offset])
        strings, end = [], offset + 4 * count
        for length in struct.unpack_from(f">{count}I", content, offset):
            strings.append([content[end : end + length]])
            end += length
        decoded = self._codec.decompress(strings, shape)["x_hat"]
        return decoded[0, :, :height, :width]
