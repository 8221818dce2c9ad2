"""CompressAI's codecs: the library where it imports, else a stand-in with its interface."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from examples.lic.architectures import (
    ArchitectureError,
    CompressAICodec,
    CompressAICoder,
    build,
    coder_for,
)
from examples.lic.bitstream import BitstreamError
from examples.lic.evaluation import measure
from examples.lic.losses import RateDistortion
from examples.lic.streams import Crops, CropStream
from examples.lic.training import Recipe, Trainer
from moo_balance import AnalyticQP
from tests.support.codecs import random_codec

INSTALLED = importlib.util.find_spec("compressai") is not None


class StandIn(nn.Module):
    """What CompressAI's codecs have in common, at a stride of 64 and with 8-bit latents."""

    def __init__(self, quality=1):
        super().__init__()
        if quality == 7:
            raise ValueError("no quality 7")
        self.quality = quality
        self.g_a = nn.Conv2d(3, 4, 64, stride=64)
        self.g_s = nn.ConvTranspose2d(4, 3, 64, stride=64)
        self.entropy_bottleneck = nn.Module()
        self.entropy_bottleneck.quantiles = nn.Parameter(torch.ones(4, 1, 3))
        self.updates = 0

    def forward(self, x):
        y = self.g_a(x)
        y = y + torch.rand_like(y) - 0.5 if self.training else y.round()
        likelihoods = {"y": torch.exp(-y.abs()) / 2, "z": torch.full((1, 4, 1, 1), 0.5)}
        return {"x_hat": self.g_s(y), "likelihoods": likelihoods}

    def aux_loss(self):
        return self.entropy_bottleneck.quantiles.abs().sum()

    def update(self, force):
        self.updates += force

    def compress(self, x):
        y = self.g_a(x).round().to(torch.int8)
        assert self.updates
        return {"strings": [[y.numpy().tobytes()], [b"z"]], "shape": {"y": [y.shape[-2:]]}}

    def decompress(self, strings, shape):
        (y,), (z,) = strings
        assert z == b"z"
        symbols = torch.frombuffer(bytearray(y), dtype=torch.int8).view(1, 4, *shape["y"][0])
        return {"x_hat": self.g_s(symbols.to(torch.float32)).clamp(0, 1)}


@pytest.fixture
def stand_in(monkeypatch):
    registry, zoo = ModuleType("compressai.registry"), ModuleType("compressai.zoo")
    registry.MODELS = {"mbt2018-mean": StandIn, "elic2022-official": StandIn, "ssf2020": None}
    zoo.image_models = {"mbt2018-mean": lambda quality: StandIn(quality)}
    zoo.models = {**zoo.image_models, "ssf2020": None}
    for module in (ModuleType("compressai"), registry, zoo):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.skipif(INSTALLED, reason="CompressAI is there")
def test_without_compressai_a_sentence_says_what_to_do():
    with pytest.raises(ArchitectureError, match=r"needs CompressAI.*pip install compressai -e"):
        build("compressai:mbt2018-mean")


@pytest.mark.parametrize("name", ["mbt2018-mean", "mbt2018-mean@6", "elic2022-official"])
def test_any_name_that_compressai_has_is_built(stand_in, name):
    codec = build(f"compressai:{name}")
    assert isinstance(codec, CompressAICodec)
    assert codec.codec.quality == (6 if name.endswith("@6") else 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpeg", "should name one of elic2022-official, mbt2018-mean. Found compressai:jpeg"),
        ("ssf2020", "should name one of elic2022-official, mbt2018-mean. Found compressai:ssf"),
        ("elic2022-official@2", r"Found 2 \(it has one size and no quality\)"),
        ("mbt2018-mean@7", r"Found 7 \(no quality 7\)\. Choose another"),
        ("mbt2018-mean@best", "Found best "),
    ],
)
def test_a_model_or_quality_that_compressai_does_not_have_is_refused(stand_in, name, message):
    with pytest.raises(ArchitectureError, match=message):
        build(f"compressai:{name}")


def test_both_optimizers_train_it(stand_in):
    codec = build("compressai:mbt2018-mean")
    trainer = Trainer(RateDistortion(codec, 0.01), AnalyticQP(), Recipe(3, 1e-3), seed=0)
    before = codec.codec.g_a.weight.detach().clone()
    pictures = [torch.randint(0, 256, (3, 70, 70), dtype=torch.uint8)]
    trainer.run(CropStream(Crops(pictures, crop=64, seed=0), batch=2))
    assert not torch.equal(before, codec.codec.g_a.weight)
    quantiles = codec.codec.entropy_bottleneck.quantiles
    torch.testing.assert_close(quantiles, torch.full_like(quantiles, 1 - 3e-3))


def test_its_own_coder_fills_the_files(stand_in, tmp_path):
    codec = build("compressai:mbt2018-mean").eval()
    picture = torch.randint(0, 256, (3, 70, 130), dtype=torch.uint8)
    result = measure(codec, coder_for(codec), lambda: picture, tmp_path / "noise.bin")
    header, shape, lengths, symbols = 14, len('{"y":[[2,3]]}'), 8, 4 * 2 * 3 + 1
    data = (tmp_path / "noise.bin").read_bytes()
    assert result.size == len(data) == header + shape + lengths + symbols
    assert result.exact
    assert CompressAICoder(codec).decode_exactly(data).shape == (3, 70, 130)


def test_bytes_of_something_else_are_refused(stand_in):
    coder = CompressAICoder(build("compressai:mbt2018-mean"))
    data = coder.encode(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError, match=f"Found {len(data)} bytes of something else"):
            coder.decode_exactly(bytes(flipped))
    for other in (b"a picture", data[:-1], data + b"x"):
        with pytest.raises(BitstreamError, match=f"Found {len(other)} bytes of something else"):
            coder.decode_exactly(other)


def test_a_file_of_another_codec_of_compressai_is_refused(stand_in):
    one, other = (CompressAICoder(build("compressai:mbt2018-mean")) for _ in range(2))
    data = one.encode(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    assert one.has_made(data)
    assert not other.has_made(data)


def test_an_image_beyond_the_format_is_refused(stand_in):
    with pytest.raises(BitstreamError, match="Found 1 x 65536"):
        CompressAICoder(build("compressai:mbt2018-mean")).encode(
            torch.zeros(3, 1, 2**16, dtype=torch.uint8)
        )


@pytest.mark.skipif(not INSTALLED, reason="needs CompressAI")
@pytest.mark.filterwarnings("ignore")  # from its imports
@pytest.mark.parametrize("name", ["mbt2018-mean", "mbt2018", "elic2022-official"])
def test_the_real_codecs_train_and_code(name, tmp_path):
    codec = build(f"compressai:{name}")
    picture = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    trainer = Trainer(RateDistortion(codec, 0.01), AnalyticQP(), Recipe(1, 1e-4), seed=0)
    trainer.run(CropStream(Crops([picture], crop=128, seed=0), batch=1))
    codec.eval()
    result = measure(codec, coder_for(codec), lambda: picture, tmp_path / "noise.bin")
    assert result.psnr > 3
    # Its tables of scales are coarse for a codec that is hardly trained.
    assert result.bpp == pytest.approx(result.estimated_bpp, abs=0.15)


@pytest.mark.skipif(not INSTALLED, reason="needs CompressAI")
@pytest.mark.filterwarnings("ignore")
def test_compressai_decodes_with_weights_of_this_example():
    from compressai.models import MeanScaleHyperprior

    model, images = random_codec(8, 12).eval(), torch.rand(1, 3, 64, 128)
    other = MeanScaleHyperprior(8, 12).eval()
    other.load_state_dict(model.state_dict())
    other.update()
    with torch.no_grad():
        expected, coded = model(images), other.compress(images)
        decoded = other.decompress(coded["strings"], coded["shape"])["x_hat"]
    torch.testing.assert_close(decoded, expected.images.clamp(0, 1))
    bits = 8 * sum(len(string) for (string,) in coded["strings"])
    assert bits == pytest.approx(sum(expected.bits.values()).item(), rel=0.1)
    model.load_state_dict(other.state_dict())  # with the tables of its coder
    assert torch.equal(model(images).images, expected.images)
