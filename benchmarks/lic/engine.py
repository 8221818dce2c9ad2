"""Jobs as values, and the engine that does each of them once.

::

    experiment.jobs() ──► Engine.collect ──► experiment.read(result) ──► JSON, for the page
                              │      ▲
     jobs, after those that   ▼      │  results as JSON files,
     they depend on       job(engine)┘  found again by the job's representation

A job trains and scores a `Run` of ``examples.lic.runs``, or uses the codec of one. It names the
jobs that it depends on, so an experiment is known as a whole before its first step.
"""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

import moo_balance
from benchmarks.lic import cache
from examples.lic.images import Photographs

Result: TypeAlias = dict[str, Any]
"""What is kept of a job, as JSON gives it back."""

VERSIONS = f"moo_balance {moo_balance.__version__}, torch {torch.__version__}"
"""Part of every key, so that results of another version are not taken for those of this one."""


class Job(Protocol):
    """Work whose result is kept: a frozen dataclass. Jobs of equal representation are equal."""

    @property
    def needs(self) -> Sequence[Job]:
        """The jobs that have to be done before."""

    def __call__(self, engine: Engine) -> Result:
        """Do the work."""

    def __str__(self) -> str:
        """A few words: the readable part of a file's name, and a line of progress."""


class Experiment(Protocol):
    """A list of jobs, and how to read their results."""

    def jobs(self) -> Iterable[Job]:
        """Return all that is to be done; what these jobs depend on need not be listed."""

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        """Return what the page is written from, as JSON."""


def waves(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Order jobs and all that they need, each once: no job of a wave depends on another of it."""
    left: dict[str, Job] = {}

    def add(job: Job) -> None:
        if repr(job) not in left:
            for needed in job.needs:
                add(needed)
            left[repr(job)] = job

    for job in jobs:
        add(job)
    while left:
        wave = [job for job in left.values() if not any(repr(n) in left for n in job.needs)]
        yield wave
        for job in wave:
            del left[repr(job)]


def no_report(line: str) -> None:
    """Print nothing; unlike a lambda it can be sent to another process."""


@dataclass(frozen=True)
class Engine:
    """Does jobs with photographs; what is in `folder` is not done again.

    Args:
        photographs: Those to train on, and those to score on.
        folder: For results and checkpoints.
        workers: Processes, of one thread each.
        say: Called with one line for each job that has ended.
    """

    photographs: Photographs
    folder: Path
    workers: int = 1
    say: Callable[[str], object] = no_report

    def collect(self, experiment: Experiment) -> dict[str, Any]:
        """Do all jobs of an experiment, and read its results."""
        ordered = waves(experiment.jobs())
        todo = [[job for job in wave if not self._path(job).exists()] for wave in ordered]
        if self.workers == 1 or sum(map(len, todo)) < 2:
            for job in chain.from_iterable(todo):
                self.result(job)
        else:
            self._share_out(todo)
        return experiment.read(self.result)

    def result(self, job: Job) -> Result:
        """Return the result of a job, which is done now if it was not done before."""
        path = self._path(job)
        result = cache.load(path)
        if result is None:
            result = cache.store(path, self._key(job), job(self))
            self.say(str(job))
        return result

    def checkpoint(self, name: str) -> Path:
        """Return where a checkpoint of this version and these photographs is kept."""
        return self.folder / cache.file_name(self._setting, "checkpoints", "") / name

    def _share_out(self, todo: Iterable[Sequence[Job]]) -> None:
        """Do jobs in several processes, one wave after another."""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,))
        silent = Engine(self.photographs, self.folder)  # `say` cannot always be pickled
        try:
            for wave in todo:
                futures = {pool.submit(silent.result, job): job for job in wave}
                for future in as_completed(futures):
                    future.result()
                    self.say(str(futures[future]))
        finally:
            pool.shutdown(cancel_futures=True)

    def _key(self, job: Job) -> str:
        if " at 0x" in repr(job):
            raise ValueError(
                f"The representation of a job should tell what it does. Found {job!r}."
            )
        return f"{self._setting}; {job!r}"

    def _path(self, job: Job) -> Path:
        return self.folder / "results" / cache.file_name(self._key(job), str(job))

    @cached_property
    def _setting(self) -> str:
        sets = (self.photographs.train, self.photographs.held_out)
        return f"{VERSIONS}; photographs {'-'.join(f'{fingerprint(s):08x}' for s in sets)}"


def fingerprint(images: Mapping[str, Tensor]) -> int:
    """A checksum of the names and the pixels of a set of images."""
    value = 0
    for name, image in images.items():
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(image.contiguous().numpy(), value)
    return value
