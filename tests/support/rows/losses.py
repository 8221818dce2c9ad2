"""Rows of the methods that look at losses only."""

from __future__ import annotations

from moo_balance import (
    COSMOS,
    DWA,
    IMTLL,
    PBI,
    GeometricMean,
    ReLoBRaLo,
    SoftAdapt,
    UncertaintyWeighting,
)
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Method,
    count,
    ideal,
    low,
    positive,
    preference,
    refused,
    unfit,
)

# The windows are short, so that the runs of the tests have several.
METHODS = [
    Method(
        "UncertaintyWeighting",
        lambda names: UncertaintyWeighting(),
        kind="known",
        bounds=positive,
        total=None,
        alone=lambda loss: 0.5,
    ),
    Method(
        "UncertaintyWeighting-first",
        lambda names: UncertaintyWeighting(
            lr=0.1,
            initial="first",
            classification=[name for name in names if name == "b"],
            preference=preference(names),
        ),
        bounds=positive,
        total=None,
        alone=lambda loss: 0.5 / loss,
        scaling="inverse",
    ),
    Method(
        "UncertaintyWeighting-bounds",
        lambda names: UncertaintyWeighting(initial=-0.5, bounds=low(names)),
        kind="known",
        bounds=lambda names: [*low(names).values()],
        total=None,
        alone=lambda loss: 0.5 * 2.718281828459045**0.5,
    ),
    Method("IMTLL", lambda names: IMTLL(), kind="known", bounds=positive, total=None),
    Method(
        "IMTLL-first",
        lambda names: IMTLL(lr=0.1, initial="first"),
        bounds=positive,
        total=None,
        alone=lambda loss: 1 / loss,
        scaling="inverse",
    ),
    Method(
        "DWA",
        lambda names: DWA(window=2),
        kind="known",
        bounds=positive,
        total=count,
        scaling="unchanged",
    ),
    Method(
        "DWA-window",
        lambda names: DWA(window=1, temperature=0.5, preference=preference(names)),
        kind="known",
        bounds=positive,
        total=count,
        scaling="unchanged",
    ),
    Method("SoftAdapt", lambda names: SoftAdapt(window=2), kind="known"),
    Method(
        "SoftAdapt-variants",
        lambda names: SoftAdapt(1, 0.5, True, True, preference=preference(names)),
        kind="known",
        bounds=positive,
    ),
    Method(
        "ReLoBRaLo", lambda names: ReLoBRaLo(), bounds=positive, total=count, scaling="unchanged"
    ),
    Method(
        "ReLoBRaLo-lookback",
        lambda names: ReLoBRaLo(0.5, 1.0, 0.5, preference=preference(names), seed=3),
        bounds=positive,
        total=count,
        scaling="unchanged",
    ),
    Method(
        "GeometricMean",
        lambda names: GeometricMean(),
        bounds=positive,
        total=None,
        scaling="direction",
    ),
    Method(
        "GeometricMean-preference",
        lambda names: GeometricMean(preference=preference(names)),
        bounds=positive,
        total=None,
        scaling="direction",
    ),
    Method("PBI", lambda names: PBI(), total=None, negative=True),
    Method(
        "PBI-preference",
        lambda names: PBI(0.5, preference=preference(names), ideal=ideal(names)),
        total=None,
        negative=True,
    ),
    Method("COSMOS", lambda names: COSMOS(), total=None, negative=True),
    Method(
        "COSMOS-preference",
        lambda names: COSMOS(8.0, preference=preference(names)),
        total=None,
        negative=True,
    ),
]

classes = (UncertaintyWeighting, IMTLL, DWA, SoftAdapt, ReLoBRaLo, GeometricMean, PBI, COSMOS)
learned = (UncertaintyWeighting, IMTLL)
windowed = (DWA, SoftAdapt)

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    *(
        refusal
        for cls in classes
        for refusal in (
            refused(cls, preference={"a": 0.0, "b": 1.0}),
            unfit(cls, preference={"a": 1.0}),
            unfit(cls, preference={"a": 1.0, "b": 1.0, "d": 1.0}),
        )
    ),
    *(
        refused(cls, **{argument: value})
        for cls in learned
        for argument, value in (
            ("lr", 0.0),
            ("lr", INF),
            ("initial", "last"),
            ("initial", NAN),
            ("bounds", -INF),
        )
    ),
    *(unfit(cls, bounds={"d": 0.0}) for cls in learned),
    refused(UncertaintyWeighting, classification="ab"),
    refused(UncertaintyWeighting, classification=[1]),
    unfit(UncertaintyWeighting, classification=["d"]),
    *(
        refused(cls, **{argument: value})
        for cls in windowed
        for argument, value in (("window", 0), ("window", 2.5), ("temperature", 0.0))
    ),
    *(
        refused(ReLoBRaLo, **{argument: value})
        for argument, value in (
            ("beta", 1.0),
            ("beta", -0.1),
            ("temperature", 0.0),
            ("lookback", 1.1),
            ("lookback", -0.1),
            ("seed", -1),
        )
    ),
    *(
        refused(cls, **{argument: value})
        for cls in (PBI, COSMOS)
        for argument, value in (("penalty", -1.0), ("penalty", INF))
    ),
    refused(PBI, ideal=NAN),
    unfit(PBI, ideal={"d": 0.0}),
]

FACTS = {
    "UncertaintyWeighting": Facts(
        "scaled losses, by learned variances",
        "half of raw SumLog, with a lag",
        total="Σ 1 / 2Lᵢ, once settled",
    ),
    "IMTLL": Facts(
        "scaled losses, by learned scales",
        "raw SumLog, with a lag; twice UncertaintyWeighting",
        total="Σ 1 / Lᵢ, once settled",
    ),
    "DWA": Facts("relative falls of window means, softly", "SoftAdapt on quotients"),
    "SoftAdapt": Facts("slopes of window means, softly", "DWA on differences"),
    "ReLoBRaLo": Facts(
        "relative falls since the last and the first step, softly",
        "without memory SoftAdapt with relative slopes",
    ),
    "GeometricMean": Facts(
        "minimizes the geometric mean",
        "direction of SumLog, in the unit of losses",
        total="the mean of GM / Lᵢ",
    ),
    "PBI": Facts(
        "losses over their wanted ratio, by a penalty",
        "minimized along the ray of Tchebycheff",
        total="nothing fixed; some may be negative",
    ),
    "COSMOS": Facts(
        "losses over their wanted ratio, by a cosine",
        "close to PBI",
        total="nothing fixed; some may be negative",
    ),
}
