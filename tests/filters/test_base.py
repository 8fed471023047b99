"""The laws of every filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence import filters
from lightning_influence.filters import BM25Filter, Filter

TEXTS = ["a b", "b c c", "a", "", "c d e", "a b", "e e e a", "d"]

# For each member: how to make one on the eight rows above, and queries for it.
CASES = {BM25Filter: (lambda: BM25Filter(TEXTS), ["a", "c e", "", "unseen", "b a b"])}


class Known(Filter):
    """Similarities are the queries themselves."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def similarities(self, query):
        return np.asarray(query, dtype=np.float64)


def test_no_member_is_left_out():
    members = {getattr(filters, name) for name in filters.__all__} - {Filter}
    assert members == set(CASES)


@pytest.fixture(params=CASES, ids=lambda member: member.__name__)
def case(request):
    make, queries = CASES[request.param]
    return make(), queries


@pytest.mark.parametrize("k", [1, 3, 8])
def test_candidates_are_unique_valid_and_the_best(case, k):
    member, queries = case
    found = member.candidates(queries, k)
    assert found.dtype == torch.int64
    assert found.shape == (len(queries), k)
    for row, query in zip(found.tolist(), queries, strict=True):
        scores = member.similarities(query)
        assert row == sorted(range(8), key=lambda j: (-scores[j], j))[:k]


def test_all_rows_when_k_is_n(case):
    member, queries = case
    assert (member.candidates(queries, 8).sort(dim=1).values == torch.arange(8)).all()


def test_queries_do_not_know_each_other(case):
    member, queries = case
    alone = torch.cat([member.candidates([query], 3) for query in queries])
    assert torch.equal(alone, member.candidates(queries, 3))
    assert torch.equal(alone, member.candidates(queries, 3))


def test_no_query(case):
    assert case[0].candidates([], 2).shape == (0, 2)


@given(
    scores=st.lists(st.integers(-2, 2), min_size=1, max_size=7).flatmap(
        lambda row: st.tuples(st.just(row), st.integers(1, len(row)), st.integers(0, len(row) - 1))
    )
)
def test_must_include_replaces_the_worst(scores):
    row, k, wanted = scores
    member = Known(len(row))
    best = member.candidates([row], k)[0].tolist()
    expected = best if wanted in best else [*best[:-1], wanted]
    assert member.candidates([row], k, must_include=[wanted])[0].tolist() == expected
    assert member.candidates([row], k, must_include=torch.tensor([wanted]))[0].tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"`candidates\(k=0\)`: expected an int from 1 to the 3 rows of the pool"),
        ({"k": 4}, r"`candidates\(k=4\)`"),
        ({"k": 1.0}, r"`candidates\(k=1.0\)`"),
        ({"k": True}, r"`candidates\(k=True\)`"),
        ({"k": 1, "must_include": [0]}, r"expected one row for each of 2 queries, got 1"),
        ({"k": 1, "must_include": [0, 3]}, r"expected indices from 0 to 2, got \[3\]"),
        ({"k": 1, "must_include": [-1, 0]}, r"expected indices from 0 to 2, got \[-1\]"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Known(3).candidates([[0, 0, 0], [1, 2, 3]], **arguments)


def test_one_string_is_not_a_list_of_queries():
    with pytest.raises(ValueError, match="expected a sequence of queries, got one string"):
        Known(3).candidates("abc", 1)
