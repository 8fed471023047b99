from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_plain import plain_picks
from lightning_influence.selection.greedy_search import GreedySearch
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


@given(pool=pools())
def test_it_is_brute_force(pool: Pool) -> None:
    factors = Factors.checked("test", pool.values, pool.features, pool.metric, pool.ids)
    assert list(plain_picks(factors, len(pool.ids))) == oracles.greedy(
        pool.values, pool.interactions, len(pool.ids), pool.ids
    )


@given(pool=pools(), scale=st.sampled_from([0.5, 1.0, 2.0]))
def test_pairs_as_the_metric_make_the_same_picks(pool: Pool, scale: float) -> None:
    """F = c I and M = K/c², which is how pairs of the second order come, ties included; the search makes them too."""
    n = len(pool.ids)
    metric = pool.interactions / scale**2
    factors = Factors.checked("test", pool.values, scale * torch.eye(n), metric, pool.ids)
    expected = oracles.greedy(pool.values, pool.interactions, n, pool.ids)
    assert list(plain_picks(factors, n)) == expected
    assert [pick.position for pick in GreedySearch(factors, factors.id_ranks).picks(n)] == expected


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("paired", [False, True])
def test_it_goes_on_from_picks_already_made(done: int, paired: bool) -> None:
    pool = clustered_pool(30, 4)
    factors = Factors.checked("test", pool.values, pool.features)
    if paired:
        factors = Factors.checked("test", pool.values, torch.eye(30), pool.features @ pool.features.T)
    whole = list(plain_picks(factors, 5))
    assert list(plain_picks(factors, 5 - done, whole[:done])) == whole[done:]
