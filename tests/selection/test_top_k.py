from __future__ import annotations

import torch
from hypothesis import given

from lightning_influence.selection import TopK
from tests.selection.cases import Pool, pools


@given(pool=pools())
def test_the_largest_values_equal_ones_by_id(pool: Pool) -> None:
    selection = TopK().select(pool.values, budget=1.0, ids=pool.ids)
    rows = sorted(range(len(pool.ids)), key=lambda row: (-float(pool.values[row]), pool.ids[row]))
    assert selection.positions == tuple(rows)


@given(pool=pools())
def test_features_do_not_change_the_picks(pool: Pool) -> None:
    with_features = TopK().select(pool.values, pool.features, pool.metric, budget=1.0, ids=pool.ids)
    assert with_features.ids == TopK().select(pool.values, budget=1.0, ids=pool.ids).ids


def test_twins_are_picked_together_whatever_they_cost() -> None:
    """The failure that interaction-aware selection is for."""
    values, features = torch.tensor([2.0, 2.0, 1.5]), torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    selection = TopK().select(values, features, budget=2)
    assert selection.ids == (0, 1)
    assert selection.gains.tolist() == [0.0, 4.0]
