"""The runs of the comparison: which there are, which are done, and the processes for the rest.

Results lie in one JSON file per problem. They are keyed by the versions of the library and of
PyTorch, and by the source of the problem and of the training loop: where one differs, the runs of
that problem start afresh. What an arm does is not in the key: after a change of `arms.py` or
`candidates.py`, remove its runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import moo_balance
from benchmarks.settings import Settings, environment
from benchmarks.sources import dump_code
from benchmarks.worth import training
from benchmarks.worth.arms import NULL, SEARCH, every_arm
from benchmarks.worth.measure import Floats, Search
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.training import Outcome

RESULTS = Path(__file__).parent / "results"
SAVE_EVERY = 20.0  # seconds

NOISY = ("actor_critic", "constrained", "inverse", "wave")
"""Problems on which the seed decides so much that one pilot at each learning rate is too few."""

SEEDS_OF_PILOTS = (0, 101, 102)


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Args:
        trials: Trials of the search for static weights, M.
        pilots: Of these, those that are run at each learning rate, to choose it.
        seeds: Runs of each method at the learning rate that its pilots have chosen.
        null_seeds: Runs of the null method, whose worth has to be known better than another's.
        steps: Steps of each run; None for those of the problem.
        problems: Names of the problems.
        arms: Names of the methods.
    """

    trials: int = 48
    pilots: int = 12
    seeds: int = 8
    null_seeds: int = 48
    steps: int | None = None
    problems: tuple[str, ...] = tuple(PROBLEMS)
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(every_arm()))


class Job(NamedTuple):
    """One training."""

    problem: str
    arm: str
    lr: float
    seed: int
    steps: int | None


class Store:
    """The outcomes of all runs of a problem, in a file."""

    def __init__(self, problem: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{problem}.json"
        self.key = {
            "library": moo_balance.__version__,
            "torch": torch.__version__.split("+")[0],
            "source": _digest(problem),
        }
        self.runs: dict[str, dict[str, list[Any]]] = {}
        self.environment: dict[str, object] = {}
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            if saved["key"] == self.key:
                self.runs, self.environment = saved["runs"], saved["environment"]

    @staticmethod
    def _setting(job: Job) -> str:
        steps = "" if job.steps is None else f" | {job.steps} steps"
        return f"{job.arm} | {job.lr:g}{steps}"

    def __contains__(self, job: Job) -> bool:
        return str(job.seed) in self.runs.get(self._setting(job), {})

    def __getitem__(self, job: Job) -> Outcome:
        validation, test, *rest = self.runs[self._setting(job)][str(job.seed)]
        return Outcome(float(validation), float(test), *rest)

    def add(self, job: Job, outcome: Outcome) -> None:
        scores = [float(f"{score:.6g}") for score in outcome[:3]]
        # JSON has no infinity.
        entry: list[Any] = [score if abs(score) < 1e300 else "inf" for score in scores]
        if outcome.error:
            entry.append(outcome.error[:160])
        self.runs.setdefault(self._setting(job), {})[str(job.seed)] = entry
        self.environment = _environment()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(
            f"{json.dumps(setting)}: {json.dumps(dict(sorted(self.runs[setting].items())))}"
            for setting in sorted(self.runs)
        )
        head = f'"key": {json.dumps(self.key)},\n"environment": {json.dumps(self.environment)}'
        temporary = self.path.with_suffix(".part")
        temporary.write_text(f'{{{head},\n"runs": {{\n{lines}\n}}}}\n')
        temporary.replace(self.path)


@functools.cache
def _environment() -> dict[str, object]:
    """The machine and versions of this process, read once."""
    return environment(Settings())


def _digest(problem: str) -> str:
    """Of the code that a run depends on, without docstrings and comments."""
    folder = Path(__file__).parent
    shared = sorted((folder / "problems").glob("_[a-z]*.py"))
    text = (folder / "problems" / f"{problem}.py").read_text()
    used = [path for path in shared if path.stem in text]
    digest = hashlib.sha256()
    for path in [folder / "problems" / f"{problem}.py", *used, Path(training.__file__)]:
        digest.update(dump_code(ast.parse(path.read_text())).encode())
    return digest.hexdigest()[:16]


class Comparison:
    """The runs of a plan, and what is known from them."""

    def __init__(self, plan: Plan, folder: Path = RESULTS) -> None:
        self.plan = plan
        self.stores = {name: Store(name, folder) for name in plan.problems}

    # ------------------------------------------------------------ which runs there are

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each method with each problem that it can be applied to: bounds need targets."""
        return [
            (arm, problem)
            for arm in self.plan.arms
            for problem in self.plan.problems
            if arm != "Lagrangian" or PROBLEMS[problem].targets
        ]

    def _job(self, problem: str, arm: str, lr: float, seed: int) -> Job:
        return Job(problem, arm, lr, seed, self.plan.steps)

    def search_pilots(self, problem: str, lr: float) -> list[Job]:
        """Trials at a learning rate, to choose it."""
        return [self._job(problem, SEARCH.name, lr, seed) for seed in range(self.plan.pilots)]

    def pilots(self, problem: str, arm: str, lr: float) -> list[Job]:
        """Runs at a learning rate, to choose it, with seeds that no counted run has."""
        if arm == NULL.name:
            return []  # the rate of the search
        arm = every_arm()[arm].rate_of or arm
        seeds = SEEDS_OF_PILOTS if problem in NOISY else SEEDS_OF_PILOTS[:1]
        return [self._job(problem, arm, lr, seed) for seed in seeds]

    def trials(self, problem: str) -> list[Job]:
        lr = self.search_rate(problem)
        return [self._job(problem, SEARCH.name, lr, seed) for seed in range(self.plan.trials)]

    def method_runs(self, problem: str, arm: str) -> list[Job]:
        lr = self.rate(problem, arm)
        seeds = self.plan.null_seeds if arm == NULL.name else self.plan.seeds
        return [self._job(problem, arm, lr, seed) for seed in range(1, 1 + seeds)]

    def stages(self) -> Iterator[list[Job]]:
        """Lists of jobs; each may depend on the outcomes of those before."""
        problems = self.plan.problems
        yield [
            job
            for problem in problems
            for lr in PROBLEMS[problem].rates
            for job in self.search_pilots(problem, lr)
        ]
        yield [job for problem in problems for job in self.trials(problem)]
        yield [
            job
            for arm, problem in self.pairs
            for lr in PROBLEMS[problem].rates
            for job in self.pilots(problem, arm, lr)
        ]
        runs = [self.method_runs(problem, arm) for arm, problem in self.pairs]
        yield [job for turn in zip_longest(*runs) for job in turn if job is not None]

    # ------------------------------------------------------------ what is known from them

    def search_rate(self, problem: str) -> float:
        """The learning rate at which a search of four trials is expected to rank best.

        Ranks are those among the pilots of all learning rates, by their validation scores.
        """
        rates = PROBLEMS[problem].rates
        scores = {lr: self._validation(self.search_pilots(problem, lr)) for lr in rates}
        pooled = np.concatenate(list(scores.values()))
        everything = Search(pooled, pooled)

        def expected_rank(lr: float) -> float:
            search = Search(scores[lr], scores[lr])
            return float(search.probabilities(np.array([4.0]))[0] @ everything.ranks(scores[lr]))

        return min(scores, key=expected_rank)

    def _validation(self, jobs: list[Job]) -> Floats:
        return np.array([outcome.validation for outcome in self.outcomes(jobs)], dtype=np.float64)

    def rate(self, problem: str, arm: str) -> float:
        """The learning rate whose pilots rank best among all pilots of the arm, on average."""
        if arm == NULL.name:
            return self.search_rate(problem)
        rates = PROBLEMS[problem].rates
        scores = {lr: self._validation(self.pilots(problem, arm, lr)) for lr in rates}
        pooled = np.concatenate(list(scores.values()))
        pilots = Search(pooled, pooled)
        # Of equal ones the middle, which suits the plain sum.
        return min((rates[1], rates[0], rates[2]), key=lambda lr: pilots.ranks(scores[lr]).mean())

    def outcomes(self, jobs: Iterable[Job]) -> list[Outcome]:
        """The outcomes of those that are done."""
        return [self.stores[job.problem][job] for job in jobs if self._is_done(job)]

    def search(self, problem: str) -> Search:
        outcomes = self.outcomes(self.trials(problem))
        columns = np.array([outcome[:2] for outcome in outcomes], dtype=np.float64)
        return Search(columns[:, 0], columns[:, 1])

    # ------------------------------------------------------------ running

    def run(self, workers: int, hours: float = 3.0) -> bool:
        """Run what is missing. False if the time was up before; the next call goes on."""
        deadline = time.monotonic() + 3600 * hours
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for stage in self.stages():
                    # Several arms may share a pilot.
                    missing = [job for job in dict.fromkeys(stage) if not self._is_done(job)]
                    if not self._run_all(pool, missing, deadline, 2 * workers):
                        return False
        finally:
            self.save()
        return True

    def _run_all(
        self, pool: ProcessPoolExecutor, jobs: list[Job], deadline: float, ahead: int
    ) -> bool:
        waiting, running = iter(jobs), {}
        done, saved = 0, time.monotonic()
        while True:
            while len(running) < ahead and time.monotonic() < deadline:
                job = next(waiting, None)
                if job is None:
                    break
                running[pool.submit(run, job)] = job
            if not running:
                return done == len(jobs)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                self.stores[job.problem].add(job, future.result())
                done += 1
            if time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                self.save()
                print(f"{done} of {len(jobs)} runs of this stage", flush=True)

    def _is_done(self, job: Job) -> bool:
        return job in self.stores[job.problem]

    def save(self) -> None:
        for store in self.stores.values():
            store.save()


def run(job: Job) -> Outcome:
    """Do one run, in this process, on one thread."""
    torch.set_num_threads(1)
    arm = SEARCH if job.arm == SEARCH.name else every_arm()[job.arm]
    return training.train(PROBLEMS[job.problem], arm, job.lr, job.seed, job.steps)
