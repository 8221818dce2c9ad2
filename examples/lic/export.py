"""Write the trained weights of checkpoints to codec files, which are smaller and need no run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from examples.lic import options
from examples.lic.checkpoint import save_codec
from examples.lic.coding import list_codecs, load
from examples.lic.encode import check_folder


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    parser = options.Parser("export", "Write codec files from training checkpoints.", quick=False)
    parser.add("checkpoints", "of the train command, or folders", Path, nargs="+",
               metavar="CHECKPOINT")  # fmt: skip
    parser.add("--output", "folder for the codec files", Path, required=True)
    parser.add_argument("--half", action="store_true", help="weights in float16")
    chosen = parser.parse(arguments)
    check_folder(chosen.output)
    sources = list_codecs(chosen.checkpoints)
    if any(source.parent.resolve() == chosen.output.resolve() for source in sources):
        raise options.OptionError(
            "--output should be another folder than those of the checkpoints. Found "
            f"{chosen.output}. Choose another one."
        )
    dtype = torch.float16 if chosen.half else torch.float32
    for source, target in _plan(sources, chosen.output).items():
        model, about = load(source)
        save_codec(target, model, about, dtype=dtype)
        lambdas = " ".join(f"{lmbda:.4g}" for lmbda in about["lambdas"])
        print(f"{target}: {about['arch']}, λ {lambdas}, {target.stat().st_size} bytes")
    return 0


def _plan(sources: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The checkpoints and their codec files, which have the same names."""
    plan = {source: folder / f"{source.stem}.safetensors" for source in sources}
    for source, target in plan.items():
        if others := [other for other in sources if other != source and plan[other] == target]:
            raise options.OptionError(
                f"Checkpoints should have names that differ. Found {source} and {others[0]}, both "
                f"for {target}. Export them to folders of their own."
            )
    return plan
