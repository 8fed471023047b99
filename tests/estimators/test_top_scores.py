from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from lightning_influence import EKFAC, Estimator, ExampleLoader, GradientDot, InfluenceFunction, Scores
from lightning_influence.estimators import CKA
from lightning_influence.estimators.top_scores import RunningTop, TopScores
from tests.curvature.models import Tokens, mlp, points, ready, texts

TRAIN, QUERIES = texts(9), texts(4, seed=3)


def influence(**options: Any) -> Estimator:
    return InfluenceFunction(ready(Tokens()), EKFAC(fisher="empirical"), **options).fit(TRAIN)


MEMBERS: dict[str, Any] = {
    "GradientDot": lambda **options: GradientDot(ready(Tokens()), **options),
    "InfluenceFunction": influence,
    "CKA": lambda **options: CKA(ready(Tokens()), **options),
}


@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=11, max_size=11), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 10)),
    k=st.integers(1, 13),
    lowest=st.booleans(),
)
def test_parts_in_any_number_give_what_all_columns_give(
    rows: list[list[int]], cuts: set[int], k: int, lowest: bool
) -> None:
    """Few different values, so that most of them are tied."""
    values = torch.tensor(rows).double()
    scores = Scores(values, tuple(range(len(rows))), tuple(range(11)), "dot", "sum")
    top = RunningTop(k, lowest=lowest)
    ends = [0, *sorted(cuts), 11]
    for start, stop in pairwise(ends):
        top.update(values[:, start:stop])
    for query in range(len(rows)):
        found = list(zip(top.positions[query].tolist(), top.values[query].tolist(), strict=True))
        assert found == scores.top(k, query, harmful=lowest)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("memory_budget", [1, 10**9])
def test_the_same_as_all_scores_and_then_the_best(name: str, harmful: bool, k: int, memory_budget: int) -> None:
    train = [*TRAIN, TRAIN[3], TRAIN[0]]  # ties
    estimator = MEMBERS[name](batch_size=1, memory_budget=memory_budget)
    whole = estimator.score(QUERIES, train)
    found = estimator.top(QUERIES, train, k, harmful=harmful)
    for query in range(4):
        assert found.of(query) == whole.top(k, query, harmful=harmful)
    assert (found.query_ids, found.num_train, found.harmful) == (whole.query_ids, 11, harmful)
    assert (found.formula, found.reduction, found.damping) == (whole.formula, whole.reduction, whole.damping)


def test_ids_are_those_of_the_data() -> None:
    loader = ExampleLoader(TRAIN, 2, indices=[7, 2, 5])
    found = influence().top(ExampleLoader(QUERIES, indices=[3, 1]), loader, 2, labels="sampled", seed=5)
    whole = influence().score(ExampleLoader(QUERIES, indices=[3, 1]), loader, labels="sampled", seed=5)
    assert found.query_ids == (3, 1)
    for query in range(2):
        assert [k for k, _ in found.of(query)] == [k for k, _ in whole.top(2, query)]


def test_no_more_than_k_are_kept() -> None:
    """Of 200 examples, the largest tensor of scores has a batch and k columns."""
    sizes: list[int] = []
    estimator = GradientDot(mlp(), batch_size=10)

    class Noted(RunningTop):
        def update(self, columns: torch.Tensor) -> None:
            super().update(columns)
            sizes.append(columns.shape[1] + self.values.shape[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_influence.estimators.base.RunningTop", Noted)
        estimator.top(points(3, seed=4), points(200), 5)
    assert (len(sizes), max(sizes)) == (20, 15)


class Broken(Dataset[Any]):
    """Any access is one too many."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read before the arguments were checked")


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_arguments(k: Any) -> None:
    estimator = GradientDot(mlp(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=re.escape(f"`GradientDot.top(k={k!r})`: expected an int >= 1.")):
        estimator.top(Broken(), Broken(), k)
    with pytest.raises(ValueError, match=r"`GradientDot.top\(labels='true'\)`: expected 'data' or 'sampled'"):
        estimator.top(Broken(), Broken(), 1, labels="true")  # type: ignore[arg-type]


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match=r"expected \[q, k\] = \(1, 1\) from the query ids and 1 lists of \[1\]"):
        TopScores(torch.zeros(1, 2), (("a",),), ("q",), 9, "dot", "sum")
    found = TopScores(torch.zeros(1, 2), (("a", "b"),), ("q",), 9, "dot", "sum", harmful=True)
    assert repr(found) == "TopScores(2 most harmful of 9 for 1 queries, formula='dot')"
