"""Images to bytes and back: what is written, what comes back, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from examples.lic import bitstream, checkpoint
from examples.lic.bitstream import SCALES, BitstreamError, Coder, fingerprint
from examples.lic.evaluation import reconstruct, to_pixels
from examples.lic.hyperprior import MeanScaleHyperprior
from examples.lic.variable_rate import VariableRateCodec
from tests.support.codecs import random_codec

HEADER = 18


def make_model(seed=0, spread=1.0):
    return random_codec(8, 12, spread=spread, seed=seed).eval()


def constant_model():
    """Every y is 2.6, every mean 0.25 and scale 0.9, every z 1.2 with a median of 0.1."""
    model = MeanScaleHyperprior(2, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.g_a[-1].bias.fill_(2.6)
        model.h_a[-1].bias.fill_(1.2)
        model.h_s[-1].bias.copy_(torch.tensor([0.9] * 3 + [0.25] * 3))
        model.entropy_bottleneck.quantiles[:, 0, 1] = 0.1
    return model


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from([0.1, 1.0, 30.0]))
def test_what_is_decoded_is_what_the_codec_reconstructs(height, width, spread):
    model = make_model(height, spread)
    image = noise(height, width)
    data = Coder(model).encode(image)
    own, _ = reconstruct(model, image)
    assert torch.equal(Coder(model).decode_exactly(data), own)
    assert torch.equal(Coder(model).decode(data), to_pixels(own))


@pytest.mark.parametrize("lmbda", [0.002, 0.05, 0.2])
def test_a_variable_rate_codec_is_decoded_at_the_step_it_was_coded_with(lmbda):
    codec = VariableRateCodec(make_model(spread=3.0), 0.05, offsets=True, hyper_step=True).eval()
    with torch.no_grad():
        for layers in (codec.offset.layers, codec.hyper_step.layers):
            layers[-1].weight.uniform_(-0.5, 0.5)
    image = noise(70, 90)
    data = Coder(codec.at(lmbda)).encode(image)
    own, bits = reconstruct(codec.at(lmbda), image)
    assert torch.equal(Coder(codec.at(lmbda)).decode_exactly(data), own)
    assert 8 * len(data) == pytest.approx(bits, rel=0.03, abs=8 * HEADER + 64)
    with pytest.raises(BitstreamError, match="one that this codec has made"):
        Coder(codec.at(0.01)).decode(data)


@pytest.mark.parametrize("largest", [0, 1, 100, bitstream.LARGEST])
def test_any_symbols_come_back(largest):
    """However unlikely the codec finds them."""
    random = np.random.default_rng(largest)
    z = random.integers(-largest, largest + 1, (8, 2, 3), dtype=np.int32)
    y = random.integers(-largest, largest + 1, (12, 8, 12), dtype=np.int32)
    header = bitstream._Header(128, 192, largest, largest, 0)
    data = Coder(make_model())._encode_symbols(header, z, y)
    decoder = bitstream.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    decoded = Coder(make_model())._decode_symbols(header, decoder)
    assert np.array_equal(decoded[0], z)
    assert np.array_equal(decoded[1], y)


def test_symbols_are_rounded_distances_from_mean_and_median():
    z, y = Coder(constant_model())._symbols(noise(64, 70))
    assert z.shape == (1, 2, 1, 2)
    assert (z == 1).all()  # 1.2 − 0.1 = 1.1
    assert y.shape == (1, 3, 4, 8)
    assert (y == 2).all()  # 2.6 − 0.25 = 2.35


def test_the_format_stays_as_it_was():
    """A file of format 3: decoders to come must read it, or the format gets another number."""
    model = constant_model()
    data = Coder(model).encode(noise(64, 70))
    assert data.hex() == (
        "6d03ab023c8f00400046000100025fbdb8eb"  # header
        "fffdffffac49fac62fa72f2799a8c28d65e9a181f33db39f7c5fe0e9ba3e745dfc1021ef08d5b2ab5ff2"
        "9c0782cc2c943ae1b53d81fcbf38e277ffb592a45de8"
    )
    assert torch.equal(Coder(model).decode(data), torch.full((3, 64, 70), 0, dtype=torch.uint8))


def test_scales_are_the_nearest_of_a_table_in_their_logarithm():
    assert len(SCALES) == 128
    assert SCALES[0] == pytest.approx(0.11)
    assert SCALES[-1] == pytest.approx(256)
    assert SCALES[64] == pytest.approx(5.4711, rel=1e-4)
    model = constant_model()
    for scale, entry in ((-1.0, 0), (0.1, 0), (5.6, 64), (5.65, 65), (1e9, 127)):
        with torch.no_grad():
            model.h_s[-1].bias[:3] = scale
        assert (Coder(model)._scales(np.ones((2, 1, 1), np.int32)) == SCALES[entry]).all()


def test_true_size_is_the_information_content():
    """Of symbols drawn from the codec's own distributions, within 1 % and a word of 4 bytes."""
    model = make_model(spread=3.0)
    with torch.no_grad():
        table = model.z_probabilities(60)
        z = table.multinomial(36, replacement=True).view(1, 8, 6, 6) - 60.0
        sent_z = model.z_from_symbols(z)
        _, y_scale = model.predict(sent_z)
        y = (torch.randn(y_scale.shape) * y_scale.clamp(min=0.11)).round()
        bits = sum(model.bits(y, y_scale, sent_z).values()).item()
    symbols = [x.to(torch.int32).numpy() for x in (z[0], y[0])]
    largest = [int(np.abs(x).max()) for x in symbols]
    header = bitstream._Header(384, 384, *largest, 0)
    payload = Coder(model)._encode_symbols(header, *symbols)
    assert bits > 8000
    assert abs(8 * len(payload) - bits) < 0.01 * bits + 32


def test_a_codec_from_a_file_decodes_the_same_picture_on_other_threads(tmp_path):
    torch.manual_seed(0)
    model = MeanScaleHyperprior(32, 48).eval()
    checkpoint.save_codec(
        tmp_path / "codec.safetensors", model, {"arch": "small", "lambdas": [0.01]}
    )
    image = noise(100, 130)
    data = Coder(model).encode(image)
    own = to_pixels(reconstruct(model, image)[0])
    torch.set_num_threads(2)
    try:
        decoded = Coder(checkpoint.load_codec(tmp_path / "codec.safetensors")[0]).decode(data)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(decoded, own)


def harmed(data, first):
    """The file with one bit flipped, each before `first` and some of the rest; cut; extended."""
    for bit in (*range(8 * first), *range(8 * first, 8 * len(data), 7)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    yield from (data[:length] for length in range(len(data)))
    yield from (data + more for more in (b"\0", bytes(4), b"\xff" * 8, data))


def test_a_file_with_any_bit_flipped_cut_or_extended_is_refused():
    coder = Coder(make_model(spread=3.0))
    data = coder.encode(noise(64, 64))
    assert coder.has_made(data)
    for other in harmed(data, HEADER):
        with pytest.raises(BitstreamError, match=r"whole\. Found \d+ bytes of something else"):
            coder.decode(other)


def test_a_file_of_another_codec_is_refused():
    data = Coder(make_model(1)).encode(noise(64, 64))
    assert not Coder(make_model()).has_made(data)
    with pytest.raises(BitstreamError, match="Name the codec that it was encoded with"):
        Coder(make_model()).decode(data)


def test_a_machine_that_predicts_other_scales_is_told(monkeypatch):
    coder = Coder(make_model(spread=3.0))
    data, scales = coder.encode(noise(64, 64)), coder._scales
    monkeypatch.setattr(coder, "_scales", lambda z: scales(z)[::-1].copy())
    with pytest.raises(BitstreamError, match="Found another: this machine"):
        coder.decode(data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_symbols_that_are_not_finite_are_refused(value):
    model = constant_model()
    with torch.no_grad():
        model.g_a[-1].bias.fill_(value)
    with pytest.raises(BitstreamError, match=r"Found a symbol of nan\. Choose another codec"):
        Coder(model).encode(noise(64, 64))


def test_symbols_beyond_the_format_are_refused():
    model = constant_model()
    with torch.no_grad():
        model.g_a[-1].bias.fill_(1e6)
    with pytest.raises(BitstreamError, match="a symbol of 1000000"):
        Coder(model).encode(noise(64, 64))


def test_an_image_beyond_the_format_is_refused():
    with pytest.raises(BitstreamError, match="1 x 65536"):
        Coder(constant_model()).encode(noise(1, 2**16))


def test_a_fingerprint_tells_any_two_codecs_apart():
    model = make_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.entropy_bottleneck.quantiles[3, 0, 1] += 1e-6
    assert before == fingerprint(make_model())
    assert before != fingerprint(model)
