from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.selection import FacilityLocation, facility_location


def coverage(vectors: torch.Tensor, chosen: list[int]) -> float:
    """Σ_i max_{j∈S} max(cos_ij, 0), from one pair of rows at a time."""
    total = 0.0
    for i in range(len(vectors)):
        best = 0.0
        for j in chosen:
            lengths = float(vectors[i].norm()) * float(vectors[j].norm())
            best = max(best, float((vectors[i] * vectors[j]).sum()) / lengths if lengths > 0 else 0.0)
        total += best
    return total


def brute_force(vectors: torch.Tensor, ids: list[int], budget: int) -> list[int]:
    """Greedy that tries every row at every step; the smallest id among equals."""
    chosen: list[int] = []
    for _ in range(budget):
        outcome = {k: coverage(vectors, [*chosen, k]) for k in range(len(ids)) if k not in chosen}
        best = max(outcome.values())
        chosen.append(min((k for k in outcome if outcome[k] >= best - 1e-10), key=lambda k: ids[k]))
    return [ids[k] for k in chosen]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 3), seed=st.integers(0, 10**6), whole=st.booleans())
def test_the_picks_of_the_greedy_that_tries_all(n: int, d: int, seed: int, whole: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, d, generator=generator, dtype=torch.float64)
    vectors = vectors.round() if whole else vectors  # ties
    ids = torch.randperm(n, generator=generator).tolist()
    expected = brute_force(vectors, ids, n)
    assert list(FacilityLocation().select(torch.zeros(n), vectors, budget=n, ids=ids).ids) == expected
    assert list(FacilityLocation(vectors, ids).select(torch.zeros(n), budget=n, ids=ids).ids) == expected


def test_few_rows_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picks as looking at all of them, with a small part of the work."""
    vectors = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(50, 0)
    vectors = vectors + 0.3 * torch.randn(600, 16, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    similarities, covered, expected = (unit @ unit.T).clamp_min(0), torch.zeros(600).double(), []
    for _ in range(40):
        gains = (similarities - covered).clamp_min(0).sum(1)
        expected.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarities[expected[-1]])
    looked_at, gains_of = [], facility_location._gains
    monkeypatch.setattr(
        facility_location, "_gains", lambda v, c, rows: looked_at.append(len(rows)) or gains_of(v, c, rows)
    )
    assert list(FacilityLocation().select(torch.zeros(600), vectors, budget=40).ids) == expected
    assert sum(looked_at[1:]) < 0.2 * 600 * 40


def test_one_row_of_each_cluster_comes_first() -> None:
    vectors = torch.eye(5).repeat_interleave(4, 0)
    chosen = FacilityLocation().select(torch.zeros(20), vectors, budget=5).ids
    assert [k // 4 for k in chosen] == [0, 1, 2, 3, 4]
