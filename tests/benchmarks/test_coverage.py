"""The simulation of the intervals of ``diagnose`` runs, and shows what it is there to show."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage import Setting, draw, measure, report


def test_the_report_has_a_row_for_each_ratio() -> None:
    lines = report(reports=2, counts=(3, 8), ratios=(0.1, 10.0)).splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == [
        "| signal/noise",
        "| ---",
        "| 0.1",
        "| 10",
    ]
    assert len(lines) == 7


@pytest.mark.parametrize("heavy", [False, True])
def test_the_noise_has_the_ratio_that_is_given(heavy) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw(Setting(20_000, 0.1, 0.8, 0.6, heavy), generator)
    traces = rows.var(0).sum(-1)
    torch.testing.assert_close(traces, torch.full_like(traces, 10.0), rtol=0.05, atol=0.0)
    noise = rows - rows.mean(0)
    common = (noise[:, 0] * noise[:, 1]).sum(1).mean()
    assert float(common) == pytest.approx(6.0, rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(*rows.mean(0), dim=0)
    assert float(cosine) == pytest.approx(0.8, abs=0.05)


def test_intervals_cover_with_independent_batches_and_not_with_correlated_ones() -> None:
    assert measure(Setting(12, 1.0), 100).cover > 0.9
    assert measure(Setting(12, 1.0, correlation=0.9), 100).cover < 0.7
