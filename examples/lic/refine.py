"""Refine the latents of one image, and write them to a file that ``decode`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from examples.lic import coding, options
from examples.lic.architectures import ArchitectureError
from examples.lic.encode import add_target, check_output, codec_paths, describe, write
from examples.lic.hyperprior import Codec
from examples.lic.images import read_image
from examples.lic.progress import Meter
from examples.lic.refinement import Refinement, refine
from examples.lic.rounding import (
    PUBLISHED_STEPS,
    SGA,
    SGA_ANNEALING,
    SGA_PLUS,
    SGA_PLUS_ANNEALING,
    Annealing,
    Gumbel,
)

METHODS = {"sga+": (SGA_PLUS, SGA_PLUS_ANNEALING), "sga": (SGA, SGA_ANNEALING)}
"""Roundings with their temperatures. Both round the distance from the predicted mean."""

STEPS = 500


def main(arguments: Sequence[str]) -> int:
    """Refine; returns the exit code."""
    parser = options.Parser("refine", "Code an image with refined latents.", quick=False)
    parser.add("image", "to encode, of any size", Path, metavar="IMAGE")
    parser.add("output", "the file to write", Path, metavar="OUT")
    add_target(parser)
    parser.add("--method", f"of rounding: {', '.join(METHODS)}", default="sga+", choices=METHODS)
    parser.add("--steps", f"of Adam; published {PUBLISHED_STEPS}", options.number(int), STEPS)
    parser.add("--lr", "Adam's learning rate", options.number(float), Refinement.lr)
    parser.add("--lambda", "of the refinement, if not the codec's", options.number(float),
               dest="lmbda")  # fmt: skip
    parser.add("--seed", "of the noise", options.seed, 0)
    chosen = parser.parse(arguments)
    paths = codec_paths(chosen)
    check_output(chosen.output, [chosen.image, *paths])
    codecs = coding.load_codecs(paths, chosen.device)
    image = read_image(chosen.image)
    before = coding.choose(image, codecs, bpp=chosen.bpp, decibels=chosen.psnr)
    model = before.codec.at(before.lmbda)
    if not isinstance(model, Codec):
        raise ArchitectureError(
            f"The codec should be one of this example's own. Found {before.codec.path}, which is "
            "CompressAI's. Choose another --codec."
        )
    rounding, annealing = METHODS[chosen.method]
    relaxation = Gumbel(rounding, within(annealing, chosen.steps))
    how = Refinement(relaxation, steps=chosen.steps, lr=chosen.lr)
    lmbda = before.lmbda if chosen.lmbda is None else chosen.lmbda
    meter = Meter("Refinement", chosen.steps, "step")
    update = lambda step, latents: step and meter.update()  # noqa: E731
    pixels = image.to(chosen.device)
    sent = refine(model, pixels, how, lmbda=lmbda, seed=chosen.seed, on_step=update)
    meter.close()
    after = coding.encode(image, before.codec, before.lmbda, sent.symbols)
    write(chosen.output, after.data)
    print(f"before: {before}")
    print(f"after:  {after}")
    print(_miss(after, bpp=chosen.bpp, decibels=chosen.psnr), end="")
    print(describe(chosen.output, after))
    return 0


def _miss(coded: coding.Coded, *, bpp: float | None, decibels: float | None) -> str:
    """A line that says by how much a refined file misses the target, if it does."""
    if bpp is not None and coded.bpp > bpp:
        missed, less = f"--bpp {bpp:g} by {coded.bpp - bpp:.2g} bpp", "lower"
    elif decibels is not None and coded.psnr < decibels:
        missed, less = f"--psnr {decibels:g} by {decibels - coded.psnr:.2g} dB", "higher"
    else:
        return ""
    return f"The refined file misses {missed}. Ask for a {less} one, or give a {less} --lambda.\n"


def within(annealing: Annealing, steps: int) -> Annealing:
    """The same temperatures in other than the 2000 steps for which they were published."""
    part = steps / PUBLISHED_STEPS
    return replace(annealing, rate=annealing.rate / part, delay=round(annealing.delay * part))
