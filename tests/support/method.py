"""What a method promises: one row of the registry, and configurations that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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
        alone: The coefficient of a loss that is the only one, from its value; None if it depends on
            something else.
        negative: Whether a coefficient may be negative.
        never_rises: Whether the direction conflicts with no gradient.
        equivariant: Whether permuting the losses permutes the weights.
        scaling: What happens to the coefficients when one loss is multiplied by s, in every step:
            "unchanged"; "inverse", that loss's is divided by s; "shares", that, and then all are
            divided by their sum; "direction", that, and then all are multiplied by some number.
            None if unstated.
        host_reads: How often a step reads the host on an accelerator at most, where that is more
            than once besides the mask of satisfied losses.
        independent: Whether it needs gradients of at least two batches in each step. Tests of
            single batches leave such rows out.
    """

    id: str
    make: Callable[[Names], Weighting]
    kind: Kind = "losses"
    bounds: Callable[[Names], list[float]] = unbounded
    total: Callable[[Names, Tensor], float] | None = one
    alone: Callable[[float], float] | None = lambda loss: 1.0
    negative: bool = False
    never_rises: bool = False
    equivariant: bool = True
    scaling: Literal["unchanged", "inverse", "shares", "direction"] | None = None
    host_reads: int | None = None
    independent: bool = False

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


@dataclass(frozen=True)
class Facts:
    """What the table of methods in the manual says of a class, apart from what its rows promise.

    Args:
        equalizes: What the method makes equal, or minimizes.
        relation: Its relation to other methods; empty if there is none to tell.
        total: What the coefficients sum to, where the row cannot say it.
        units: Whether units of a loss matter, likewise.
        rises: Whether a loss may rise, likewise.
        cost: What it costs beyond a plain step, where the kind of the row cannot say it.
    """

    equalizes: str
    relation: str = ""
    total: str | None = None
    units: str | None = None
    rises: str | None = None
    cost: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A configuration that is refused: at construction, or once the names of the losses are known.

    `argument` is what the message must point at.
    """

    make: Callable[[], Weighting]
    argument: str
    with_names: bool = False


def refused(cls: type[Weighting], **arguments: object) -> Refusal:
    return Refusal(lambda: cls(**arguments), next(reversed(arguments)))


def unfit(cls: type[Weighting], **arguments: object) -> Refusal:
    return Refusal(lambda: cls(**arguments), next(reversed(arguments)), with_names=True)


NAN, INF = math.nan, math.inf

# The argument at fault comes last. `_unfit` ones are shown the names "a" and "b".


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
