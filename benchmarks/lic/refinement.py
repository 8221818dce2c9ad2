"""Latent refinement, SGA and SGA+: what it gains, and what matters for the gain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.lic.engine import Job, Result
from benchmarks.lic.jobs import Refine
from benchmarks.lic.roundings import THREE_CLASS, TWO_CLASS, StraightThrough, within
from examples.lic.losses import SOLUTIONS
from examples.lic.refinement import Refinement
from examples.lic.rounding import SGA_ANNEALING, SGA_PLUS_ANNEALING, Annealing, Gumbel, Rounding
from examples.lic.runs import Run

NONE, PLAIN, SGA_PLUS = "none", "straight-through", "SGA+"
CURVE, PROBABILITY, ONE_CODEC, BALANCED = "curve", "probability", "one codec", "balanced"


@dataclass(frozen=True)
class Case:
    """One way to refine, by the codec of one λ, for one λ."""

    group: str
    name: str
    how: Refinement
    trained: float
    lmbda: float


@dataclass(frozen=True)
class LatentRefinement:
    """Refine held-out photographs in many ways.

    Args:
        codec: The run of the lowest λ; each further codec continues the one before.
        lambdas: λ of the codecs, three at least for a curve.
        base: The one of them whose codec refines in many ways.
        others: λ for which that codec refines, besides those of `lambdas`.
        balanced: λ at which rate and distortion are balanced, not summed.
        maxima: Highest temperatures τ_max to try, besides 1.
        steps: Of a refinement.
        side: Of the middle of the photographs that is refined.
    """

    codec: Run
    lambdas: Sequence[float] = (0.0025, 0.0067, 0.018, 0.05)
    base: float = 0.0067
    others: Sequence[float] = (0.001,)
    balanced: Sequence[float] = (0.0067, 0.05)
    maxima: Sequence[float] = (0.2, 0.6)
    steps: int = 300
    side: int = 192

    def jobs(self) -> Iterable[Job]:
        return [self._job(case) for case in self.cases()]

    def read(self, result: Callable[[Job], Result]) -> dict[str, Any]:
        return {
            "kind": "refinement",
            "lambdas": list(self.lambdas),
            "base": self.base,
            "maxima": list(self.maxima),
            "training steps": self.codec.recipe.steps,
            "steps": self.steps,
            "side": self.side,
            "records": [
                {
                    "group": case.group,
                    "name": case.name,
                    "trained": case.trained,
                    "lambda": case.lmbda,
                    **result(self._job(case)),
                }
                for case in self.cases()
            ],
        }

    def _job(self, case: Case) -> Refine:
        return Refine(self._codec(case.trained), case.how, case.lmbda, self.side)

    def _codec(self, lmbda: float) -> Run:
        index = self.lambdas.index(lmbda)
        start = self._codec(self.lambdas[index - 1]) if index else None
        return replace(self.codec, lambdas=(lmbda,), start=start)

    def cases(self) -> Iterator[Case]:
        """All that is refined; equal jobs of two groups are done once."""
        best = Refinement(self._gumbel("SSL"), steps=self.steps)
        for lmbda in self.lambdas:
            yield Case(CURVE, NONE, replace(best, steps=0), lmbda, lmbda)
            yield Case(CURVE, PLAIN, replace(best, relaxation=StraightThrough()), lmbda, lmbda)
            yield Case(CURVE, SGA_PLUS, best, lmbda, lmbda)
        at_base = partial(Case, trained=self.base, lmbda=self.base)
        for name, how in self._probabilities(best).items():
            yield at_base(PROBABILITY, name, how)
        for name in TWO_CLASS:
            for maximum in (*self.maxima, 1.0):
                how = replace(best, relaxation=self._gumbel(name, maximum))
                yield at_base(f"τ_max {maximum:g}", name, how)
        for lmbda in sorted({*self.lambdas, *self.others}):
            yield Case(ONE_CODEC, SGA_PLUS, best, self.base, lmbda)
        for name, weighting in SOLUTIONS.items():
            for lmbda in self.balanced:
                how = replace(best, weighting=weighting)
                yield Case(BALANCED, name, how, self.base, lmbda)

    def _gumbel(self, name: str, maximum: float = 1.0) -> Gumbel:
        annealing = replace(within(SGA_PLUS_ANNEALING, self.steps), maximum=maximum)
        return Gumbel(TWO_CLASS[name], annealing)

    def _probabilities(self, best: Refinement) -> dict[str, Refinement]:
        """The probabilities, with the published temperatures in fewer steps, and cut off there."""
        shorter = within(SGA_PLUS_ANNEALING, self.steps)

        def sga_plus(rounding: Rounding, annealing: Annealing = shorter) -> Refinement:
            return replace(best, relaxation=Gumbel(rounding, annealing))

        sga = Gumbel(TWO_CLASS["atanh"], within(SGA_ANNEALING, self.steps))
        return {
            "SGA: atanh, rounding y": replace(best, relaxation=sga, centered=False),
            **{name: sga_plus(rounding) for name, rounding in TWO_CLASS.items()},
            "SSL, rounding y": replace(best, centered=False),
            **{
                f"{name}, cut off": sga_plus(rounding, SGA_PLUS_ANNEALING)
                for name, rounding in TWO_CLASS.items()
            },
            **{f"{name}, three integers": sga_plus(r) for name, r in THREE_CLASS.items()},
        }
