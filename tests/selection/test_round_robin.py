from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.scores import Scores
from lightning_influence.selection import RoundRobin
from tests.selection.cases import eighths


def reference(table: list[list[float]], ids: list[int], budget: int) -> list[int]:
    """Query after query: the best row that is not taken, the smallest id among equals."""
    taken: list[int] = []
    turn = 0
    while len(taken) < budget:
        scores = table[turn % len(table)]
        best = None
        for k in range(len(ids)):
            if ids[k] in taken:
                continue
            if best is None or scores[k] > scores[best] or (scores[k] == scores[best] and ids[k] < ids[best]):
                best = k
        taken.append(ids[best])
        turn += 1
    return taken


@given(g=st.integers(1, 4), n=st.integers(1, 8), data=st.data())
def test_the_reference(g: int, n: int, data: st.DataObject) -> None:
    table = data.draw(eighths(g, n, 3))
    ids = data.draw(st.permutations(range(n)))
    budget = data.draw(st.integers(1, n))
    chosen = RoundRobin(table, ids).select(torch.zeros(n), budget=budget, ids=ids)
    assert list(chosen.ids) == reference(table.tolist(), ids, budget)


def test_scores_bring_their_ids_and_the_pool_may_be_part_of_them() -> None:
    scores = Scores(torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), (0, 1), ("a", "b", "c"), "dot", "sum")
    rule = RoundRobin(scores)
    assert repr(rule) == "RoundRobin(2 targets)"
    assert rule.select(torch.zeros(3), budget=3, ids=["a", "b", "c"]).ids == ("a", "c", "b")
    assert rule.select(torch.zeros(2), budget=2, ids=["c", "b"]).ids == ("b", "c")


def test_a_weak_target_gets_its_share() -> None:
    table = torch.stack([torch.arange(100.0), 1e-6 * torch.arange(100.0).flip(0)])
    chosen = RoundRobin(table).select(table.mean(0), budget=10).ids
    assert sorted(chosen) == [0, 1, 2, 3, 4, 95, 96, 97, 98, 99]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=re.escape("`RoundRobin(scores)`: expected [g, n], got shape [3]")):
        RoundRobin(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinite scores: id 'b'"):
        RoundRobin(torch.tensor([[0.0, torch.nan]]), ["a", "b"])
    with pytest.raises(ValueError, match=re.escape("expected one id for each of the 2 values")):
        RoundRobin(torch.zeros(1, 2), ["a"])
    with pytest.raises(ValueError, match="the scores have ids already"):
        RoundRobin(Scores(torch.zeros(1, 1), (0,), (0,), "dot", "sum"), [0])
    with pytest.raises(ValueError, match="of 1 of 3 rows there is none: id 2"):
        RoundRobin(torch.zeros(1, 2)).select(torch.zeros(3), budget=1)
