"""Work whose result is kept: frozen dataclasses that say all that the result depends on."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.lic.scores import crop_center
from examples.lic import architectures
from examples.lic.anchors import measure_format
from examples.lic.checkpoint import load_codec
from examples.lic.evaluation import Score, evaluate
from examples.lic.images import study_photographs
from examples.lic.losses import RateDistortion, level_name
from examples.lic.refinement import Refinement, refine, score
from examples.lic.runs import Run, TrainingError, train
from examples.lic.streams import Crops, CropStream, Sources, find_sources
from examples.lic.training import Observer, Trainer
from examples.lic.variable_rate import VariableRateCodec
from moo_balance import BalanceError

Result: TypeAlias = dict[str, Any]

SIDE = 512
"""Largest side of the middle of a photograph that is scored, for time."""

PARTS = 100
"""Into so many equal parts the course of a run's weights is divided."""

CROPS = 6
"""Fresh crops of a photograph, in a row and in a column."""

PROBED = 3
"""Steps that a probe takes or stands for."""


@dataclass(frozen=True)
class Context:
    """What all jobs share: the images.

    Args:
        images: Folder to train on; None for the bundled photographs.
        crop: Side of the crops in training.
        side: Of the middle of the photographs that is scored.
    """

    images: Path | None
    crop: int
    side: int

    @cached_property
    def sources(self) -> Sources:
        """The images to train on."""
        return find_sources(self.images, crop=self.crop, skip=True, memory=int(4e9))[0]

    @cached_property
    def photographs(self) -> dict[str, Tensor]:
        """The images to score."""
        images = study_photographs()
        return {name: crop_center(image, self.side) for name, image in images.items()}

    @cached_property
    def identity(self) -> str:
        """Equal for equal images to train on."""
        identity = Crops(self.sources, crop=self.crop, seed=0).identity
        return f"{identity}, scored up to {self.side} pixels"


class Job(Protocol):
    """Called with a context and the path of a checkpoint it returns a result: what JSON has.

    Of a run that breaks off this is ``{"error": why}``.
    """

    @property
    def kind(self) -> str:
        """Jobs of one kind have equally expensive steps."""

    @property
    def length(self) -> int:
        """How many steps there are."""

    def probe(self, context: Context) -> None:
        """Take a step or a few."""

    def __call__(self, context: Context, path: Path) -> Result:
        """Do the work."""


@dataclass(frozen=True)
class Train:
    """Train a run and score it.

    Args:
        run: Its checkpoint is at the path given, and its start, if that is a run, next to it.
        observers: Of the run.
        scored: Score the photographs, by estimated rate.
        on_crops: Score fresh crops of the training images, too.
        kept: Leave the checkpoint where it is, for other runs to start from, and record the course
            of the coefficients.
        start_observers: Of the run that this one starts from.
    """

    run: Run
    observers: tuple[Observer, ...] = ()
    scored: bool = True
    on_crops: bool = False
    kept: bool = False
    start_observers: tuple[Observer, ...] = ()

    @property
    def start(self) -> Train | None:
        """The run that this one starts from, as a job."""
        if not isinstance(self.run.start, Run):
            return None
        return Train(self.run.start, self.start_observers, scored=False, kept=True)

    @property
    def kind(self) -> str:
        run, method = self.run, type(self.run.weighting).__name__
        return f"{run.arch}, {len(run.lambdas)} λ {run.one_level}, {method}, {run.batch}"

    @property
    def length(self) -> int:
        return self.run.recipe.steps

    def probe(self, context: Context) -> None:
        run = self.run
        model = architectures.build(run.arch, highest=run.lambdas[-1])
        recipe = replace(run.recipe, steps=PROBED)
        trainer = Trainer(run.objective(model), run.weighting, recipe, seed=0)
        crops = Crops(context.sources, crop=run.crop, seed=0)
        trainer.run(CropStream(crops, batch=run.batch))

    def __call__(self, context: Context, path: Path) -> Result:
        course = Course()
        path.unlink(missing_ok=True)  # a stopped run would be resumed, and its course incomplete
        try:
            train(self.run, context.sources, path, save_every=self.length + 1,
                  observers=[course, *self.observers])  # fmt: skip
        except (TrainingError, BalanceError) as error:
            return {"error": str(error)}
        model, _ = load_codec(path)
        result = course.summarize()
        if not self.kept:
            path.unlink()
            result.pop("course", None)
        if self.scored and isinstance(model, VariableRateCodec):
            codecs = {level_name(lmbda): model.at(lmbda) for lmbda in self.run.lambdas}
            result["levels"] = {k: evaluate(v, context.photographs) for k, v in codecs.items()}
        elif self.scored:
            result["images"] = evaluate(model, context.photographs)
        if self.on_crops:
            result["crops"] = score_crops(model, context.sources, self.run.crop)
        return result


class Course(Observer):
    """Records coefficients and weights of rate and distortion, and the CPU time of each step."""

    def __init__(self) -> None:
        self._figures: dict[str, list[list[float]]] = {"coefficient": [], "weight": []}
        self._times = [time.process_time()]

    def after(self, trainer: Trainer) -> None:
        self._times.append(time.process_time())
        if isinstance(trainer.objective, RateDistortion):
            metrics = trainer.optimizer.log_dict(prefix="")
            for kind, series in self._figures.items():
                series.append([metrics[f"{kind}/{name}"] for name in RateDistortion.names])

    def summarize(self) -> Result:
        """Median CPU seconds of a ``step``; of rate and distortion, means over the second half.

        ``course`` has the mean coefficients in equal parts of the whole run.
        """
        result: Result = {"step": median(b - a for a, b in pairwise(self._times))}
        if taken := len(self._figures["weight"]):
            for kind, series in self._figures.items():
                result[f"{kind}s"] = average(series[taken // 2 :])
            size, series = max(1, taken // PARTS), self._figures["coefficient"]
            starts = range(0, taken // size * size, size)
            result["course"] = [average(series[start : start + size]) for start in starts]
        return result


def average(rows: list[list[float]]) -> list[float]:
    """The mean of each column."""
    return [fmean(column) for column in zip(*rows, strict=True)]


def score_crops(model: nn.Module, sources: Sources, side: int) -> Score:
    """Mean rate and PSNR of crops that lie evenly in the images, as crops drawn at random do."""
    scores: list[Score] = []
    for source in sources:
        image = source if isinstance(source, Tensor) else source.read()
        rows, columns = (_midpoints(size - side) for size in image.shape[-2:])
        crops = {
            f"{top} {left}": image[:, top : top + side, left : left + side]
            for top in rows
            for left in columns
        }
        scores += evaluate(model, crops).values()
    return Score(*average(scores))


def _midpoints(length: int) -> list[int]:
    """The middles of equal parts of a line."""
    return [int((part + 0.5) * length / CROPS) for part in range(CROPS)]


@dataclass(frozen=True)
class Refine:
    """Refine the latents of every photograph.

    Args:
        codec: File of the codec.
        lmbda: λ of the refinement.
        how: Relaxation and steps.
        side: Of the middle of the photographs that is refined.
    """

    codec: Path
    lmbda: float
    how: Refinement
    side: int

    @property
    def kind(self) -> str:
        return f"refinement, {self.side}"

    @property
    def length(self) -> int:
        return self.how.steps + PROBED  # what encoding and scoring cost besides

    def probe(self, context: Context) -> None:
        replace(self, how=replace(self.how, steps=0))(context, Path())

    def __call__(self, context: Context, path: Path) -> Result:
        codec, _ = load_codec(self.codec)
        images = {}
        for name, photograph in context.photographs.items():
            image = crop_center(photograph, self.side)
            images[name] = score(codec, refine(codec, image, self.how, lmbda=self.lmbda), image)
        return {"images": images}


@dataclass(frozen=True)
class ScoreCodec:
    """Score a codec file on the photographs, by estimated rate."""

    codec: Path
    kind = "codec file"
    length = 1

    def probe(self, context: Context) -> None:
        self(context, Path())

    def __call__(self, context: Context, path: Path) -> Result:
        return {"images": evaluate(load_codec(self.codec)[0], context.photographs)}


@dataclass(frozen=True)
class ScoreFormat:
    """Score an image format at one quality, by the sizes of its files.

    Args:
        name: One of :data:`examples.lic.anchors.FORMATS`.
        quality: 0 to 100.
    """

    name: str
    quality: int
    length = 1

    @property
    def kind(self) -> str:
        return self.name

    def probe(self, context: Context) -> None:
        self(context, Path())

    def __call__(self, context: Context, path: Path) -> Result:
        images = {}
        with TemporaryDirectory() as folder:
            for name, image in context.photographs.items():
                file = Path(folder, name)
                result = measure_format(self.name, self.quality, partial(torch.clone, image), file)
                images[name] = Score(result.bpp, result.psnr)
        return {"images": images}
