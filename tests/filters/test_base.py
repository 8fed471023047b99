"""The laws of every filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from lightning_influence import filters
from lightning_influence.filters import BM25Filter, Filter, KNNFilter, TfidfFilter
from lightning_influence.filters.base import largest

TEXTS = ["a b", "b c c", "a", "", "c d e", "a b", "e e e a", "d"]
QUERIES = ["a", "c e", "b a b", "e d d"]


def letters(texts):
    """Counts of five letters: nothing for a text without them."""
    return np.array([[text.count(letter) for letter in "abcde"] for text in texts], dtype=np.float32)


# For each member: how to make one on a list of texts.
CASES = {
    BM25Filter: BM25Filter,
    TfidfFilter: TfidfFilter,
    KNNFilter: lambda texts: KNNFilter(texts, letters),
}


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
    return CASES[request.param](TEXTS), QUERIES


@pytest.fixture(params=CASES, ids=lambda member: member.__name__)
def make(request):
    return CASES[request.param]


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
    assert case[0].candidates([], 2, must_include=[]).shape == (0, 2)


def test_blocks_of_queries_do_not_matter(case, monkeypatch):
    member, queries = case
    whole = member.candidates(queries, 3)
    for block in (1, 17, 24):  # of similarities: one, two, three queries
        monkeypatch.setattr("lightning_influence.filters.base._BLOCK", block)
        assert torch.equal(member.candidates(queries, 3), whole)


@given(rows=st.lists(st.sampled_from(TEXTS), min_size=3, max_size=12).filter(any), seed=st.integers(0, 99))
@pytest.mark.parametrize("build", CASES.values(), ids=[member.__name__ for member in CASES])
def test_permuting_the_pool_permutes_the_result(build, rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows))
    known = [query for query in QUERIES if set(query) & set("".join(rows)) - {" "}]
    member, permuted = build(rows), build([rows[k] for k in order])
    for query in known:
        scores = member.similarities(query)
        np.testing.assert_allclose(permuted.similarities(query), scores[order], rtol=1e-12, atol=1e-12)
        found, moved = member.candidates([query], 3)[0], permuted.candidates([query], 3)[0]
        np.testing.assert_allclose(scores[order[moved]], scores[found], rtol=1e-12, atol=1e-12)


def test_equal_rows_tie_wherever_they_are(make):
    rows = [TEXTS[k % 8] for k in range(83)]
    found = make(rows).candidates(QUERIES, 83)
    for query in found.tolist():
        for kind in range(8):
            same = [row for row in query if row % 8 == kind]
            assert same == sorted(same)


def test_one_row(make):
    assert make(["a"]).candidates(["a a", "a"], 1).tolist() == [[0], [0]]


def test_rows_without_a_word_are_legal_and_unlike_everything(make):
    member = make(["a", "", "b", "...", "c"])
    assert member.similarities("a")[[1, 3]].tolist() == [0.0, 0.0]
    assert member.candidates(["a", "b"], 5, must_include=[1, 2]).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_must_include_for_every_member(case):
    member, queries = case
    best = member.candidates(queries, 2).tolist()
    found = member.candidates(queries, 2, must_include=[3] * len(queries)).tolist()
    assert found == [[row[0], 3] for row in best]


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_a_query_of_nothing_is_refused_by_its_index(case, empty):
    member, queries = case
    with pytest.raises(
        ValueError, match=r"`\w+Filter.candidates\(queries\)`: expected .* in every query, none in query 1, 3"
    ):
        member.candidates([queries[0], empty, queries[1], empty], 2)


def test_the_pool_is_a_list(make):
    with pytest.raises(ValueError, match=r"`\w+Filter\(corpus\)`: expected a non-empty sequence of"):
        make("a b c")
    with pytest.raises(ValueError, match=r"`\w+Filter\(corpus\)`: expected a non-empty sequence of"):
        make([])


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
        ({"k": 1, "must_include": [[0], [1]]}, r"expected one row for each of 2 queries, got shape \[2, 1\]"),
        (
            {"k": 1, "must_include": [0.0, 1.0]},
            r"`candidates\(must_include=...\)`: expected indices of rows, got float64",
        ),
        ({"k": 1, "must_include": [True, False]}, r"expected indices of rows, got bool"),
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


def test_a_similarity_that_is_no_number_has_no_place():
    with pytest.raises(ValueError, match=r"`similarities\(query\)`: expected numbers, got NaN for rows \[1\]"):
        Known(3).candidates([[0, np.nan, 2]], 1)


@given(row=st.lists(st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf]), min_size=1, max_size=12), data=st.data())
def test_largest_is_a_stable_sort(row, data):
    k = data.draw(st.integers(1, len(row)))
    assert largest(np.array(row), k).tolist() == sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]


def test_a_long_search_shows_a_bar_unless_told_not_to(monkeypatch, capsys):
    monkeypatch.setattr("lightning_influence.filters.base.tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    member = BM25Filter(TEXTS, progress=False)
    member.candidates(QUERIES, 1)
    assert capsys.readouterr().err == ""
    BM25Filter(TEXTS).candidates(QUERIES, 1)
    assert "candidates" in capsys.readouterr().err
