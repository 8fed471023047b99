from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from lightning_influence.metrics.intervals import (
    bootstrap_interval,
    normal_interval,
    student_interval,
    wilson_interval,
)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_is_scipys(n, data):
    hits = data.draw(st.integers(0, n))
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("share", "number"), [(-0.1, 5), (1.1, 5), (float("nan"), 5), (0.5, 0)])
def test_what_is_no_share(share, number):
    with pytest.raises(ValueError, match=r"`wilson_interval\(share=.*\)`: expected a share in \[0, 1\] of >= 1"):
        wilson_interval(share, number)


def test_normal():
    values = torch.tensor([0.2, 0.4, 0.9])
    half = norm.ppf(0.975) * values.double().std().item() / math.sqrt(3)
    assert normal_interval(values) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-7)
    low, high = normal_interval(values, number=3 / 4)
    assert high - low == pytest.approx(4 * half)


@pytest.mark.parametrize("n", [2, 3, 4, 10, 100, 1000])
def test_student_is_scipys(n):
    values = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    mean, error = values.mean().item(), values.std().item() / math.sqrt(n)
    assert student_interval(values) == pytest.approx(student.interval(0.95, n - 1, mean, error), rel=1e-6)


@pytest.mark.parametrize("interval", [normal_interval, student_interval])
def test_one_value_has_no_spread(interval):
    assert interval(torch.tensor([0.5])) == (-math.inf, math.inf)


def test_bootstrap_agrees_with_the_normal_and_follows_the_seed():
    values = torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    alone = torch.arange(400)
    found = bootstrap_interval(values, alone)
    for row, interval in zip(values, found, strict=True):
        assert interval == pytest.approx(normal_interval(row), abs=0.005)
    assert bootstrap_interval(values, alone) == found
    assert bootstrap_interval(values, alone, seed=1) != found


def test_copies_of_a_query_carry_no_information():
    values = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    once = bootstrap_interval(values, torch.arange(100))
    copies = bootstrap_interval(values.repeat(1, 4), torch.arange(100).repeat(4))
    assert copies[0] == pytest.approx(once[0])


def test_groups_of_different_size_weigh_by_their_queries():
    values, groups = torch.tensor([[0.0, 1.0, 1.0, 1.0]]), torch.tensor([0, 1, 1, 1])
    low, high = bootstrap_interval(values, groups)[0]
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_interval(values.fill_(0.25), groups)[0] == (0.25, 0.25)
