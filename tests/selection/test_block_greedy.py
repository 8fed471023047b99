from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import BlockGreedy, Constraints, InteractionGreedy, TokenBudget, block_greedy
from tests.oracles import addition_objective
from tests.selection.cases import Pool, clustered_pool, pools


def chosen(pool: Pool, block: int, budget: int, **options: Any) -> tuple[int, ...]:
    rule = BlockGreedy(block)
    return rule.select(pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids, **options).positions


def by_hand(pool: Pool, block: int, shortlist: int) -> list[int]:
    """All picks, one row at a time."""
    picks: list[int] = []

    def key(row: int) -> tuple[float, int | str]:
        return addition_objective(pool.values, pool.interactions, [*picks, row]), pool.ids[row]

    while len(picks) < len(pool.ids):
        left = sorted((row for row in range(len(pool.ids)) if row not in picks), key=key)[: block * shortlist]
        for _ in range(min(block, len(left))):
            picks.append(min(left, key=key))
            left.remove(picks[-1])
    return picks


@given(pool=pools(), block=st.integers(1, 4), shortlist=st.integers(1, 2))
def test_it_is_greedy_on_shortlists(pool: Pool, block: int, shortlist: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_greedy, "SHORTLIST", shortlist)
        assert list(chosen(pool, block, len(pool.ids))) == by_hand(pool, block, shortlist)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_blocks_of_one_are_exact(dtype: torch.dtype) -> None:
    pool = clustered_pool(dtype=dtype)
    exact = InteractionGreedy().select(pool.values, pool.features, pool.metric, budget=60, ids=pool.ids)
    assert chosen(pool, 1, 60) == exact.positions
    assert chosen(pool, 8, 60) != exact.positions


def test_the_order_of_the_pool_does_not_matter() -> None:
    pool = clustered_pool()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5)).tolist()
    ids = [pool.ids[row] for row in chosen(pool, 4, 80)]
    mixed = pool.permuted(order)
    assert [mixed.ids[row] for row in chosen(mixed, 4, 80)] == ids


def test_within_constraints_blocks_of_one_are_exact_too() -> None:
    pool = clustered_pool()
    limits = Constraints(sources=lambda name: name % 4, max_per_source=20, costs=lambda name: 1 + name % 3)
    budget = TokenBudget(300, counts=lambda name: 3 + name % 5)
    exact = InteractionGreedy().select(
        pool.values, pool.features, pool.metric, budget=budget, ids=pool.ids, constraints=limits
    )
    assert chosen(pool, 1, budget, constraints=limits) == exact.positions
    assert len(chosen(pool, 8, budget, constraints=limits)) > 40


@pytest.mark.parametrize("block", [0, 2.0, True])
def test_block_is_an_int(block: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`BlockGreedy(block={block!r})`: expected an int >= 1")):
        BlockGreedy(block)
