from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.scores import Scores
from lightning_influence.selection import (
    Constraints,
    InteractionGreedy,
    RoundRobin,
    TokenBudget,
    TopK,
    aggregate,
    select_by_scores,
    target_interactions,
    target_scores,
)

NAMES = tuple("abcdefg")
SETS = {"maths": ["q0", "q2", "q3"], "law": ["q1"], "code": ["q3", "q4"]}


def scores(seed: int = 0, components: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    queries = tuple(f"q{k}" for k in range(5))
    if components:
        return Scores(values, queries, NAMES, "dot", "sum", components=("one", "two"))
    return Scores(values.sum(0), queries, NAMES, "dot", "sum", damping="0.1")


def literal(table: list[list[float]], across: str, within: str, weights: dict[str, float]) -> list[float]:
    reduce = {"mean": lambda x: sum(x) / len(x), "max": max, "min": min}
    found = []
    for j in range(7):
        by_target = []
        for name, members in SETS.items():
            column = [table[int(member[1:])][j] for member in members]
            by_target.append(weights.get(name, 1.0) * reduce[within](column))
        found.append(reduce[across](by_target))
    return found


@pytest.mark.parametrize("across", ["mean", "max", "min"])
@pytest.mark.parametrize("within", ["mean", "max", "min"])
@pytest.mark.parametrize("weights", [{}, {"law": -0.5, "code": 3}])
def test_the_reference(across: str, within: str, weights: dict[str, float]) -> None:
    found = aggregate(scores(), across, targets=SETS, weights=weights, within=within)
    expected = literal(scores().values.tolist(), across, within, weights)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    kept_apart = aggregate(scores(components=True), across, targets=SETS, weights=weights, within=within)
    torch.testing.assert_close(kept_apart, found)
    selection = select_by_scores(scores(), budget=3, across=across, targets=SETS, weights=weights, within=within)
    assert selection.ids == TopK().select(found, budget=3, ids=NAMES).ids


def test_labels_of_target_scores() -> None:
    found = target_scores(scores(components=True), SETS, "max")
    assert found.query_ids == ("maths", "law", "code")
    assert found.components is None
    assert found.formula == "dot, max over the queries of each target"
    assert target_scores(scores(), None).query_ids == scores().query_ids


def test_less_takes_the_mean_within_and_the_largest_across() -> None:
    table = scores().values
    expected = torch.stack([table[[0, 2, 3]].mean(0), table[1], table[[3, 4]].mean(0)]).amax(0)
    torch.testing.assert_close(aggregate(scores(), "max", targets=SETS), expected)


def test_round_robin_over_queries_and_over_tasks() -> None:
    table = scores()
    by_query = select_by_scores(table, budget=4, across="round-robin")
    assert by_query.ids == RoundRobin(table).select(table.values.mean(0), budget=4, ids=NAMES).ids
    by_task = select_by_scores(table, budget=4, across="round-robin", targets=SETS, within="max")
    assert by_task.ids[0] == NAMES[int(table.values[[0, 2, 3]].amax(0).argmax())]


@given(seed=st.integers(0, 1000), sampled=st.booleans(), negative=st.booleans())
def test_interactions_are_those_of_the_weighted_mean(seed: int, sampled: bool, negative: bool) -> None:
    """b and K from the definition: gradient and Fisher of f = (1/g) Σ w_t f_t."""
    found, fisher = scores(seed), scores(seed + 1000) if sampled else scores(seed)
    weights = {"law": -0.5 if negative else 0.5, "code": 2.0}
    values, products = torch.zeros(7).double(), torch.zeros(7, 7).double()
    for name, members in SETS.items():
        rows = [int(member[1:]) for member in members]
        share = weights.get(name, 1.0) / 3
        values += share * found.values[rows].mean(0)
        products += share * sum(torch.outer(fisher.values[k], fisher.values[k]) for k in rows) / len(rows)
    got = target_interactions(found, SETS, weights, weight=0.2, curvature_scores=fisher if sampled else None)
    torch.testing.assert_close(got.values, 0.2 * values)
    torch.testing.assert_close(got.pairwise(NAMES), 0.04 * products)
    assert (got.metric is None) != negative
    assert got.weight == 0.2
    assert got.damping == "0.1"
    assert len(got.select(InteractionGreedy(), 3)) == 3


def test_one_target_of_all_queries_is_the_plain_case() -> None:
    found = target_interactions(scores(), {"all": scores().query_ids})
    plain = Interactions.from_scores(scores())
    torch.testing.assert_close(found.values, plain.values)
    torch.testing.assert_close(found.pairwise(NAMES), plain.pairwise(NAMES))
    for_each = target_interactions(scores())
    torch.testing.assert_close(for_each.values, plain.values)
    torch.testing.assert_close(for_each.pairwise(NAMES), plain.pairwise(NAMES))


def test_an_avoided_target_counts_against_its_rows() -> None:
    table = Scores(torch.tensor([[1.0, 1.0, 0.9], [2.0, 0.0, 0.0]]), ("good", "bad"), (0, 1, 2), "dot", "sum")
    assert select_by_scores(table, budget=2).ids == (0, 1)
    assert select_by_scores(table, budget=2, weights={"bad": -1}).ids == (1, 2)


def test_integer_ids_of_any_kind() -> None:
    table = Scores(torch.eye(3), (0, 1, 2), (0, 1, 2), "dot", "sum")
    for members in (range(2), torch.tensor([0, 1]), [0, 1]):
        assert target_scores(table, {"one": members, "two": [2]}).values.tolist() == [[0.5, 0.5, 0], [0, 0, 1]]


BAD = {
    "across": (
        lambda: aggregate(scores(), "sum"),
        "`aggregate(across='sum')`: expected one of ['mean', 'max', 'min'].",
    ),
    "within": (lambda: target_scores(scores(), SETS, "sum"), "`target_scores(within='sum')`: expected one of"),
    "no sets": (lambda: aggregate(scores(), targets={}), "expected at least one named set of queries, or None."),
    "empty set": (lambda: aggregate(scores(), targets={"x": []}), "(targets['x'])`: expected ids of queries that were"),
    "unknown query": (lambda: aggregate(scores(), targets={"x": ["q9"]}), "unknown are ['q9']"),
    "repeated query": (lambda: aggregate(scores(), targets={"x": ["q1", "q1"]}), "some come twice"),
    "unknown weight": (lambda: aggregate(scores(), weights={"q": 1}), "['q'] are no targets; expected names among"),
    "infinite weight": (lambda: aggregate(scores(), weights={"q1": float("inf")}), "expected finite numbers that are"),
    "nothing counts": (
        lambda: aggregate(scores(), targets={"law": ["q1"]}, weights={"law": 0}),
        "expected finite numbers that are not all 0.",
    ),
    "no scores": (lambda: aggregate(torch.zeros(2, 2)), "(scores=Tensor)`: expected Scores"),
    "not finite": (
        lambda: aggregate(Scores(torch.tensor([[0.0, torch.nan]]), (0,), ("a", "b"), "dot", "sum")),
        "have NaN or infinite scores: id 'b'",
    ),
    "weights of a round-robin": (
        lambda: select_by_scores(scores(), budget=2, across="round-robin", weights={"q1": 2}),
        "every target takes its turn",
    ),
    "other curvature scores": (
        lambda: target_interactions(scores(), curvature_scores=Scores(torch.zeros(5, 7), (*range(5),), NAMES, "", "")),
        "`target_interactions(curvature_scores)`: expected scores of the same queries and training examples",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_constraints_reach_the_rule() -> None:
    scores = Scores(torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.5, 1.0]]), (0, 1), ("a", "b", "c"), "dot", "sum")
    limits = Constraints(exclude=["a"])
    assert select_by_scores(scores, budget=2, constraints=limits).ids == ("b", "c")
    assert select_by_scores(scores, budget=2, across="round-robin", constraints=limits).ids == ("b", "c")
    assert select_by_scores(scores, budget=TokenBudget(3, counts={"a": 9, "b": 2, "c": 2})).ids == ("b",)
