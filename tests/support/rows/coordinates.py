"""Rows of the methods that look at coordinates of gradients."""

from __future__ import annotations

from moo_balance import DBMTL, ExcessMTL, GradDrop, MoCo, SeparateMoments, TrimmedMean
from tests.support.method import (
    INF,
    NAN,
    Facts,
    Method,
    count,
    positive,
    preference,
    refused,
    unfit,
)

METHODS = [
    Method("MoCo", lambda names: MoCo(lr=0.01), kind="gramian"),
    Method(
        "MoCo-loss",
        lambda names: MoCo(0.9, 0.2, 0.1, "loss", preference=preference(names)),
        kind="gramian",
        bounds=positive,
    ),
    Method(
        "DBMTL",
        lambda names: DBMTL(),
        kind="gramian",
        bounds=positive,
        total=None,
        scaling="unchanged",
    ),
    Method(
        "DBMTL-debiased",
        lambda names: DBMTL(debiased=True, preference=preference(names)),
        kind="gramian",
        bounds=positive,
        total=None,
        scaling="unchanged",
        alone=lambda loss: 10.0,
    ),
    Method(
        "DBMTL-gradients",
        lambda names: DBMTL(beta=0.0),
        kind="gramian",
        bounds=positive,
        total=None,
        scaling="inverse",
        alone=lambda loss: 1 / loss,
    ),
    Method("ExcessMTL", lambda names: ExcessMTL(lr=0.5), kind="gramian", scaling="unchanged"),
    Method(
        "ExcessMTL-every",
        lambda names: ExcessMTL(1.0, 2, "sum", preference=preference(names), every=2),
        kind="gramian-every",
        total=count,
        scaling="unchanged",
    ),
    Method("GradDrop", lambda names: GradDrop(), kind="gramian", total=count, scaling="unchanged"),
    Method(
        "GradDrop-leak",
        lambda names: GradDrop(0.3, preference=preference(names), seed=5),
        kind="gramian",
        total=count,
        scaling="unchanged",
    ),
    Method(
        "TrimmedMean",
        lambda names: TrimmedMean(),
        kind="gramian",
        total=count,
        scaling="unchanged",
    ),
    Method(
        "SeparateMoments",
        lambda names: SeparateMoments(),
        kind="gramian",
        scaling="unchanged",
        host_reads=7,  # the mask of satisfied losses, and those of the wrapped optimizer
    ),
    Method(
        "SeparateMoments-preference",
        lambda names: SeparateMoments(preference=preference(names)),
        kind="gramian",
        scaling="unchanged",
        host_reads=7,  # the mask of satisfied losses, and those of the wrapped optimizer
    ),
]

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS = [
    refused(MoCo, beta=1.0),
    refused(MoCo, lr=0.0),
    refused(MoCo, rho=-0.1),
    refused(MoCo, length="l2"),
    refused(MoCo, preference={"a": 0.0}),
    unfit(MoCo, preference={"a": 1.0}),
    refused(DBMTL, beta=-0.1),
    refused(DBMTL, shift=NAN),
    refused(DBMTL, preference=1.0),
    unfit(DBMTL, preference={"a": 1.0}),
    unfit(DBMTL, shift={"d": 1.0}),
    refused(ExcessMTL, lr=INF),
    refused(ExcessMTL, warmup_steps=0),
    refused(ExcessMTL, reduction="max"),
    refused(ExcessMTL, preference={"a": -1.0}),
    refused(ExcessMTL, every=0),
    unfit(ExcessMTL, preference={"a": 1.0}),
    refused(GradDrop, leak=1.1),
    refused(GradDrop, leak=-0.1),
    refused(GradDrop, preference={"a": INF}),
    refused(GradDrop, seed=-1),
    unfit(GradDrop, preference={"b": 1.0}),
    refused(TrimmedMean, trim=-1),
    refused(TrimmedMean, trim=0.5),
    refused(SeparateMoments, preference={"a": 0.0}),
    unfit(SeparateMoments, preference={"a": 1.0}),
]

FACTS: dict[str, Facts] = {
    "MoCo": Facts("improvement of the losses, with gradients averaged over steps", "`MGDA` slowly"),
    "DBMTL": Facts(
        "lengths of averaged log gradients", "`GradientNorms` on log losses", units="no"
    ),
    "ExcessMTL": Facts("minimizes the largest excess risk", "as `OnlineTchebycheff`, on risks"),
    "GradDrop": Facts("signs within each coordinate", "`Sum` where no signs conflict"),
    "SeparateMoments": Facts(
        "sizes of the optimizer's steps",
        "`Sum` with one loss",
        cost="one backward pass and one optimizer step per loss",
    ),
    "TrimmedMean": Facts(
        "minimizes the pull of extreme gradients",
        "a median for `trim` large; `Sum` / K for `trim=0`",
        total="1: it is a mean",
    ),
}
