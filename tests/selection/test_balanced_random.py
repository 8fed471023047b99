from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from lightning_influence.selection import BalancedRandom

SOURCES = ["web"] * 60 + ["books"] * 30 + ["code"] * 3


@pytest.mark.parametrize(
    "sources", [SOURCES, dict(enumerate(SOURCES)), SOURCES.__getitem__, tuple(SOURCES)], ids=lambda s: type(s).__name__
)
def test_sources_take_turns_until_they_run_out(sources: object) -> None:
    for budget, expected in ((3, [1, 1, 1]), (9, [3, 3, 3]), (23, [10, 10, 3]), (93, [60, 30, 3])):
        chosen = BalancedRandom(sources, seed=4).select(torch.zeros(93), budget=budget).ids
        assert len(set(chosen)) == budget
        assert sorted(Counter(SOURCES[k] for k in chosen).values(), reverse=True) == expected
    counts = Counter(SOURCES[k] for k in BalancedRandom(sources).select(torch.zeros(93), budget=8).ids)
    assert sorted(counts.values()) == [2, 3, 3]


def test_numbers_as_sources() -> None:
    chosen = BalancedRandom(torch.tensor([0] * 8 + [1] * 2)).select(torch.zeros(10), budget=4).ids
    assert sum(k >= 8 for k in chosen) == 2


def test_within_a_source_every_row_is_as_likely() -> None:
    counts = torch.zeros(10)
    for seed in range(600):
        counts[list(BalancedRandom([0] * 8 + [1] * 2, seed).select(torch.zeros(10), budget=2).ids)] += 1
    assert (counts[:8] - 75).abs().max() < 5 * (600 / 8 * 7 / 8) ** 0.5
    assert (counts[8:] - 300).abs().max() < 5 * 150**0.5


def test_the_seed_decides() -> None:
    one, other = (BalancedRandom(SOURCES, seed).select(torch.zeros(93), budget=20).ids for seed in (1, 2))
    assert one != other
    assert one == BalancedRandom(SOURCES, 1).select(torch.ones(93), budget=20).ids


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected an int with 0 <= seed"):
        BalancedRandom(SOURCES, seed=-1)
    with pytest.raises(ValueError, match=re.escape("`BalancedRandom(sources=str)`: expected a source for each row")):
        BalancedRandom("web")
    with pytest.raises(ValueError, match=re.escape("`BalancedRandom(seed=0).select`: expected data for every row")):
        BalancedRandom(SOURCES).select(torch.zeros(94), budget=2)
