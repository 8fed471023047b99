from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_influence.metrics.rank_agreement import (
    RankAgreement,
    average_ranks,
    kendall,
    mean_absolute_error,
    percentile_interval,
    resampled,
    spearman,
)

TABLES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-3, 3), min_size=n, max_size=n)] * 2)  # few values: many ties
)
SCIPY = {spearman: stats.spearmanr, kendall: stats.kendalltau}


def oracle(measure, left, right):
    if len(set(left)) == 1 or len(set(right)) == 1:
        return 0.0
    return SCIPY[measure](left, right).statistic


@pytest.mark.parametrize("measure", SCIPY)
@given(table=TABLES)
def test_equals_scipy_with_ties(measure, table):
    left, right = table
    for dtype in (torch.float64, torch.int64):
        found = measure(torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype))
        assert found.item() == pytest.approx(oracle(measure, left, right), abs=1e-12)
        assert found.dtype == torch.float64


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_are_scipys(values):
    assert average_ranks(torch.tensor(values)).tolist() == stats.rankdata(values).tolist()


@pytest.mark.parametrize("measure", SCIPY)
def test_only_the_order_counts_and_rows_are_apart(measure):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 20, generator=generator), torch.randn(2, 3, 20, generator=generator)
    found = measure(left, right)
    assert found.shape == (2, 3)
    assert torch.equal(found, measure(left.exp(), right))
    torch.testing.assert_close(found, -measure(-left, right))
    torch.testing.assert_close(found, measure(right, left))
    torch.testing.assert_close(found[1, 2], measure(left[1, 2], right[1, 2]))
    torch.testing.assert_close(measure(left, left), torch.ones(2, 3).double())


def test_infinities_are_ordered_and_large_tables_come_in_blocks():
    left = torch.tensor([-math.inf, 0.0, math.inf])
    assert spearman(left, torch.tensor([1, 2, 3])).item() == 1
    assert kendall(left, torch.tensor([1, 2, 3])).item() == 1
    many = torch.rand(3, 1700)  # a row at a time
    assert kendall(many, many).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("measure", SCIPY)
@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (torch.ones(3), torch.ones(4), r"of one shape with n >= 2. Got shapes \[3\] and \[4\]"),
        (torch.ones(1), torch.ones(1), "n >= 2"),
        (torch.tensor([0, math.nan, 1]), torch.ones(3), r"\(left\)`: expected numbers, found NaN at positions \[1\]"),
        (torch.ones(3), torch.tensor([0, 1, math.nan]), r"\(right\)`: expected numbers, found NaN at positions \[2\]"),
    ],
)
def test_what_has_no_order(measure, left, right, message):
    with pytest.raises(ValueError, match=message):
        measure(left, right)


def test_resampling_draws_columns_of_both_and_follows_the_seed():
    left = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resampled(spearman, left, left, resamples=50), torch.ones(50, 2).double())
    noisy = left + torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    found = resampled(kendall, left, noisy, resamples=50)
    assert torch.equal(found, resampled(kendall, left, noisy, resamples=50))
    assert not torch.equal(found, resampled(kendall, left, noisy, seed=1, resamples=50))
    draws = torch.randint(30, (50, 30), generator=torch.Generator().manual_seed(0))[7]
    assert found[7, 1].item() == pytest.approx(stats.kendalltau(left[1, draws], noisy[1, draws]).statistic, abs=1e-12)


def test_the_interval_is_that_of_fisher():
    """Pearson's interval for normal numbers, which Spearman's is close to."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(400, generator=generator)
    right = left + torch.randn(400, generator=generator)
    low, high = percentile_interval(resampled(spearman, left, right))
    middle, half = math.atanh(spearman(left, right).item()), 1.96 * math.sqrt(1.06 / 397)
    assert (low, high) == pytest.approx((math.tanh(middle - half), math.tanh(middle + half)), abs=0.02)


def test_mean_absolute_error():
    assert mean_absolute_error(torch.tensor([[1, 2], [0, 0]]), torch.tensor([[2, 0], [0, 3]])).tolist() == [1.5, 1.5]


@pytest.mark.parametrize(("kind", "measure"), [("spearman", spearman), ("kendall", kendall)])
def test_metric_is_the_mean_over_rows_batches_and_ranks(kind, measure):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5, 8, generator=generator)
    ranks = [RankAgreement(kind), RankAgreement(kind)]
    ranks[0].update(left[:2], right[:2])
    ranks[0].update(left[2], right[2])
    ranks[1].update(left[3:], right[3:])
    merged = RankAgreement(kind)
    merged.update(left[:0], right[:0])
    for rank in ranks:
        merged.merge_state({"correlations": rank.correlations, "rows": rank.rows})
    assert merged.compute().item() == pytest.approx(measure(left, right).mean().item())
    assert merged.compute().dtype == torch.float32


def test_metric_refuses():
    with pytest.raises(ValueError, match=r"`RankAgreement\(kind='pearson'\)`: expected 'spearman' or 'kendall'"):
        RankAgreement("pearson")
    metric = RankAgreement()
    metric.update(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="rank agreement of no row"):
        metric.compute()
