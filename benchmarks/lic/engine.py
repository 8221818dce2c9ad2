"""Carries out the jobs of experiments, each once, in processes of one thread.

::

    for stage in experiment.jobs(results):   # a stage may depend on results[job] of earlier ones
        carry out what is not stored yet     # and first the runs that it starts from
    experiment.summarize(results)            # in types that JSON has, for the page
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.lic.jobs import PARTS, PROBED, Context, Job, Result, ScoreCodec, Train
from benchmarks.lic.store import Store, make_key


class Results(Protocol):
    """Results by job, in types that JSON has."""

    def __getitem__(self, job: Job) -> Result: ...


class Experiment(Protocol):
    """A question, and the runs that settle it."""

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        """The jobs in stages; runs that they start from need not be among them."""

    def summarize(self, results: Results) -> dict[str, Any]:
        """What the page shows.

        ``title``, ``about``, ``comparisons`` and what they measure, ``"b"`` or ``"BD-rate"``,
        ``tables``.
        """


@dataclass
class Engine:
    """Does jobs, and knows their results.

    Args:
        store: The results.
        context: The images.
        folder: For checkpoints.
        pool: Does jobs in other processes, see :func:`make_pool`; None to do them in this one.
        say: Called with lines of progress.
    """

    store: Store
    context: Context
    folder: Path
    pool: Executor | None = None
    say: Callable[[str], object] = print
    _keys: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, job: Job) -> Result:
        return self.store[self.key(job)]

    def key(self, job: Job) -> str:
        """The key of the job's result."""
        text = repr(job)
        if text not in self._keys:
            self._keys[text] = make_key(job, self.context)
        return self._keys[text]

    def run(self, name: str, experiment: Experiment) -> None:
        """Carry out what is missing of an experiment, and store its summary."""
        keys: set[str] = set()
        for stage in experiment.jobs(self):
            stage = with_starts(stage)
            keys.update(map(self.key, stage))
            missing = self.missing(stage)
            first = [job for job in missing if isinstance(job, Train) and job.kept]
            for jobs in (first, [job for job in missing if job not in first]):
                self._carry_out(name, jobs)
        seconds = sum(self.store[key]["seconds"] for key in keys)
        summary = {**experiment.summarize(self), "minutes": seconds / 60}
        if dropped := self.store.finish(name, keys, summary):
            self.say(f"{name}: {dropped} results of other code or settings are dropped.")

    def missing(self, stage: Sequence[Job]) -> list[Job]:
        """Those without a result, each once, and starts of theirs without a checkpoint."""
        missing = {self.key(job): job for job in stage if self.key(job) not in self.store}
        for job in with_starts(list(missing.values())):
            if isinstance(job, Train) and job.kept and not self._path(job).exists():
                missing[self.key(job)] = job
        return list(missing.values())

    def _path(self, job: Job) -> Path:
        """Of the checkpoint: it lies next to that of the start, where training finds it."""
        if isinstance(job, Train) and job.kept:
            return self.folder / self.key(job) / job.run.file_name()
        start = job.start if isinstance(job, Train) else None
        folder = self.folder if start is None else self._path(start).parent
        return folder / f"{self.key(job)}.pt"

    def _carry_out(self, name: str, jobs: Sequence[Job]) -> None:
        begin = time.monotonic()
        for done, (job, result) in enumerate(self._results(jobs), 1):
            self.store.add(name, self.key(job), result)
            minutes = (time.monotonic() - begin) / 60
            self.say(f"{name}: {done} of {len(jobs)} jobs of this stage, {minutes:.1f} min")

    def _results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        if self.pool is None:
            for job in jobs:
                yield job, carry_out(job, self.context, self._path(job))
            return
        futures = {self.pool.submit(_work, job, self._path(job)): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


def with_starts(stage: Sequence[Job]) -> list[Job]:
    """The jobs, and before them the runs that they start from."""
    starts = [job.start for job in stage if isinstance(job, Train) and job.start]
    return [*starts, *stage]


def carry_out(job: Job, context: Context, path: Path) -> Result:
    """Do a job, and measure its CPU time."""
    before = time.process_time()
    result = job(context, path)
    return {**result, "seconds": time.process_time() - before}


def make_pool(workers: int, context: Context) -> Executor | None:
    """Processes of one thread each, or None for a single one."""
    if workers == 1:
        return None
    fresh = replace(context)  # without images that were read
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (fresh,))


def _begin(context: Context) -> None:
    global _context
    torch.set_num_threads(1)
    _context = context


def _work(job: Job, path: Path) -> Result:
    return carry_out(job, _context, path)


class _Typical:
    """Results so far, and a typical one for a job that is not done yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getitem__(self, job: Job) -> Result:
        key = self._engine.key(job)
        if key in self._engine.store:
            return self._engine[job]
        # Runs of different jobs settle to different weights, so that what follows differs, too.
        shares, score = [0.8, 0.2 + 0.1 * int(key[:8], 16) / 16**8], [0.3, 28.0]
        return {"step": 1.0, "coefficients": shares, "course": [shares] * PARTS, "crops": score}


class Costs:
    """CPU seconds of what is missing of experiments, from steps of each kind that are timed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: dict[str, float] = {}
        self._counted: set[str] = set()

    def estimate(self, experiment: Experiment) -> float:
        """Of an experiment; runs that it shares with one before count there."""
        total = 0.0
        for stage in experiment.jobs(_Typical(self._engine)):
            for job in self._engine.missing(with_starts(stage)):
                if (key := self._engine.key(job)) not in self._counted:
                    self._counted.add(key)
                    total += job.length * self._step(job) + self._scoring(job)
        return total

    def _step(self, job: Job) -> float:
        if job.kind not in self._steps:
            self._steps[job.kind] = self._time(job) / min(PROBED, job.length)
        return self._steps[job.kind]

    def _scoring(self, job: Job) -> float:
        """As often as a run has levels, what a codec takes for all photographs."""
        if not (isinstance(job, Train) and job.scored):
            return 0.0
        return len(job.run.lambdas) * self._steps.get(ScoreCodec.kind, 1.0)

    def _time(self, job: Job) -> float:
        job.probe(self._engine.context)  # the first one reads images, and finds caches cold
        before = time.process_time()
        job.probe(self._engine.context)
        return time.process_time() - before
