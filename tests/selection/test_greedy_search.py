"""The search makes the picks of the plain loop, whatever the features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.estimators import factors
from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import greedy_bounds, greedy_search, greedy_sweep
from lightning_influence.selection.greedy_plain import plain_picks
from lightning_influence.selection.greedy_search import GreedySearch
from tests.selection.cases import clustered_pool


def searched(pool: Factors, budget: int) -> list[int]:
    return [pick.position for pick in GreedySearch(pool, pool.id_ranks).picks(budget)]


@st.composite
def large_pools(draw: st.DrawFn) -> Factors:
    """Numbers that round, of any spectrum, with clusters, exact twins and metrics of any sign."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, r = draw(st.integers(1, 150)), draw(st.integers(1, 20))
    features = normal(n, r) * torch.arange(1, r + 1).double() ** -draw(st.integers(0, 3))
    features = features + draw(st.sampled_from([0, 1, 5])) * normal(r)
    if draw(st.booleans()):
        features = features[torch.randint(max(1, n // 3), (n,), generator=generator)]
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    features = (features * 10.0 ** draw(st.integers(-3, 3))).to(dtype)
    values = draw(st.sampled_from([1, 30])) * features.double() @ normal(r)
    half = normal(r, r)
    metric = draw(st.sampled_from([None, half @ half.T, half + half.T]))
    return Factors.checked("test", values, features, metric, torch.randperm(n, generator=generator))


@settings(deadline=None, max_examples=40)
@given(pool=large_pools())
def test_pick_for_pick(pool: Factors) -> None:
    assert searched(pool, len(pool)) == list(plain_picks(pool, len(pool)))


@settings(deadline=None, max_examples=15)
@given(pool=large_pools())
def test_small_blocks_and_few_references(pool: Factors) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_bounds, "_ROWS", 16)
        patch.setattr(factors, "_BLOCK_ON_CPU", 64)
        patch.setattr(greedy_bounds, "REFERENCES", 3)
        patch.setattr(greedy_search, "_FIRST_STEPS", 2)
        assert searched(pool, len(pool)) == list(plain_picks(pool, len(pool)))


def test_all_rows_alike() -> None:
    pool = Factors.checked("test", torch.ones(500), torch.ones(500, 3, dtype=torch.float16))
    assert searched(pool, 70) == list(range(70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_far_larger_than_interactions(dtype: torch.dtype) -> None:
    pool = clustered_pool(200, 6, dtype)
    factors = Factors.checked("test", pool.values * 1e12, pool.features, pool.metric)
    assert searched(factors, 200) == list(plain_picks(factors, 200))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_beyond_the_products_of_float32(scale: float) -> None:
    pool = clustered_pool(100, 6, torch.float32)
    factors = Factors.checked("test", pool.values * scale**2, pool.features * scale)
    assert searched(factors, 100) == list(plain_picks(factors, 100))


def test_scores_and_values_come_with_the_picks() -> None:
    pool = clustered_pool(50, 6)
    factors = Factors.checked("test", pool.values, pool.features, pool.metric)
    picks = list(GreedySearch(factors, factors.id_ranks).picks(20))
    first_order, interaction = factors.in_order([pick.position for pick in picks])
    torch.testing.assert_close(torch.tensor([-pick.value for pick in picks]).double(), first_order)
    torch.testing.assert_close(torch.tensor([pick.score for pick in picks]).double(), first_order + interaction)


def test_most_rows_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    evaluate = greedy_sweep.Sweep.evaluate
    monkeypatch.setattr(
        greedy_sweep.Sweep, "evaluate", lambda self, rows, *rest: seen.append(len(rows)) or evaluate(self, rows, *rest)
    )
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3000, 64, generator=generator) / torch.arange(1, 65)
    values = 100 * features[:, :3].sum(dim=1)
    pool = Factors.checked("test", values, features.half())
    assert searched(pool, 100) == list(plain_picks(pool, 100))
    assert sum(seen) < 0.1 * 3000 * 100
