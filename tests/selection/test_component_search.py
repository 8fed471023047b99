from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.selection import component_search
from lightning_influence.selection.component_objective import OBJECTIVES
from lightning_influence.selection.component_search import ComponentSearch
from tests.selection import oracles_components as oracles
from tests.selection.component_cases import noisy_pairs, small_pairs


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(pairs=small_pairs(), data=st.data())
def test_sets_one_step_away(objective, pairs, data):
    search = ComponentSearch(pairs, objective)
    everything = list(range(len(pairs.components)))
    taken = []

    def truth(subset):
        parts = (pairs.dots, pairs.query_squares, pairs.candidate_squares, pairs.target, pairs.mask)
        return oracles.objective(objective, *parts, subset)

    assert search.alone().tolist() == pytest.approx([truth(everything)], abs=1e-12)
    for _ in everything[:2]:
        left = sorted(search.left)
        expected = {row: truth([*taken, row]) for row in left}
        assert dict(zip(search.left, search.with_each().tolist(), strict=True)) == pytest.approx(expected, abs=1e-12)
        if len(left) > 1:
            expected = {row: truth([other for other in left if other != row]) for row in left}
            found = dict(zip(search.left, search.without_each().tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-12)
        taken.append(search.take(data.draw(st.integers(0, len(left) - 1))))
        assert sorted([*search.left, *taken]) == everything


@pytest.mark.parametrize("count", [2, 3, 9])
def test_all_but_one(count):
    rows = torch.randint(-9, 9, (count, 2, 3), generator=torch.Generator().manual_seed(0)).double()
    out, after, spare = (torch.full_like(rows, torch.nan) for _ in range(3))
    component_search._all_but_one(rows, out, after, spare)
    assert torch.equal(out, rows.sum(0) - rows)


def test_memory_does_not_grow_with_the_queries():
    few, many = (ComponentSearch(noisy_pairs(6, q), "mrr")._blocks[0]._buffers.numel() for q in (18_000, 30_000))
    assert few == many <= 4 * component_search._BLOCK_ON_CPU


def test_what_is_in_the_padding_does_not_matter():
    pairs = noisy_pairs(4, 6)
    valid = torch.ones(6, 5, dtype=torch.bool)
    column = (int(pairs.target[1]) + 1) % 5
    valid[1, column] = False
    found = []
    for filling in (0.0, 1e9, torch.nan):
        for part in (pairs.dots, pairs.candidate_squares):
            part[:, 1, column] = filling
        padded = component_search.ComponentPairs(
            pairs.components, pairs.sizes, pairs.dots, pairs.query_squares, pairs.candidate_squares, pairs.target, valid
        )
        found.append([ComponentSearch(padded, objective).with_each().tolist() for objective in OBJECTIVES])
    assert found[0] == found[1] == found[2]
