"""Rows of the methods of gradient surgery."""

from __future__ import annotations

from moo_balance import PCD, AlignedMTL, CAGrad, GradVac, PCGrad
from tests.support.method import NAN, Facts, Method, Names, preference, refused, unfit


def first(names: Names) -> str:
    """The primary loss, the same in every order of the losses."""
    return min(names)


METHODS = [
    Method(
        "PCGrad",
        lambda names: PCGrad(),
        kind="gramian",
        total=None,
        equivariant=False,
    ),
    Method(
        "PCGrad-preference",
        lambda names: PCGrad(reduction="mean", preference=preference(names)),
        kind="gramian",
        total=None,
        equivariant=False,
    ),
    Method(
        "GradVac",
        lambda names: GradVac(),
        kind="gramian",
        total=None,
        equivariant=False,
        host_reads=3,
    ),
    Method(
        "GradVac-every",
        lambda names: GradVac(beta=0.5, every=2),
        kind="gramian-every",
        total=None,
        equivariant=False,
        host_reads=3,
    ),
    Method("AlignedMTL", lambda names: AlignedMTL(), kind="gramian", total=None, negative=True),
    Method(
        "AlignedMTL-median",
        lambda names: AlignedMTL("median", "mean", preference(names)),
        kind="gramian",
        total=None,
        negative=True,
    ),
    Method(
        "CAGrad",
        lambda names: CAGrad(),
        kind="gramian",
        total=None,
        alone=lambda loss: 1.4,
    ),
    Method(
        "CAGrad-wide",
        lambda names: CAGrad(1.5, "1+c^2", "sum", preference(names)),
        kind="gramian",
        total=None,
        alone=lambda loss: 2.5 / 3.25,
        never_rises=True,
    ),
    Method("PCD", lambda names: PCD(first(names)), kind="gramian", total=None, host_reads=5),
    Method(
        "PCD-cone",
        lambda names: PCD(first(names), tau=0.0, beta=0.5),
        kind="gramian",
        total=None,
        never_rises=True,
        host_reads=5,
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(PCGrad, reduction="median"),
    refused(PCGrad, preference={"a": 0.0}),
    refused(PCGrad, seed=-1),
    refused(PCGrad, every=0),
    unfit(PCGrad, preference={"a": 1.0}),
    refused(GradVac, beta=1.0),
    refused(GradVac, beta=NAN),
    refused(GradVac, reduction=None),
    refused(GradVac, preference=1.0),
    refused(GradVac, seed=0.5),
    refused(GradVac, every=1.5),
    unfit(GradVac, preference={"a": 1.0, "b": 1.0, "d": 1.0}),
    refused(AlignedMTL, scale="max"),
    refused(AlignedMTL, reduction="none"),
    refused(AlignedMTL, preference={"a": -1.0}),
    refused(AlignedMTL, every=0),
    unfit(AlignedMTL, preference={"d": 1.0}),
    refused(CAGrad, c=-0.1),
    refused(CAGrad, c=NAN),
    refused(CAGrad, rescale="c"),
    refused(CAGrad, reduction="max"),
    refused(CAGrad, preference={"a": NAN}),
    refused(CAGrad, every=0),
    unfit(CAGrad, preference={"a": 1.0}),
    refused(PCD, primary=""),
    refused(PCD, primary=0),
    refused(PCD, primary="a", tau=-0.1),
    refused(PCD, primary="a", tau={"b": NAN}),
    refused(PCD, primary="a", beta=1.0),
    refused(PCD, primary="a", every=0),
    unfit(PCD, primary="d"),
    unfit(PCD, primary="a", tau={"a": 0.1}),
]

FACTS: dict[str, Facts] = {
    "PCGrad": Facts(
        equalizes="removes from each gradient its components against the others",
        relation="the first step of GradVac",
        total="K or more",
    ),
    "GradVac": Facts(
        equalizes="cosines of gradients, raised to their moving averages",
        relation="PCGrad where the targets are 0",
        total="K or more",
    ),
    "CAGrad": Facts(
        equalizes="maximizes the worst improvement, near the mean gradient",
        relation="the mean for c = 0; the direction of MGDA for a large c",
    ),
    "PCD": Facts(
        equalizes="follows one loss, and grants the others a share of their progress",
        relation="a projection onto the dual cone for tau = 0",
    ),
    "AlignedMTL": Facts(
        equalizes="lengths of the principal components of the gradients",
        relation="a plain sum where gradients are orthogonal and equally long",
    ),
}
