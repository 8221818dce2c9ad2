"""Rows of the methods of bargaining and of equal projections."""

from __future__ import annotations

from moo_balance import IMTLG, ConFIG, DualProj, FairGrad, NashMTL, UPGrad
from moo_balance.weighting import Weighting
from tests.support.method import NAN, Facts, Kind, Method, preference, refused, unfit


def cone(id: str, weighting: type[Weighting], kind: Kind = "gramian", **arguments) -> Method:
    """A projection onto the dual cone."""
    return Method(id, lambda names: weighting(**arguments), kind=kind, total=None, never_rises=True)


def fair(id: str, weighting: type[Weighting], kind: Kind = "gramian", scaling=None) -> Method:
    """A division of improvements. A gradient that is the only one counts by its length."""
    every = {"every": 2} if kind == "gramian-every" else {}
    return Method(
        id,
        lambda names: weighting(**every),
        kind=kind,
        total=None,
        alone=None,
        never_rises=kind == "gramian",
        scaling=scaling,
    )


def projections(id: str, weighting: type[Weighting], preferring: bool = False) -> Method:
    return Method(
        id,
        lambda names: weighting(preference=preference(names) if preferring else None),
        kind="gramian",
        total=None,
        negative=True,
        scaling="direction",
        host_reads=3 if preferring else None,
    )


METHODS = [
    projections("ConFIG", ConFIG),
    projections("ConFIG-preference", ConFIG, preferring=True),
    projections("IMTLG", IMTLG),
    cone("UPGrad", UPGrad),
    cone("UPGrad-sum", UPGrad, reduction="sum"),
    cone("DualProj", DualProj),
    fair("NashMTL", NashMTL, scaling="inverse"),
    fair("NashMTL-every", NashMTL, kind="gramian-every", scaling="inverse"),
    fair("FairGrad", FairGrad),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(FairGrad, alpha=0.0),
    refused(FairGrad, alpha=NAN),
    refused(UPGrad, reduction="max"),
    refused(DualProj, reduction=None),
    *(
        refused(cls, **{argument: value})
        for cls in (ConFIG, IMTLG, UPGrad, DualProj, NashMTL, FairGrad)
        for argument, value in (
            ("every", 0),
            ("preference", {"a": 0.0}),
            ("preference", 1.0),
        )
    ),
    *(
        unfit(cls, preference={"a": 1.0})
        for cls in (ConFIG, IMTLG, UPGrad, DualProj, NashMTL, FairGrad)
    ),
]

FACTS = {
    "ConFIG": Facts(
        "projections of the direction on unit gradients",
        "the direction of `IMTLG`; for two losses that of `NashMTL`",
        total="1 or more where none is negative",
    ),
    "IMTLG": Facts(
        "projections of the direction on unit gradients",
        "the direction of `ConFIG`, shorter",
        total="1, or less",
    ),
    "UPGrad": Facts(
        "minimizes the change of each gradient that takes it out of conflict",
        "the mean where there is no conflict; for two losses the direction of `PCGrad`",
        total="1 or more",
    ),
    "DualProj": Facts(
        "minimizes the change of the mean that takes it out of conflict",
        "the mean where there is no conflict",
        total="1 or more",
    ),
    "NashMTL": Facts(
        "each loss's part of the squared length of the direction, which is K",
        "`FairGrad(alpha=1)`; for two losses the direction of `ConFIG`",
    ),
    "FairGrad": Facts(
        "alpha-fair improvements",
        "`NashMTL` at alpha = 1; the direction of `DualProj` towards 0, of `MGDA` towards infinity",
    ),
}
