from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_influence.evaluation.agreement import agreement_gain, group_agreement


def made(g=40):
    generator = torch.Generator().manual_seed(0)
    measured = torch.randn(g, generator=generator).double()
    near, far = (measured + scale * torch.randn(g, generator=generator) for scale in (0.3, 1.5))
    return measured, near, far


def test_measures_are_scipys_and_lie_in_their_intervals():
    measured, near, far = made()
    report = group_agreement({"near": near, "far": far}, measured)
    assert report.cases == 40
    for name, values in {"near": near, "far": far}.items():
        line = report.line(name)
        assert line.measures["spearman"] == pytest.approx(stats.spearmanr(values, measured).statistic)
        assert line.measures["kendall"] == pytest.approx(stats.kendalltau(values, measured).statistic)
        assert line.measures["mae"] == pytest.approx((values - measured).abs().mean().item())
        assert all(low < line.measures[key] < high for key, (low, high) in line.intervals.items())
        row = line.to_dict()
        assert (row["spearman_low"], row["spearman_high"]) == line.intervals["spearman"]
    assert report.rows()[0]["name"] == "near"
    lines = str(report).splitlines()
    assert lines[0].split() == ["estimator", "|", "spearman", "|", "kendall", "|", "mae"]
    assert lines[2].startswith("near ")


def test_scipy_draws_a_like_interval():
    measured, _, far = made()
    low, high = group_agreement(far, measured).line("estimates").intervals["spearman"]
    drawn = stats.bootstrap(
        (far.numpy(), measured.numpy()),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert (low, high) == pytest.approx((drawn.low, drawn.high), abs=0.06)


def test_gain_over_another():
    measured, near, far = made()
    gain, (low, high) = agreement_gain(near, far, measured)
    assert gain == pytest.approx(stats.spearmanr(near, measured).statistic - stats.spearmanr(far, measured).statistic)
    assert 0 < low < gain < high
    back, ends = agreement_gain(far, near, measured)
    assert (back, *ends) == pytest.approx((-gain, -high, -low))
    assert agreement_gain(near, near, measured) == (0, (0, 0))


@pytest.mark.parametrize(
    ("estimates", "message"),
    [
        ({}, "expected at least one estimator"),
        ({"F": torch.ones(3)}, r"'F' has shape \[3\], what was measured \[4\]"),
        (torch.tensor([0, math.nan, 1, 2]), r"'estimates' is NaN for groups \[1\]"),
    ],
)
def test_estimates_that_do_not_fit(estimates, message):
    with pytest.raises(ValueError, match=message):
        group_agreement(estimates, torch.ones(4))
    with pytest.raises(ValueError, match="at least two groups"):
        group_agreement(torch.ones(1), torch.ones(1))


def test_unknown_line():
    with pytest.raises(ValueError, match=r"line\('N'\)`: expected one of \['estimates'\]"):
        group_agreement(torch.arange(3), torch.arange(3)).line("N")
