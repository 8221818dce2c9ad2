"""Metrics written for TensorBoard, read back from its files."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from moo_balance.integrations.tensorboard import add_metrics
from tests.support.plain_runs import model_and_optimizer
from tests.support.registry import over_some

pytestmark = pytest.mark.capability("TensorBoard")


def read(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@over_some("AnalyticQP")
def test_one_chart_for_each_figure(method, tmp_path):
    model, optimizer = model_and_optimizer(method)
    written = []
    with SummaryWriter(tmp_path) as writer:
        for step in range(2):
            optimizer.step(lambda: model(step))  # noqa: B023
            add_metrics(writer, optimizer, step)
            written.append(optimizer.log_dict())
    curves = read(tmp_path)
    assert curves.keys() == written[0].keys()
    for tag, curve in curves.items():
        assert curve == [(step, figures[tag]) for step, figures in enumerate(written)]


@over_some("AnalyticQP")
def test_one_chart_for_each_kind(method, tmp_path):
    model, optimizer = model_and_optimizer(method)
    optimizer.step(lambda: model(0))
    with SummaryWriter(tmp_path) as writer:
        add_metrics(writer, optimizer, 5, prefix="", grouped=True)
    figures = optimizer.log_dict("")
    singles = {key: [(5, figures[key])] for key in ("alignment", "satisfied", "skipped")}
    assert read(tmp_path) == singles
    # A curve of a shared chart is a file of its own.
    curves = read(tmp_path / "weight_b")
    assert curves == {"weight": [(5, figures["weight/b"])]}
    kinds = {folder.name.split("_")[0] for folder in tmp_path.iterdir() if folder.is_dir()}
    assert kinds == {"loss", "weight", "coefficient", "cosine"}
