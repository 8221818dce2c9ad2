"""All methods: their kinds, what each of them promises, and what they refuse.

``METHODS`` is the only list of methods in the tests: a new row inherits every test. Mathematics is
tested over all rows, by ``over_methods`` and ``over``. What can only differ by the *kind* of a
method (windows, loss scalers, checkpoints, ranks ...) is tested over ``KINDS``, one row of each
kind, by ``over_kinds``. ``REFUSALS`` are configurations that are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from torch import Tensor

from examples.own_methods import EqualLengths, SlowestFirst
from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedTrajectory,
    FixedWeights,
    MovingAverage,
    OnlineTchebycheff,
    RandomWeights,
    SmoothTchebycheff,
    Sum,
    SumLog,
    Tchebycheff,
)
from moo_balance.weighting import Weighting

Names = Sequence[str]

NAMES = ("a", "b", "c")


def by_name(*values: float) -> Callable[[Names], dict[str, float]]:
    """A named argument: the first value for loss "a", the second for "b", and so on."""
    return lambda names: {name: values[NAMES.index(name)] for name in names}


def same_for_all(value: float) -> Callable[[Names], list[float]]:
    return lambda names: [value] * len(names)


unbounded = same_for_all(-math.inf)
positive = same_for_all(0.0)
above_minus_one = same_for_all(-1.0)


def count(names: Names, losses: Tensor) -> float:
    return float(len(names))


def one(names: Names, losses: Tensor) -> float:
    return 1.0


def average(names: Names, losses: Tensor) -> float:
    return 1.0 / len(names)


Kind = Literal["known", "losses", "lagged", "observing", "gramian", "gramian-every"]
"""What a step asks for before its coefficients are known:

* ``known``: nothing of the same step; the coefficients are known before its losses;
* ``losses``: the losses;
* ``lagged``: the losses, with which those of the step before are compared, too;
* ``observing``: the losses, and once the step is taken the losses of the same batch again;
* ``gramian``: inner products of gradients;
* ``gramian-every``: those of each n-th step only.
"""


@dataclass(frozen=True)
class Method:
    """A configuration and its promises.

    Args:
        id: Name of the row.
        make: Builds the weighting for losses of these names.
        kind: What a step of it asks for.
        bounds: What each loss must stay above.
        total: What the coefficients sum to, from names and losses; None if unstated.
        alone: The coefficient of a loss that is the only one, from its value.
        negative: Whether a coefficient may be negative.
        equivariant: Whether permuting the losses permutes the weights.
        scaling: What happens to the coefficients when one loss is multiplied by s, in every step:
            "unchanged"; "inverse", that loss's is divided by s; "shares", that, and then all are
            divided by their sum. None if unstated.
    """

    id: str
    make: Callable[[Names], Weighting]
    kind: Kind = "losses"
    bounds: Callable[[Names], list[float]] = unbounded
    total: Callable[[Names, Tensor], float] | None = one
    alone: Callable[[float], float] = lambda loss: 1.0
    negative: bool = False
    equivariant: bool = True
    scaling: Literal["unchanged", "inverse", "shares"] | None = None

    def __repr__(self) -> str:
        return self.id

    @property
    def gramian(self) -> bool:
        """Whether it needs inner products of gradients."""
        return self.kind in ("gramian", "gramian-every")

    @property
    def observes(self) -> bool:
        """Whether it needs the losses after a step."""
        return self.kind == "observing"


fixed = by_name(1.0, 0.5, 3.0)
adversarial = by_name(1.0, -0.5, 3.0)
low = by_name(-0.5, 0.0, -0.25)
ideal = by_name(-0.1, -0.2, -0.4)
nadir = by_name(2.0, 3.0, 1.0)
preference = by_name(1.0, 2.0, 4.0)


def low_bounds(names: Names) -> list[float]:
    return list(low(names).values())


def low_bounds_shifted(names: Names) -> list[float]:
    return [value - 0.5 for value in low_bounds(names)]


def famo(id: str, kind: Kind = "observing", **arguments: object) -> Method:
    """FAMO without bounds: equal relative improvement, whatever the units of the losses."""
    return Method(
        f"FAMO-{id}",
        lambda names: FAMO(**arguments),
        kind=kind,
        bounds=positive,
        scaling="shares",
    )


def trajectory(id: str, kind: Kind = "observing", **arguments: object) -> Method:
    return Method(
        f"BalancedTrajectory-{id}",
        lambda names: BalancedTrajectory(**arguments),
        kind=kind,
        bounds=above_minus_one,
    )


def mgda(
    id: str, kind: Kind = "gramian", bounds=unbounded, scaling=None, **arguments: object
) -> Method:
    return Method(
        f"MGDA-{id}", lambda names: MGDA(**arguments), kind=kind, bounds=bounds, scaling=scaling
    )


METHODS = [
    Method("Sum", lambda names: Sum(), kind="known", total=count, scaling="unchanged"),
    Method(
        "FixedWeights",
        lambda names: FixedWeights(fixed(names)),
        kind="known",
        total=lambda names, losses: sum(fixed(names).values()),
        scaling="unchanged",
    ),
    Method(
        "FixedWeights-adversarial",
        lambda names: FixedWeights(adversarial(names)),
        kind="known",
        total=lambda names, losses: sum(adversarial(names).values()),
        negative=True,
        scaling="unchanged",
    ),
    Method("SumLog", lambda names: SumLog(), bounds=positive, scaling="shares"),
    Method(
        "SumLog-shift",
        lambda names: SumLog(shift=1.0),
        bounds=above_minus_one,
    ),
    Method(
        "SumLog-bounds",
        lambda names: SumLog(bounds=low(names), shift=0.5),
        bounds=low_bounds_shifted,
    ),
    Method(
        "SumLog-raw",
        lambda names: SumLog(renormalize=False),
        bounds=positive,
        total=lambda names, losses: float((1 / losses).sum()),
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "RandomWeights",
        lambda names: RandomWeights(seed=3),
        kind="known",
        equivariant=False,
        scaling="unchanged",
    ),
    famo("adam"),
    famo("sgd", logit_optimizer="sgd", lr=2.0),
    famo("no-decay", decay=0.0),
    famo("lagged", kind="lagged", lagged=True),
    famo("lagged-sgd", kind="lagged", lagged=True, logit_optimizer="sgd"),
    famo("every", every=3),
    famo("lagged-every", kind="lagged", lagged=True, every=2),
    Method(
        "FAMO-bounds",
        lambda names: FAMO(bounds=low(names), shift=0.5),
        kind="observing",
        bounds=low_bounds_shifted,
    ),
    trajectory("defaults"),
    trajectory("paper", logit_optimizer="sgd"),
    trajectory("code", decay=3e-3),
    trajectory("lagged", kind="lagged", lagged=True),
    trajectory("every", every=2),
    Method(
        "BalancedTrajectory-no-shift",
        lambda names: BalancedTrajectory(shift=0.0),
        kind="observing",
        bounds=positive,
        scaling="shares",
    ),
    Method("AnalyticQP", lambda names: AnalyticQP(), kind="gramian", bounds=above_minus_one),
    Method(
        "AnalyticQP-simplex",
        lambda names: AnalyticQP(projection="simplex"),
        kind="gramian",
        bounds=above_minus_one,
    ),
    Method(
        "AnalyticQP-exact",
        lambda names: AnalyticQP(projection="exact"),
        kind="gramian",
        bounds=above_minus_one,
    ),
    Method(
        "AnalyticQP-no-shift",
        lambda names: AnalyticQP(shift=0.0),
        kind="gramian",
        bounds=positive,
        scaling="shares",
    ),
    Method(
        "AnalyticQP-raw",
        lambda names: AnalyticQP(projection="simplex", shift=0.0, renormalize=False),
        kind="gramian",
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "AnalyticQP-every",
        lambda names: AnalyticQP(every=3),
        kind="gramian-every",
        bounds=above_minus_one,
    ),
    mgda("none"),
    mgda("l2", normalize="l2", scaling="unchanged"),
    mgda("loss", normalize="loss", bounds=positive, scaling="unchanged"),
    mgda("loss+", normalize="loss+", bounds=positive),
    mgda("log", normalize="log", bounds=positive, scaling="shares"),
    mgda("every", kind="gramian-every", every=3),
    mgda(
        "log-every",
        kind="gramian-every",
        normalize="log",
        every=2,
        bounds=positive,
        scaling="shares",
    ),
    Method("Tchebycheff", lambda names: Tchebycheff(), total=average),
    Method(
        "Tchebycheff-augmented",
        lambda names: Tchebycheff(augment=0.1),
        total=lambda names, losses: 1 / len(names) + 0.1,
        alone=lambda loss: 1.1,
    ),
    Method("Tchebycheff-running", lambda names: Tchebycheff(ideal="running"), total=average),
    Method(
        "Tchebycheff-preference",
        lambda names: Tchebycheff(preference=preference(names), ideal=ideal(names), augment=0.1),
        total=None,
        alone=lambda loss: 1.1,
    ),
    Method("SmoothTchebycheff", lambda names: SmoothTchebycheff(), total=None),
    Method(
        "SmoothTchebycheff-preference",
        lambda names: SmoothTchebycheff(
            mu=1.0, preference=preference(names), ideal=ideal(names), nadir=nadir(names)
        ),
        total=None,
        alone=lambda loss: 1 / 2.1,
    ),
    Method(
        "SmoothTchebycheff-log",
        lambda names: SmoothTchebycheff(mu=1.0, log=True),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
    ),
    Method(
        "SmoothTchebycheff-warm-up",
        lambda names: SmoothTchebycheff(warmup_steps=2),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "SmoothTchebycheff-log-warm-up",
        lambda names: SmoothTchebycheff(log=True, warmup_steps=2),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method("OnlineTchebycheff", lambda names: OnlineTchebycheff(), kind="known", total=average),
    Method(
        "OnlineTchebycheff-projected",
        lambda names: OnlineTchebycheff(lr=1.0, update="projected"),
        kind="known",
        total=average,
    ),
    Method(
        "OnlineTchebycheff-preference",
        lambda names: OnlineTchebycheff(preference=preference(names)),
        kind="known",
        total=None,
    ),
    Method("MovingAverage-MGDA", lambda names: MovingAverage(MGDA()), kind="gramian"),
    Method(
        "MovingAverage-adaptive",
        lambda names: MovingAverage(MGDA(normalize="l2"), beta="adaptive"),
        kind="gramian",
        scaling="unchanged",
    ),
    Method(
        "MovingAverage-every",
        lambda names: MovingAverage(AnalyticQP(every=3), beta=0.5),
        kind="gramian-every",
        bounds=above_minus_one,
    ),
    Method(
        "MovingAverage-FAMO", lambda names: MovingAverage(FAMO()), kind="observing", bounds=positive
    ),
    Method(
        "MovingAverage-adversarial",
        lambda names: MovingAverage(FixedWeights(adversarial(names))),
        kind="known",
        total=lambda names, losses: sum(adversarial(names).values()),
        negative=True,
        scaling="unchanged",
    ),
]


OWN_METHODS = [
    Method(
        "SlowestFirst", lambda names: SlowestFirst(power=2.0), bounds=positive, scaling="unchanged"
    ),
    Method("EqualLengths", lambda names: EqualLengths(), kind="gramian", scaling="shares"),
    Method(
        "EqualLengths-every",
        lambda names: EqualLengths(beta=0.5, every=2),
        kind="gramian-every",
        scaling="shares",
    ),
]
"""The methods that the manual shows how to write, which are not in the package."""


def over(rows: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """Run a test for the rows that fit, those of the manual's methods included."""
    fitting = list(filter(rows, [*METHODS, *OWN_METHODS]))
    return pytest.mark.parametrize("method", fitting, ids=repr)


def over_some(*ids: str) -> pytest.MarkDecorator:
    """Run a test for the rows with these ids."""
    chosen = {method.id: method for method in METHODS}
    return pytest.mark.parametrize("method", [chosen[id] for id in ids], ids=repr)


over_methods = over(lambda method: True)

_REPRESENTATIVES: dict[Kind, str] = {
    "known": "FixedWeights",
    "losses": "SumLog",
    "lagged": "FAMO-lagged",
    "observing": "FAMO-adam",
    "gramian": "AnalyticQP",
    "gramian-every": "MGDA-every",
}
KINDS = [next(row for row in METHODS if row.id == id) for id in _REPRESENTATIVES.values()]
"""One row of each kind."""

over_kinds = over(lambda method: method in KINDS)


def _first_of_each() -> list[Method]:
    """The first row of each method in each of its kinds."""
    first: dict[tuple[str, Kind], Method] = {}
    for row in METHODS:
        first.setdefault((row.id.split("-")[0], row.kind), row)
    return list(first.values())


FIRST_OF_EACH = _first_of_each()

over_each_method = over(lambda method: method in FIRST_OF_EACH)
"""For what may depend on the method but not on its hyper-parameters."""


@dataclass(frozen=True)
class Refusal:
    """A configuration that is refused: at construction, or once the names of the losses are known.

    `argument` is what the message must point at.
    """

    make: Callable[[], Weighting]
    argument: str
    with_names: bool = False


def _refused(cls: type[Weighting], **arguments: object) -> Refusal:
    return Refusal(lambda: cls(**arguments), next(reversed(arguments)))


def _unfit(cls: type[Weighting], **arguments: object) -> Refusal:
    return Refusal(lambda: cls(**arguments), next(reversed(arguments)), with_names=True)


NAN, INF = math.nan, math.inf

# The argument at fault comes last. `_unfit` ones are shown the names "a" and "b".
REFUSALS = [
    _refused(FixedWeights, values={"a": NAN}),
    _refused(FixedWeights, values={"a": "1"}),
    _unfit(FixedWeights, values={"a": 1.0}),
    _unfit(FixedWeights, values={"a": 1.0, "b": 1.0, "d": 1.0}),
    _refused(SumLog, bounds=INF),
    _refused(SumLog, shift={"a": NAN}),
    _unfit(SumLog, bounds={"d": 1.0}),
    _unfit(SumLog, shift={"d": 1.0}),
    _refused(RandomWeights, seed=-1),
    _refused(RandomWeights, seed=0.5),
    *(
        _refused(cls, **{argument: value})
        for cls in (FAMO, BalancedTrajectory)
        for argument, value in (
            ("lr", 0.0),
            ("lr", INF),
            ("lr", "fast"),
            ("decay", -1e-3),
            ("decay", NAN),
            ("shift", NAN),
            ("logit_optimizer", "rmsprop"),
            ("every", 0),
            ("every", 1.5),
        )
    ),
    _refused(FAMO, bounds=-INF),
    _refused(FAMO, bounds={"a": None}),
    _unfit(FAMO, bounds={"d": 0.0}),
    _unfit(FAMO, shift={"d": 0.0}),
    _refused(BalancedTrajectory, shift=-1.0),
    _refused(AnalyticQP, projection="cone"),
    _refused(AnalyticQP, shift=-1.0),
    _refused(AnalyticQP, every=0),
    _refused(MGDA, normalize="rms"),
    _refused(MGDA, every=0),
    *(
        refusal
        for cls in (Tchebycheff, SmoothTchebycheff, OnlineTchebycheff)
        for refusal in (
            _refused(cls, preference={"a": 0.0, "b": 1.0}),
            _refused(cls, preference={"a": -1.0}),
            _unfit(cls, preference={"a": 1.0}),
            _unfit(cls, preference={"a": 1.0, "b": 1.0, "d": 1.0}),
        )
    ),
    _refused(Tchebycheff, ideal="walking"),
    _refused(Tchebycheff, ideal={"a": NAN}),
    _refused(Tchebycheff, augment=-0.1),
    _unfit(Tchebycheff, ideal={"d": 0.0}),
    _refused(SmoothTchebycheff, mu=0.0),
    _refused(SmoothTchebycheff, ideal=INF),
    _refused(SmoothTchebycheff, nadir=NAN),
    _refused(SmoothTchebycheff, ideal=1.0, nadir=0.5),
    _refused(SmoothTchebycheff, ideal={"b": 2.0}, nadir=1.0),
    _refused(SmoothTchebycheff, nadir={"a": 0.0}),
    _refused(SmoothTchebycheff, warmup_steps=-1),
    _refused(SmoothTchebycheff, warmup_steps=1.5),
    _refused(SmoothTchebycheff, nadir=1.0, warmup_steps=2),
    _unfit(SmoothTchebycheff, ideal={"d": 0.0}),
    _unfit(SmoothTchebycheff, nadir={"a": 1.0}),
    _refused(OnlineTchebycheff, lr=0.0),
    _refused(OnlineTchebycheff, update="newton"),
    _refused(MovingAverage, weighting="MGDA"),
    _refused(MovingAverage, weighting=MGDA(), beta=1.0),
    _refused(MovingAverage, weighting=MGDA(), beta="fast"),
]
