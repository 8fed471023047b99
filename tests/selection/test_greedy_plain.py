from __future__ import annotations

import pytest
from hypothesis import given

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_plain import plain_picks
from tests import oracles
from tests.selection.cases import Pool, clustered_pool, pools


@given(pool=pools())
def test_it_is_brute_force(pool: Pool) -> None:
    factors = Factors.checked("test", pool.values, pool.features, pool.metric, pool.ids)
    assert list(plain_picks(factors, len(pool.ids))) == oracles.greedy(
        pool.values, pool.interactions, len(pool.ids), pool.ids
    )


@pytest.mark.parametrize("done", [0, 1, 3])
def test_it_goes_on_from_picks_already_made(done: int) -> None:
    pool = clustered_pool(30, 4)
    factors = Factors.checked("test", pool.values, pool.features)
    whole = list(plain_picks(factors, 5))
    assert list(plain_picks(factors, 5 - done, whole[:done])) == whole[done:]
