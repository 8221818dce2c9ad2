"""The commands encode, decode and refine, and how they find a codec and its step."""

from __future__ import annotations

import math
import re

import pytest
import torch
from PIL import Image

from examples.lic import coding, refinement
from examples.lic.__main__ import main
from examples.lic.architectures import build
from examples.lic.bitstream import BitstreamError
from examples.lic.checkpoint import save, save_codec
from examples.lic.coding import CodecFile, Coded, TargetError, choose, list_codecs
from examples.lic.evaluation import evaluate, psnr
from examples.lic.images import read_image
from tests.support.commands import check_refusal

TINY = "mbt2018-mean:8,8"
VARIABLE = f"variable-rate:{TINY}"


def make_codec(arch, loudness, *, seed=0):
    """An untrained codec; the larger its latents, the more bits they cost."""
    torch.manual_seed(seed)
    codec = build(arch, highest=0.1).eval()
    with torch.no_grad():
        getattr(codec, "base", codec).g_a[-1].weight *= loudness
    return codec


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Three codecs of one rate each, in both formats of files."""
    folder = tmp_path_factory.mktemp("ladder")
    for loudness in (20, 80):
        path = folder / f"{loudness}.safetensors"
        save_codec(path, make_codec(TINY, loudness), {"arch": TINY, "lambdas": [0.01]})
    run = {"arch": TINY, "lambdas": [0.05], "steps": 1}
    save(folder / "320.pt", {"run": run, "taken": 1, "model": make_codec(TINY, 320).state_dict()})
    return folder


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    path = tmp_path_factory.mktemp("variable") / "codec.safetensors"
    about = {"arch": VARIABLE, "lambdas": [0.001, 0.01, 0.1]}
    save_codec(path, make_codec(VARIABLE, 60), about, dtype=torch.float16)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((150, 100), 60).convert("RGB").save(path)
    return path


def read_line(printed):
    """Bytes, bpp, dB and codec of what a command prints last."""
    found = re.search(r"(\d+) bytes, ([\d.]+) bpp, ([\d.]+) dB, (.*) at λ (\S+)\n$", printed)
    return int(found[1]), float(found[2]), float(found[3]), found[4]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def round_trip(path, out, codecs, capsys, *options):
    """Encode and decode; what both printed, and both images."""
    assert run("encode", path, out / "x.bin", "--codec", *codecs, *options) == 0
    encoded = capsys.readouterr().out
    decoded = ["decode", out / "x.bin", out / "x.png", "--codec", *codecs, "--original", path]
    assert run(*decoded) == 0
    return read_line(encoded), capsys.readouterr().out


def test_one_codec_codes_and_decodes_an_image(ladder, picture, tmp_path, capsys):
    codec = ladder / "80.safetensors"
    (size, bpp, decibels, name), decoded = round_trip(picture, tmp_path, [codec], capsys)
    assert (tmp_path / "x.bin").stat().st_size == size
    assert bpp == pytest.approx(8 * size / (150 * 100), abs=1e-4)
    assert name == str(codec)
    score = evaluate(make_codec(TINY, 80), {"a": read_image(picture)})["a"]
    assert decibels == pytest.approx(score.psnr, abs=0.01)
    with Image.open(tmp_path / "x.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (150, 100))
    assert psnr(read_image(tmp_path / "x.png"), read_image(picture)) == pytest.approx(
        decibels, abs=0.01
    )
    assert decoded == (f"{tmp_path}/x.png: 100 x 150, {bpp:.4f} bpp, {decibels:.2f} dB, {codec}\n")


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
@pytest.mark.parametrize("size", [(1, 1), (65, 130)])
def test_images_of_any_size_and_mode(mode, size, ladder, tmp_path, capsys):
    Image.new(mode, size).save(tmp_path / "image.png")
    codec = ladder / "20.safetensors"
    _, decoded = round_trip(tmp_path / "image.png", tmp_path, [codec], capsys)
    assert f"{size[1]} x {size[0]}, " in decoded


def test_of_a_ladder_the_best_file_within_the_rate_is_taken(ladder, picture, tmp_path, capsys):
    """The random codecs are worse at higher rates, as trained ones are for some images."""
    image = read_image(picture)
    coded = [coding.encode(image, codec, 0.0) for codec in coding.load_codecs([ladder])]
    for wanted in [c.bpp for c in coded]:
        best = max((c for c in coded if c.bpp <= wanted), key=lambda c: c.psnr)
        (_, bpp, _, codec), _ = round_trip(
            picture, tmp_path, [ladder], capsys, "--bpp", f"{wanted + 1e-9}"
        )
        assert codec.startswith(str(best.codec.path))
        assert bpp <= wanted + 1e-4


@pytest.mark.parametrize("part", [0.2, 0.7])
def test_a_variable_rate_codec_comes_close_to_the_rate(part, variable, picture, tmp_path, capsys):
    image, (codec,) = read_image(picture), coding.load_codecs([variable])
    lowest, highest = (coding.encode(image, codec, lmbda).bpp for lmbda in (0.001, 0.1))
    wanted = lowest + part * (highest - lowest)
    found, decoded = round_trip(picture, tmp_path, [variable], capsys, "--bpp", f"{wanted:.4f}")
    assert 0.97 * wanted < found[1] <= wanted + 1e-4
    assert f"{found[1]:.4f} bpp, {found[2]:.2f} dB" in decoded


def test_the_codec_of_a_file_is_found_among_several(ladder, variable, picture, tmp_path, capsys):
    for codec in (ladder / "80.safetensors", variable):
        assert run("encode", picture, tmp_path / "x.bin", "--codec", codec) == 0
        command = ["decode", tmp_path / "x.bin", tmp_path / "x.png", "--codec", ladder, variable]
        assert run(*command) == 0
        assert capsys.readouterr().out.endswith(f"bpp, {codec}\n")


class Scale:
    """Codes at a rate and a PSNR that grow with λ, in place of a trained codec."""

    def __init__(self, monkeypatch):
        self.coded = []
        monkeypatch.setattr(coding, "encode", self.encode)

    def encode(self, image, codec, lmbda):
        self.coded.append(lmbda)
        return Coded(b"", math.log2(lmbda / 0.001) / 4, 20 + 3 * math.log2(lmbda), codec, lmbda)


def trained(arch, *lambdas):
    return CodecFile(None, build(arch), arch, lambdas)


@pytest.mark.parametrize(
    ("target", "lmbda"),
    [
        ({"bpp": 0.5}, 0.004),
        ({"bpp": 9.0}, 0.1),
        ({"decibels": 20 + 3 * math.log2(0.03)}, 0.03),
        ({"decibels": -20.0}, 0.001),
        ({}, 0.1),
    ],
)
def test_a_step_is_searched_between_the_trained_ones(target, lmbda, monkeypatch):
    scale = Scale(monkeypatch)
    found = choose(None, [trained(VARIABLE, 0.001, 0.01, 0.1)], **target)
    assert found.lmbda == pytest.approx(lmbda, rel=1e-3)
    assert found.bpp <= target.get("bpp", math.inf)
    assert found.psnr >= target.get("decibels", -math.inf)
    assert len(scale.coded) <= 18


def test_of_a_ladder_the_nearest_psnr_not_below_the_wanted_one(monkeypatch):
    Scale(monkeypatch)
    codecs = [trained(TINY, lmbda) for lmbda in (0.1, 0.001, 0.01)]
    for wanted, lmbda in ((20 + 3 * math.log2(0.009), 0.01), (-20, 0.001)):
        assert choose(None, codecs, decibels=wanted).lmbda == lmbda


def test_a_target_out_of_reach_says_what_is_reached(monkeypatch):
    Scale(monkeypatch)
    codecs = [trained(TINY, 0.01), trained(VARIABLE, 0.002, 0.1)]
    with pytest.raises(TargetError, match=r"--bpp should be at least 0\.2500 .* Found 0\.2\. Ask"):
        choose(None, codecs, bpp=0.2)
    with pytest.raises(TargetError, match=r"--psnr should be at most 10\.03 dB .* Found 30\. Ask"):
        choose(None, codecs, decibels=30)
    with pytest.raises(TargetError, match=r"Found 2 codecs\. Give --bpp or --psnr"):
        choose(None, codecs)


@pytest.mark.parametrize("method", ["sga+", "sga"])
@pytest.mark.parametrize("kind", ["fixed", "variable"])
def test_a_refined_file_is_decoded(kind, method, ladder, variable, picture, tmp_path, capsys):
    codec = ladder / "80.safetensors" if kind == "fixed" else variable
    options = ["--codec", codec, "--steps", "30", "--lr", "0.1", "--lambda", "0.0001"]
    if kind == "variable":
        options += ["--bpp", "0.7"]
    out = tmp_path / "x.bin"
    assert run("refine", picture, out, *options, "--method", method) == 0
    printed = capsys.readouterr()
    before, after = re.findall(r"(\d+) bytes, ([\d.]+) bpp, ([\d.]+) dB", printed.out)[:2]
    size, bpp, decibels, _ = read_line(printed.out)
    assert size == int(after[0]) == out.stat().st_size < int(before[0])
    assert "Refinement: step 30 of 30" in printed.err
    command = ["decode", out, tmp_path / "x.png", "--codec", codec, "--original", picture]
    assert run(*command) == 0
    assert f"{bpp:.4f} bpp, {decibels:.2f} dB" in capsys.readouterr().out


def test_a_file_of_a_variable_rate_codec_with_a_bit_of_its_step_flipped_is_refused(variable):
    codecs = coding.load_codecs([variable])
    data = coding.encode(torch.zeros(3, 64, 64, dtype=torch.uint8), codecs[0], 0.02).data
    assert coding.decode(data, codecs)[0].shape == (3, 64, 64)
    for bit in range(8 * 10):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError, match="bytes of something else"):
            coding.decode(bytes(flipped), codecs)
    for other in (data[:-1], data[:12], data[:7], data + bytes(4)):
        with pytest.raises(BitstreamError, match="bytes of something else"):
            coding.decode(other, codecs)


@pytest.mark.parametrize(
    ("option", "target", "factor", "miss"),
    [
        ("--bpp", "0.5", 9, r"--bpp 0\.5 by [\d.]+ bpp\. Ask for a lower one, or give a lower --l"),
        ("--psnr", "5.7", 0, r"--psnr 5\.7 by [\d.]+ dB\. Ask for a higher one, or give a higher "),
        ("--bpp", "0.5", 0, None),
        (None, None, 9, None),
    ],
)
def test_a_refined_file_that_misses_its_target_says_so(
    option, target, factor, miss, variable, picture, tmp_path, capsys, monkeypatch
):
    def multiply(model, image, how, **more):
        latents = refinement.encode(model, image)
        return refinement.quantize(model, latents._replace(y=factor * latents.y))

    monkeypatch.setattr("examples.lic.refine.refine", multiply)
    options = [] if option is None else [option, target]
    assert run("refine", picture, tmp_path / "x.bin", "--codec", variable, *options) == 0
    printed = capsys.readouterr().out
    assert read_line(printed)[0] == (tmp_path / "x.bin").stat().st_size
    if miss:
        assert re.search(f"The refined file misses {miss}", printed)
    else:
        assert "misses" not in printed


def test_an_unfinished_checkpoint_is_told(picture, tmp_path, capsys):
    path = tmp_path / "codec.pt"
    run_settings = {"arch": TINY, "lambdas": [0.05], "steps": 9}
    state = make_codec(TINY, 20).state_dict()
    save(path, {"run": run_settings, "taken": 4, "model": state})
    for command in (["encode", picture, tmp_path / "x.bin", "--codec", path],
                    ["export", path, "--output", tmp_path / "out"]):  # fmt: skip
        assert run(*command) == 0
        assert f"{path} is at step 4 of 9.\n" in capsys.readouterr().err


def test_an_older_output_next_to_the_codecs_is_written_again(ladder, picture):
    out = ladder / "picture.lic"
    for _ in range(2):
        assert run("encode", picture, out, "--codec", ladder, "--bpp", "9") == 0
    out.unlink()


def test_codecs_are_files_or_folders_of_both_formats(ladder):
    files = [ladder / name for name in ("20.safetensors", "320.pt", "80.safetensors")]
    assert list_codecs([ladder]) == files
    assert list_codecs([files[1], ladder]) == [files[1], files[0], files[2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "nowhere.png", "{out}"], "nowhere.png cannot be read"),
        (["encode", "{picture}", "{out}", "--codec", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (["encode", "{picture}", "{out}", "--codec", "{picture}"], "picture.png should be"),
        (["encode", "{picture}", "{out}", "--codec", "{ladder}"], "Found 3 codecs. Give --bpp"),
        (["encode", "{picture}", "{out}", "--bpp", "1e-4"], "--bpp should be at least 1."),
        (["encode", "{picture}", "{out}", "--bpp", "1", "--psnr", "30"], "not allowed with"),
        (["encode", "{picture}", "{picture}/x"], "x cannot be written (Not a directory). Free"),
        (["encode", "{picture}", "."], "OUT should be a file. Found the folder /"),
        (["encode", "{picture}", ""], "OUT should be a file. Found the folder /"),
        (["refine", "{picture}", ".."], "OUT should be a file. Found the folder /"),
        (["decode", "{file}", "."], "OUT should be a file. Found the folder /"),
        (["decode", "{file}", ""], "Name a file in it."),
        (
            ["encode", "{picture}", "{out}", "--codec", "{nan}"],
            "nan.safetensors should have finite",
        ),
        (["decode", "nowhere.bin", "x.png"], "nowhere.bin cannot be read (No such file"),
        (["decode", "{picture}", "{out}.png"], "should be one that one of the 1 codecs has made"),
        (["decode", "{file}", "{out}.jpg"], "OUT should end in .png. Found"),
        (["decode", "{file}", "{out}.png", "--codec", "{ladder}/320.pt"], "1 codecs has made"),
        (["decode", "{cut}", "{out}.png"], "that one of the 1 codecs has made, and whole"),
        (["decode", "{file}", "{out}.png", "--original", "{other}"], "have 100 x 150 pixels"),
        (["refine", "{picture}", "{out}", "--method", "sgd"], "invalid choice: 'sgd'"),
        (["refine", "{picture}", "{out}", "--psnr", "99"], "--psnr should be at most"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_code_2(
    arguments, message, ladder, picture, tmp_path, capsys
):
    codec = ladder / "80.safetensors"
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    assert run("encode", picture, tmp_path / "file", "--codec", codec) == 0
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:-3])
    places = {name: tmp_path / name for name in ("out", "file", "cut", "other")}
    places |= {"other": tmp_path / "other.png", "picture": picture, "ladder": ladder}
    places["nan"] = tmp_path / "nan.safetensors"
    save_codec(places["nan"], make_codec(TINY, math.nan), {"arch": TINY, "lambdas": [0.01]})
    arguments = [argument.format(**places) for argument in arguments]
    if "--codec" not in arguments:
        arguments += ["--codec", str(codec)]
    capsys.readouterr()
    check_refusal(lambda: main(arguments), message, capsys)
    assert not list(tmp_path.glob("out*"))


def test_without_codecs_those_of_the_example_are_used(
    ladder, picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("examples.lic.encode.PRETRAINED", ladder)
    assert run("encode", picture, tmp_path / "x.bin", "--bpp", "9") == 0
    assert run("decode", tmp_path / "x.bin", tmp_path / "x.png") == 0
    assert capsys.readouterr().out.count(f"{ladder}/") == 2


@pytest.mark.parametrize("name", ["picture", "codec", "folder"])
def test_what_is_read_and_what_is_no_file_is_not_overwritten(name, ladder, picture, tmp_path):
    codec = ladder / "80.safetensors"
    output = {"picture": picture, "codec": codec, "folder": tmp_path}[name]
    before = output.read_bytes() if output.is_file() else None
    for command in (["encode", picture, output], ["refine", picture, output, "--steps", "1"]):
        assert run(*command, "--codec", ladder, "--bpp", "9") == 2
    assert before is None or output.read_bytes() == before
